"""Embed, scale and classify images in three lines, with a grid search over the classifier's C.

scikit-learn's digits are 8 x 8 scans, quite unlike the photographs that the network was trained on.
The search fits 31 pipelines, but each image goes through the network only once.

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
    parser.add_argument("--digits", type=int, default=600, help="number of the 1,797 digits to use")
    count = parser.parse_args().digits
    digits = load_digits()
    X, y = digits.images[:count], digits.target[:count]
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)

    with tempfile.TemporaryDirectory() as directory:
        # The default, cache="auto", would work too; a store of our own counts the embedded images.
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
    # Without the store, each fit of the search would embed all of X_train: the training folds to
    # fit, and the test fold to score. The refit would embed X_train again, and `score` X_test.
    without_store = fits * len(X_train) + len(X_test)
    print(f"{len(X_train)} training digits, {len(X_test)} test digits; {seconds:.0f} s")
    print(f"Best C = {best:g}: accuracy {search.best_score_:.3f} in cross-validation")
    print(f"Accuracy on the test digits: {accuracy:.3f}")
    print(f"Images through the network: {info.computed} (without the store: {without_store})")


if __name__ == "__main__":
    main()
