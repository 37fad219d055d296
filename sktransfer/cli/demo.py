"""The demo: embed images once, run a grid search on them, and show the accuracy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import Bunch

from sktransfer.data.folders import load_image_folder
from sktransfer.data.images import as_images
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.store.session import session_store
from sktransfer.utils.errors import import_optional

_C_CANDIDATES = np.logspace(-4, 1, 6)
_N_FOLDS = 5
_N_SHOWN_IMAGES = 24
# Characters of a class name, and of a line, in the titles of the gallery.
_MAX_NAME, _MAX_TITLE = 13, 20


def run_demo(
    images: Path | None = None,
    output: Path = Path("demo-output"),
    *,
    backbone: str = "efficientnet_lite0",
    n_jobs: int | None = None,
) -> float:
    """Run a grid search of a classifier on frozen embeddings, and plot the result.

    Parameters
    ----------
    images : Path or None
        A folder with one folder of images per class; `None` loads scikit-learn's digits.
    output : Path
        Folder in which `result.png` is saved.
    backbone : str
        Name of the backbone.
    n_jobs : int or None
        Number of worker processes of the search.

    Returns
    -------
    float
        Accuracy on the held-out images, 0-1.

    Raises
    ------
    ValueError
        If a class has too few images for a split.
    """
    import_optional("matplotlib", extra="demo", purpose="the demo")
    data, output = _load(images), Path(output).expanduser()
    X_train, X_test, y_train, y_test = _split(data)
    print(
        f"{len(X_train)} training images and {len(X_test)} held-out images, "
        f"{len(data.target_names)} classes ({data.title})"
    )
    search = GridSearchCV(
        Pipeline(
            [
                ("embed", PretrainedFeatureExtractor(backbone)),
                ("scale", StandardScaler()),
                ("classify", LogisticRegression(max_iter=2000)),
            ]
        ),
        {"classify__C": _C_CANDIDATES},
        cv=StratifiedKFold(_N_FOLDS, shuffle=True, random_state=0),
        n_jobs=n_jobs,
    )
    computed_before, start = session_store().info().computed, time.perf_counter()
    print(f"Embedding the images with {backbone} ...")
    # Embed before the search, to show a progress bar; the search reuses the embeddings.
    PretrainedFeatureExtractor(backbone, verbose=1).fit_transform([*X_train, *X_test])
    embedded = time.perf_counter()
    print(f"Searching {len(_C_CANDIDATES)} values of C with {_N_FOLDS}-fold cross-validation ...")
    search.fit(X_train, y_train)
    predicted = search.predict(X_test)
    searched = time.perf_counter()

    _report_cost(len(X_train), len(X_test), session_store().info().computed - computed_before)
    print(f"Embedding took {embedded - start:.0f} s, the search {searched - embedded:.0f} s")
    accuracy = float(np.mean(predicted == y_test))
    print(
        f"Best C = {search.best_params_['classify__C']:g}: accuracy {search.best_score_:.3f} in "
        f"cross-validation, {accuracy:.3f} on the {len(X_test)} held-out images"
    )
    print(f"Figure: {_draw(search, X_test, y_test, predicted, output)}")
    return accuracy


def _load(images: Path | None) -> Bunch:
    if images is None:
        digits = load_digits()
        names = [str(name) for name in digits.target_names]
        title = "scans of handwritten digits, 8 x 8, that come with scikit-learn"
        return Bunch(
            data=list(digits.images),
            labels=np.array(names)[digits.target],
            target_names=names,
            split=None,
            title=title,
        )
    return Bunch(title=str(images), **load_image_folder(images))


def _split(data: Bunch) -> tuple[Any, Any, Any, Any]:
    """Split by the folders train and test if they exist, else hold out a quarter of the images."""
    X, y = np.asarray(data.data, dtype=object), data.labels
    if data.split is not None and {"train", "test"} <= set(data.split):
        train, test = data.split != "test", data.split == "test"
        return list(X[train]), list(X[test]), y[train], y[test]
    names, counts = np.unique(y, return_counts=True)
    smallest = int(counts.argmin())
    if counts[smallest] < 2 * _N_FOLDS:
        raise ValueError(
            f"Got {counts[smallest]} images of the class {names.tolist()[smallest]!r}, but the "
            f"demo needs {2 * _N_FOLDS} of each class to hold some out and for {_N_FOLDS}-fold "
            "cross-validation; add images, or leave the class out"
        )
    return train_test_split(list(data.data), y, test_size=0.25, stratify=y, random_state=0)


def _report_cost(n_train: int, n_test: int, computed: int) -> None:
    fits = len(_C_CANDIDATES) * _N_FOLDS + 1
    without_store = fits * n_train + n_test
    print(
        f"Embedded {computed} images. Without the store, {fits} fits would have embedded "
        f"{without_store}, {without_store / max(1, computed):.0f} times as many"
    )


def _title(names: list[str], probability: float) -> str:
    r"""Build the title of an image; its lines are no longer than a column of the gallery is wide.

    Examples
    --------
    >>> _title(["cat", "dog"], 0.9)
    'cat → dog (90%)'
    >>> _title(["golden retriever", "labrador"], 0.9)
    'golden retri… →\nlabrador (90%)'
    """
    parts = [name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…" for name in names]
    title = f"{' → '.join(parts)} ({probability:.0%})"
    return title if len(title) <= _MAX_TITLE else title.replace(" → ", " →\n")


def _draw(search: Any, X: Any, y: Any, predicted: Any, output: Path) -> Path:
    """Draw the confusion matrix, and the images with the lowest probability of the true class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    subfigures: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    left, right = subfigures
    accuracy = np.mean(predicted == y)
    left.suptitle(f"{accuracy:.1%} accuracy on {len(y)} held-out images", fontsize=15)
    axes = left.subplots()
    ConfusionMatrixDisplay.from_predictions(
        y, predicted, ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45
    )

    probabilities = search.predict_proba(X)
    true_class_probabilities = probabilities[np.arange(len(y)), np.searchsorted(search.classes_, y)]
    hardest = np.argsort(true_class_probabilities)[:_N_SHOWN_IMAGES]
    right.suptitle("Lowest probability of the true class", fontsize=15)
    pixel_range = search.best_estimator_["embed"].pixel_range_
    images = as_images([X[row] for row in hardest], pixel_range=pixel_range)
    for rank, axes in enumerate(right.subplots(4, 6, squeeze=False).flat):
        axes.axis("off")
        if rank < len(hardest):
            row = hardest[rank]
            wrong = predicted[row] != y[row]
            axes.imshow(images[rank])
            names = [y[row], predicted[row]] if wrong else [y[row]]
            title = _title(names, probabilities[row].max())
            axes.set_title(title, color="tab:red" if wrong else "black", fontsize=8)
    output.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(output / "result.png")
    return output / "result.png"
