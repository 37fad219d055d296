"""Domain shift: labels from one scanner, images from another (scikit-learn's digits, degraded).

The source is clean and labeled. The target is dim, noisy and on a gray background; its labels are
used only to measure the accuracy. Three methods make use of the unlabeled target images: matching
BatchNorm to the target; adversarial training, in which the trained blocks learn to make the domains
indistinguishable; and self-training on confident pseudo-labels.

    python examples/06_domain_shift.py [--digits 200] [--epochs 4] [--unfreeze 4]
"""

import argparse
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sktransfer import FineTunedImageClassifier, SelfTrainedImageClassifier


def rescan(images, random):
    """Simulate a worse scanner. Pixel values range from 0 to 16."""
    dim = 5 + 0.4 * images
    return (dim + random.normal(0, 0.7, images.shape)).clip(0, 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--digits", type=int, default=200, help="number of training digits per domain"
    )
    parser.add_argument(
        "--epochs", type=int, default=4, help="epochs of the stage that trains blocks"
    )
    parser.add_argument("--unfreeze", type=int, default=4, help="number of blocks to train")
    options = parser.parse_args()
    digits, random = load_digits(), np.random.RandomState(0)
    X_source, X_rest, y_source, y_rest = train_test_split(
        digits.images, digits.target, train_size=options.digits, random_state=0
    )
    X_target, X_test, _, y_test = train_test_split(
        rescan(X_rest, random), y_rest, train_size=options.digits, test_size=400, random_state=0
    )
    X = np.concatenate([X_source, X_target])
    y = np.concatenate([y_source, np.full(len(X_target), -1)])  # -1: unlabeled
    sample_domain = np.repeat([1, -2], [len(X_source), len(X_target)])

    methods = {
        "source only": {},
        "BatchNorm": {"batch_norm": "adapt"},
        "adversary": {"domain_adversarial": 0.3},
        "both": {"batch_norm": "adapt", "domain_adversarial": 0.3},
        "BatchNorm, then pseudo-labels": {"batch_norm": "adapt"},
    }
    print(f"{len(X_source)} labeled source digits, {len(X_target)} unlabeled target digits")
    for name, parameters in methods.items():
        classifier = FineTunedImageClassifier(
            image_size=(32, 32),  # a pair resizes without cropping
            unfreeze=(0, options.unfreeze),
            max_epochs=options.epochs,
            augment="light",  # does not mirror: a mirrored digit is not a digit
            n_views=1,
            random_state=0,
            **parameters,
        )
        if "pseudo-labels" in name:
            classifier = SelfTrainedImageClassifier(classifier)
        start = time.perf_counter()
        classifier.fit(X, y, sample_domain=sample_domain)
        seconds = time.perf_counter() - start
        accuracy = classifier.score(X_test, y_test)
        print(f"{name:<32} accuracy on the target {accuracy:.3f} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
