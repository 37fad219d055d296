"""Labels from one scanner, images from another: scikit-learn's digits, and worse copies of them.

The source is clean, and labeled. The target is dim, noisy and on a gray ground, and without
labels: those that are here only say how good each way is. Three ways look at the images of the
target as well: BatchNorm that is matched to them, an adversary that tells the domains apart while
the trained blocks learn to make them alike, and labels that the classifier itself is sure of.

    python examples/06_domain_shift.py [--digits 200] [--epochs 4] [--unfreeze 4]
"""

import argparse
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sktransfer import FineTunedImageClassifier, SelfTrainedImageClassifier


def rescan(images, random):
    """Scan images (values 0 to 16) with a worse scanner."""
    dim = 5 + 0.4 * images
    return (dim + random.normal(0, 0.7, images.shape)).clip(0, 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=200, help="of each domain")
    parser.add_argument("--epochs", type=int, default=4, help="of the stage that trains blocks")
    parser.add_argument("--unfreeze", type=int, default=4, help="how many blocks are trained")
    options = parser.parse_args()
    digits, random = load_digits(), np.random.RandomState(0)
    X_source, X_rest, y_source, y_rest = train_test_split(
        digits.images, digits.target, train_size=options.digits, random_state=0
    )
    X_target, X_test, _, y_test = train_test_split(
        rescan(X_rest, random), y_rest, train_size=options.digits, test_size=400, random_state=0
    )
    X = np.concatenate([X_source, X_target])
    y = np.concatenate([y_source, np.full(len(X_target), -1)])  # -1: nobody knows
    sample_domain = np.repeat([1, -2], [len(X_source), len(X_target)])

    ways = {
        "source only": {},
        "BatchNorm": {"batch_norm": "adapt"},
        "adversary": {"domain_adversarial": 0.3},
        "both": {"batch_norm": "adapt", "domain_adversarial": 0.3},
        "BatchNorm, then its own guesses": {"batch_norm": "adapt"},
    }
    print(f"{len(X_source)} labeled digits, {len(X_target)} others without labels")
    for name, parameters in ways.items():
        classifier = FineTunedImageClassifier(
            image_size=(32, 32),  # a pair: nothing is cropped away
            unfreeze=(0, options.unfreeze),
            max_epochs=options.epochs,
            augment="light",  # mirrors nothing: a mirrored digit is none
            n_views=1,
            random_state=0,
            **parameters,
        )
        if "guesses" in name:
            classifier = SelfTrainedImageClassifier(classifier)
        start = time.perf_counter()
        classifier.fit(X, y, sample_domain=sample_domain)
        seconds = time.perf_counter() - start
        accuracy = classifier.score(X_test, y_test)
        print(f"{name:<32} accuracy on the target {accuracy:.3f} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
