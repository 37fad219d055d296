"""As data grows: frozen, tuned, or from scratch, on images like photographs and unlike them.

The four cases, small or large, similar or different, on what scikit-learn carries. Similar: squares
of two photographs, told apart by photograph and half of it. Different: scanned digits, 0 to 4.
Four strategies learn from more and more images of a class; accuracy on others goes into a plot,
beside what `recommend_strategy` would have chosen. Squares of one photograph are related, so these
accuracies flatter; the order of the strategies is what to look at.

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

matplotlib.use("agg")  # a file, and no window
SIZE = (32, 32)  # a pair: nothing is cropped away


def squares(side=20):
    """Cut photographs into squares; a class is the upper or the lower half of one."""
    X, y = [], []
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        rows, columns = (length // side for length in photograph.shape[:2])
        for row, column in np.ndindex(rows, columns):
            top, left = row * side, column * side
            X.append(photograph[top : top + side, left : left + side])
            y.append(f"{name}, {'upper' if row < rows / 2 else 'lower'} half")
    return np.stack(X), np.array(y)


def digits():
    """Give scanned digits as images."""
    found = load_digits(n_class=5)
    return (found.images * 255 / 16).astype(np.uint8), found.target


def strategies(augment, epochs):
    """Make what is compared; blocks far from photographs learn fast."""
    fast = {"lr": 3e-3, "lr_decay": 1.0}
    common = {"image_size": SIZE, "augment": augment, "max_epochs": epochs, "random_state": 0}
    return {
        "frozen": make_pipeline(
            PretrainedFeatureExtractor(image_size=SIZE),
            Normalizer(),
            LogisticRegression(C=30, max_iter=2000),
        ),
        "staged": FineTunedImageClassifier(unfreeze=(0, 2), **common),
        "full": FineTunedImageClassifier(unfreeze=(0, "all"), **fast, **common),
        "scratch": FineTunedImageClassifier(unfreeze="all", weights=None, **fast, **common),
    }


def compare(title, X, y, augment, options, axes):
    """Print and draw how accurate each strategy is after some images of each class."""
    X_rest, X_test, y_rest, y_test = train_test_split(
        X, y, test_size=0.4, stratify=y, random_state=0
    )
    print(title)
    found = {}
    for size in options.sizes:
        rows = np.concatenate([np.flatnonzero(y_rest == label)[:size] for label in np.unique(y)])
        for name, model in strategies(augment, options.epochs).items():
            score = model.fit(X_rest[rows], y_rest[rows]).score(X_test, y_test)
            found.setdefault(name, []).append(score)
        report = recommend_strategy(
            X_rest[rows],
            y_rest[rows],
            extractor=PretrainedFeatureExtractor(image_size=SIZE),
            random_state=0,
        )
        chosen = found[report.strategy][-1]
        axes.plot(size, chosen, "o", color="black", mfc="none", ms=12)
        scores = "  ".join(f"{name} {scores[-1]:.3f}" for name, scores in found.items())
        print(f"  {size:>3} of a class: {scores}  recommended: {report.strategy}")
    for name, scores in found.items():
        axes.plot(options.sizes, scores, marker=".", label=name)
    axes.set(title=title, xscale="log", xlabel="training images of a class", ylim=(0, 1.05))
    axes.set_xticks(options.sizes, [str(size) for size in options.sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 15, 45])
    parser.add_argument("--epochs", type=int, default=10, help="of each stage that trains blocks")
    parser.add_argument("--output", default="as_data_grows.png")
    options = parser.parse_args()

    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    compare("Similar: squares of photographs", *squares(), "standard", options, panels[0])
    compare("Different: scanned digits", *digits(), "light", options, panels[1])
    panels[0].set_ylabel("accuracy on other images")
    panels[0].plot([], [], "o", color="black", mfc="none", ms=12, label="recommended")
    panels[0].legend(loc="upper left")
    figure.savefig(options.output, dpi=150)
    print(f"The plot is in {options.output}")


if __name__ == "__main__":
    main()
