"""Transfer from a closer source: tune on some classes, then learn similar ones from a few images.

First, all blocks are tuned on scans of the digits 0 to 4. The tuned network then serves as the
backbone for the digits 5 to 9, of which only a few are labeled. For comparison, the script does the
same starting from the ImageNet weights. Averaged over several sources, a linear classifier on the
embeddings does not benefit from the closer source, but fine-tuning does.

    python examples/08_closer_source.py [--digits 500] [--epochs 5] [--labeled 10] [--draws 3]
"""

import argparse

from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor

IMAGES = {"image_shape": (8, 8), "image_size": (64, 64)}
FULL = {"unfreeze": (0, "all"), "lr": 3e-3, "lr_decay": 1.0, "augment": "light", "n_views": 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--digits", type=int, default=500, help="number of images of the digits 0 to 4 to tune on"
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="epochs on the source; twice as many on the target"
    )
    parser.add_argument(
        "--labeled", type=int, default=10, help="labeled images of each digit from 5 to 9"
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="number of random draws of the labeled images"
    )
    options = parser.parse_args()
    X, y = load_digits(return_X_y=True)
    X_source, y_source = X[y < 5][: options.digits], y[y < 5][: options.digits]
    X, y = X[y >= 5], y[y >= 5]

    source = FineTunedImageClassifier(max_epochs=options.epochs, random_state=0, **FULL, **IMAGES)
    source.fit(X_source, y_source)

    draws = StratifiedShuffleSplit(options.draws, train_size=5 * options.labeled, random_state=0)
    # In a FrozenEstimator, because cross_val_score clones the model, and a clone would be unfitted.
    backbones = {"ImageNet": "efficientnet_lite0", "digits 0 to 4": FrozenEstimator(source)}
    for name, backbone in backbones.items():
        linear = make_pipeline(
            PretrainedFeatureExtractor(backbone, **IMAGES),
            Normalizer(),
            LogisticRegression(C=30, max_iter=2000),
        )
        tuned = FineTunedImageClassifier(
            backbone, max_epochs=2 * options.epochs, random_state=0, **FULL, **IMAGES
        )
        for method, model in {"linear": linear, "tuned": tuned}.items():
            scores = cross_val_score(model, X, y, cv=draws)
            print(f"{name:<14} {method:<7} accuracy {scores.mean():.3f} ± {scores.std():.3f}")


if __name__ == "__main__":
    main()
