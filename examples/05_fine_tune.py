"""Fine-tune: what the blocks of a network can learn from scikit-learn's digits.

Three classifiers see the same few digits: one has the pixels, one the embeddings of the frozen
network, and one also trains the last blocks of that network. The network knows photographs, so more
blocks are trained here than by default. All digits are centered and of one size; that makes the
pixels a strong rival, and they are worth a look before anything is trained.

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

SIZE = (64, 64)  # a pair: nothing is cropped away


def flatten(images):
    """Turn each image into a row of numbers."""
    return images.reshape(len(images), -1)


def linear():
    """Make a linear classifier that chooses the strength of its penalty itself."""
    return GridSearchCV(LogisticRegression(max_iter=2000), {"C": [0.001, 0.01, 0.1, 1.0]}, cv=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=300, help="how many to learn from")
    parser.add_argument("--epochs", type=int, default=10, help="of the stage that trains blocks")
    parser.add_argument("--unfreeze", type=int, default=8, help="how many blocks are trained")
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
            augment="light",  # mirrors nothing: a mirrored digit is none
            random_state=0,
        ),
    }
    print(f"{len(X)} digits to learn from, {len(X_test)} others to be tested on")
    for name, model in models.items():
        start = time.perf_counter()
        accuracy = model.fit(X, y).score(X_test, y_test)
        print(f"{name:<8} accuracy {accuracy:.3f} in {time.perf_counter() - start:.0f} s")

    print("What the stages did:")
    for stage in models["tuned"].stages_:
        print(
            f"{stage['stage']:<15}{stage['epochs']:>3} epochs, {stage['trainable']:>9,} parameters"
        )


if __name__ == "__main__":
    main()
