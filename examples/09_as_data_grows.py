"""Compare frozen, tuned and from-scratch training as the data grows, near to and far from ImageNet.

The script covers all four cases (few or many images, similar to or different from the pretraining
images) with data that comes with scikit-learn. Similar: squares cut out of two photographs; the
class is the upper or lower half of one of the photographs. Different: scanned digits, 0 to 4. Four
strategies are trained on a growing number of images per class, and a plot shows their accuracy on
held-out images and which strategy `recommend_strategy` picks. Squares of one photograph look alike,
so the accuracies are too high; only the comparison of the strategies is meaningful.

    python examples/09_as_data_grows.py [--sizes 5 15 45] [--epochs 10] [--output PNG]
"""

import argparse

import matplotlib
import numpy as np
from sklearn.datasets import load_digits, load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor, recommend_strategy

matplotlib.use("agg")  # plots to a file, without a window
SIZE = (32, 32)  # a pair resizes without cropping


def squares(side=20):
    """Cut the photographs into squares; each half of a photograph is a class."""
    X, y = [], []
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        rows, columns = (length // side for length in photograph.shape[:2])
        for row, column in np.ndindex(rows, columns):
            top, left = row * side, column * side
            X.append(photograph[top : top + side, left : left + side])
            y.append(f"{name}, {'upper' if row < rows / 2 else 'lower'} half")
    return np.stack(X), np.array(y)


def digits():
    """Load scanned digits as uint8 images."""
    bunch = load_digits(n_class=5)
    return (bunch.images * 255 / 16).astype(np.uint8), bunch.target


def strategies(augment, epochs):
    """Build the estimator of each strategy."""
    # If all blocks are tuned, they need higher learning rates.
    all_blocks = {"lr": 3e-3, "lr_decay": 1.0}
    common = {"image_size": SIZE, "augment": augment, "max_epochs": epochs, "random_state": 0}
    return {
        "frozen": make_pipeline(
            PretrainedFeatureExtractor(image_size=SIZE),
            Normalizer(),
            LogisticRegression(C=30, max_iter=2000),
        ),
        "staged": FineTunedImageClassifier(unfreeze=(0, 2), **common),
        "full": FineTunedImageClassifier(unfreeze=(0, "all"), **all_blocks, **common),
        "scratch": FineTunedImageClassifier(unfreeze="all", weights=None, **all_blocks, **common),
    }


def compare(title, X, y, augment, options, axes):
    """Print and plot the accuracy of each strategy against the number of images per class."""
    X_rest, X_test, y_rest, y_test = train_test_split(
        X, y, test_size=0.4, stratify=y, random_state=0
    )
    print(title)
    accuracies = {}
    for size in options.sizes:
        rows = np.concatenate([np.flatnonzero(y_rest == label)[:size] for label in np.unique(y)])
        for name, model in strategies(augment, options.epochs).items():
            score = model.fit(X_rest[rows], y_rest[rows]).score(X_test, y_test)
            accuracies.setdefault(name, []).append(score)
        report = recommend_strategy(
            X_rest[rows],
            y_rest[rows],
            extractor=PretrainedFeatureExtractor(image_size=SIZE),
            random_state=0,
        )
        recommended = accuracies[report.strategy][-1]
        axes.plot(size, recommended, "o", color="black", mfc="none", ms=12)
        scores = "  ".join(f"{name} {scores[-1]:.3f}" for name, scores in accuracies.items())
        print(f"  {size:>3} per class: {scores}  recommended: {report.strategy}")
    for name, scores in accuracies.items():
        axes.plot(options.sizes, scores, marker=".", label=name)
    axes.set(title=title, xscale="log", xlabel="training images per class", ylim=(0, 1.05))
    axes.set_xticks(options.sizes, [str(size) for size in options.sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[5, 15, 45], help="training images per class"
    )
    parser.add_argument(
        "--epochs", type=int, default=10, help="epochs of each stage that trains blocks"
    )
    parser.add_argument(
        "--output", default="as_data_grows.png", help="file in which to save the plot"
    )
    options = parser.parse_args()

    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    compare("Similar: squares of photographs", *squares(), "standard", options, panels[0])
    compare("Different: scanned digits", *digits(), "light", options, panels[1])
    panels[0].set_ylabel("accuracy on other images")
    panels[0].plot([], [], "o", color="black", mfc="none", ms=12, label="recommended")
    panels[0].legend(loc="upper left")
    figure.savefig(options.output, dpi=150)
    print(f"Saved the plot to {options.output}")


if __name__ == "__main__":
    main()
