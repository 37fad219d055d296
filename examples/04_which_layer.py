"""Choose a layer with a grid search, on scikit-learn's digits.

The last layers of a network are specific to the categories that it was trained on; earlier layers
detect edges and textures. If your images are unlike the pretraining images, as
scanned digits are, an earlier layer can work better. The search tunes the layer and the
regularization together.

    python examples/04_which_layer.py [--digits 300] [--layers block4 block10 ...]
"""

import argparse
import time

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

LAYERS = ["block4", "block7", "block10", "block15", None]
PENALTIES = [0.01, 0.1, 1.0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=300, help="number of training digits")
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    options = parser.parse_args()
    digits = load_digits()
    # The search never sees the test digits, which measure the accuracy of the chosen layer.
    X, X_test, y, y_test = train_test_split(
        digits.images,
        digits.target,
        train_size=options.digits,
        test_size=options.digits,
        stratify=digits.target,
        random_state=0,
    )

    search = GridSearchCV(
        Pipeline(
            [
                ("embed", PretrainedFeatureExtractor(image_size=96)),
                ("scale", StandardScaler()),
                ("classify", LogisticRegression(max_iter=2000)),
            ]
        ),
        {"embed__layer": options.layers, "classify__C": PENALTIES},
        cv=StratifiedKFold(3, shuffle=True, random_state=0),
    )
    start = time.perf_counter()
    search.fit(X, y)
    seconds = time.perf_counter() - start

    results = search.cv_results_
    accuracy = {
        (params["embed__layer"], params["classify__C"]): (mean, std)
        for params, mean, std in zip(
            results["params"], results["mean_test_score"], results["std_test_score"], strict=True
        )
    }
    print(f"Accuracy on {len(X)} digits, mean +- standard deviation over 3 folds")
    print(f"{'layer':<12}" + "".join(f"{f'C = {penalty:g}':>18}" for penalty in PENALTIES))
    for layer in options.layers:
        cells = "".join(
            "{:>10.3f} +- {:.3f}".format(*accuracy[layer, penalty]) for penalty in PENALTIES
        )
        print(f"{layer or 'penultimate':<12}{cells}")
    print(f"Best: {search.best_params_}, {search.best_score_:.3f}")
    print(f"Its accuracy on {len(X_test)} test digits: {search.score(X_test, y_test):.3f}")
    print(f"The search took {seconds:.0f} s")


if __name__ == "__main__":
    main()
