"""Fine-tune on scikit-learn's digits, and compare with raw pixels and with frozen embeddings.

Three classifiers are trained on the same digits: a linear one on raw pixels, a linear one on frozen
embeddings, and one that also trains the last blocks of the network. Digits are unlike the
photographs that the network was trained on, so the script trains more blocks than the default. All
digits are centered and have the same size, which makes raw pixels a strong baseline.

    python examples/05_fine_tune.py [--digits 300] [--epochs 10] [--unfreeze 8]
"""

import argparse
import time

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor

SIZE = (64, 64)  # a pair resizes without cropping


def flatten(images):
    """Flatten each image into a row of pixels."""
    return images.reshape(len(images), -1)


def linear():
    """Build a linear classifier that chooses its regularization by cross-validation."""
    return GridSearchCV(LogisticRegression(max_iter=2000), {"C": [0.001, 0.01, 0.1, 1.0]}, cv=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=300, help="number of training digits")
    parser.add_argument(
        "--epochs", type=int, default=10, help="number of epochs for training the blocks"
    )
    parser.add_argument("--unfreeze", type=int, default=8, help="number of blocks to train")
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

    embed = PretrainedFeatureExtractor(image_size=SIZE)
    models = {
        "pixels": make_pipeline(FunctionTransformer(flatten), MinMaxScaler(), linear()),
        "frozen": make_pipeline(embed, StandardScaler(), linear()),
        "tuned": FineTunedImageClassifier(
            image_size=SIZE,
            unfreeze=(0, options.unfreeze),
            max_epochs=options.epochs,
            augment="light",  # does not mirror: a mirrored digit is not a digit
            random_state=0,
        ),
    }
    print(f"{len(X)} training digits, {len(X_test)} test digits")
    for name, model in models.items():
        start = time.perf_counter()
        accuracy = model.fit(X, y).score(X_test, y_test)
        print(f"{name:<8} accuracy {accuracy:.3f} in {time.perf_counter() - start:.0f} s")

    print("Stages:")
    for stage in models["tuned"].stages_:
        print(
            f"{stage['stage']:<15}{stage['epochs']:>3} epochs, {stage['trainable']:>9,} parameters"
        )


if __name__ == "__main__":
    main()
