"""Three lines: embed, scale, classify - and search a parameter of the classifier.

The digits of scikit-learn are 8 x 8 scans, far from the photographs that the network was trained
on. The search fits 31 pipelines, and runs each image through the network once.

    python examples/01_three_lines.py [--digits 600]
"""

import argparse
import tempfile
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import EmbeddingStore, PretrainedFeatureExtractor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=600, help="how many of the 1,797 to use")
    count = parser.parse_args().digits
    digits = load_digits()
    X, y = digits.images[:count], digits.target[:count]
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)

    with tempfile.TemporaryDirectory() as directory:
        # cache="auto", the default, would do; a store of its own lets this script count.
        store = EmbeddingStore(directory)

        # The three lines.
        embed = PretrainedFeatureExtractor(image_size=96, cache=store)
        pipeline = make_pipeline(embed, StandardScaler(), LogisticRegression(max_iter=2000))
        search = GridSearchCV(
            pipeline,
            {"logisticregression__C": np.logspace(-4, 1, 6)},
            cv=StratifiedKFold(5, shuffle=True, random_state=0),
        )

        start = time.perf_counter()
        search.fit(X_train, y_train)
        accuracy = search.score(X_test, y_test)
        seconds = time.perf_counter() - start
        info = store.info()
        store.close()

    best = search.best_params_["logisticregression__C"]
    fits = search.n_splits_ * len(search.cv_results_["params"]) + 1
    # Each fit of the search embeds all but one fold to learn and that fold to score; the last
    # one, on the best value, embeds all of X_train, and then X_test is scored.
    without = fits * len(X_train) + len(X_test)
    print(f"{len(X_train)} digits to learn from, {len(X_test)} held out; {seconds:.0f} s")
    print(f"Best C = {best:g}: accuracy {search.best_score_:.3f} in cross-validation")
    print(f"Accuracy on the digits held out: {accuracy:.3f}")
    print(f"Images through the network: {info.computed} (without the store: {without})")


if __name__ == "__main__":
    main()
