"""Choose a strategy before training, on scikit-learn's digits.

`recommend_strategy` embeds the training images once, measures how different they are from the
pretraining images, and returns an estimator that is ready to fit. The script fits that
estimator and, for comparison, a linear classifier on frozen embeddings, the usual choice if there
are only a few photographs.

    python examples/07_which_strategy.py [--digits 150] [--epochs 10]
"""

import argparse
import time

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from sktransfer import PretrainedFeatureExtractor, recommend_strategy

SIZE = (64, 64)  # a pair resizes without cropping


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=150, help="number of training digits")
    parser.add_argument(
        "--epochs", type=int, default=10, help="epochs of the stage that trains blocks"
    )
    options = parser.parse_args()
    digits = load_digits()
    X, X_test, y, y_test = train_test_split(
        digits.images,
        digits.target,
        train_size=options.digits,
        test_size=500,
        stratify=digits.target,
        random_state=0,
    )

    extractor = PretrainedFeatureExtractor(image_size=SIZE)
    report = recommend_strategy(X, y, extractor=extractor, random_state=0)
    print(report)  # in a notebook, `report` is displayed as HTML

    models = {
        "recommended": report.estimator_.set_params(max_epochs=options.epochs),
        "frozen": make_pipeline(
            PretrainedFeatureExtractor(image_size=SIZE),
            Normalizer(),
            LogisticRegression(C=30, max_iter=2000),
        ),
    }
    print(f"\nOn {len(X_test)} test digits:")
    for name, model in models.items():
        start = time.perf_counter()
        accuracy = model.fit(X, y).score(X_test, y_test)
        print(f"{name:<12} accuracy {accuracy:.3f} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
