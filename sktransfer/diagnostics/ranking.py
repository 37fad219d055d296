"""rank_backbones: compare pretrained networks on a data set, without training them.

Shapes: N images, D features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import kendalltau
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import (
    LeaveOneGroupOut,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_val_score,
)

from sktransfer.backbones.catalogue import list_backbones
from sktransfer.backbones.loading import load_backbone
from sktransfer.data.images import as_images
from sktransfer.data.labels import check_labels, check_not_missing, check_one_per_image
from sktransfer.data.validation import check_not_swapped
from sktransfer.diagnostics.extraction import read_images, resolve_extractor
from sktransfer.diagnostics.logme import logme
from sktransfer.diagnostics.probes import make_probe
from sktransfer.diagnostics.splits import check_splits
from sktransfer.extractor import PretrainedFeatureExtractor, check_extractor
from sktransfer.utils.errors import ImageError, check_random_state
from sktransfer.utils.plotting import new_axes
from sktransfer.utils.tables import html_table, text_table

# Number of folds if `cv` is None; a class with fewer images reduces it.
_DEFAULT_N_FOLDS = 5
# Number of images that are timed.
_N_TIMED_IMAGES = 32


class RankedBackbone(NamedTuple):
    """One row of a `BackboneRanking`.

    Parameters
    ----------
    name : str
        Name of the backbone, followed by layer and image size if they are not the default.
    accuracy : float
        Accuracy of the linear probe, 0-1, mean over the folds.
    spread : float
        Standard deviation of the accuracy over the folds.
    logme : float
        Evidence of a linear model; only comparable between rows.
    features : int
        Size of an embedding.
    megabytes : float
        Size of the network's weights in memory, 1e6 bytes.
    seconds : float
        Seconds to decode and embed one image on this machine.
    """

    name: str
    accuracy: float
    spread: float
    logme: float
    features: int
    megabytes: float
    seconds: float


@dataclass(frozen=True, repr=False, eq=False)
class BackboneRanking:
    """Result of `rank_backbones`: a table, the most accurate backbone first.

    Parameters
    ----------
    rows : tuple of RankedBackbone
    extractors : tuple of PretrainedFeatureExtractor
        Fitted, in the same order.
    """

    rows: tuple[RankedBackbone, ...]
    extractors: tuple[PretrainedFeatureExtractor, ...]

    @property
    def best_(self) -> PretrainedFeatureExtractor:
        """The extractor whose embeddings are classified most accurately."""
        return self.extractors[0]

    @property
    def agreement(self) -> float:
        """Kendall's rank correlation of accuracy and LogME, -1 to 1.

        NaN for a single row, and if all accuracies are equal.
        """
        if len(self.rows) < 2:
            return math.nan
        accuracies = [row.accuracy for row in self.rows]
        return float(kendalltau(accuracies, [row.logme for row in self.rows]).statistic)

    def __repr__(self) -> str:
        return "\n".join([text_table(*self._table()), *self._notes()])

    def _repr_html_(self) -> str:
        return html_table(*self._table()) + "".join(f"<p>{note}</p>" for note in self._notes())

    def plot(self, ax: Any = None) -> Any:
        """Draw accuracy against cost.

        Parameters
        ----------
        ax : matplotlib Axes or None
            Axes to draw on; None creates a figure, not registered with pyplot.

        Returns
        -------
        matplotlib Axes

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        ax = new_axes(ax, "BackboneRanking.plot")
        costs = [1000 * row.seconds for row in self.rows]
        middle = math.sqrt(min(costs) * max(costs))
        for row, cost in zip(self.rows, costs, strict=True):
            # Names extend toward the middle; otherwise the figure would cut them off.
            offset, alignment = (6, "left") if cost <= middle else (-6, "right")
            layout = {"xytext": (offset, 6), "textcoords": "offset points", "ha": alignment}
            ax.errorbar(cost, row.accuracy, row.spread, marker="o", capsize=3)
            ax.annotate(row.name, (cost, row.accuracy), **layout)
        ax.margins(0.2)
        ax.set(
            xscale="log",
            xlabel="milliseconds per image",
            ylabel="accuracy of the linear probe ± standard deviation over folds",
        )
        for set_formatter in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
            set_formatter("{x:g}")  # instead of powers of ten
        return ax

    def _table(self) -> tuple[list[str], list[list[str]], list[int]]:
        header = ["backbone", "pixels", "accuracy", "LogME", "features", "MB", "ms/image"]
        rows = [
            [
                row.name,
                "x".join(map(str, extractor.preprocessing_.crop)),
                f"{row.accuracy:.3f} ± {row.spread:.3f}",
                f"{row.logme:.3f}",
                str(row.features),
                f"{row.megabytes:.1f}",
                f"{1000 * row.seconds:.1f}",
            ]
            for row, extractor in zip(self.rows, self.extractors, strict=True)
        ]
        return header, rows, [0]

    def _notes(self) -> list[str]:
        if len(self.rows) < 2:
            return []
        first, second = self.rows[:2]
        notes = []
        if first.accuracy - second.accuracy < max(first.spread, second.spread):
            notes.append("The top two differ by less than the spread across folds.")
        if not math.isnan(self.agreement):
            verb = "agrees" if self.agreement > 0 else "does not agree"
            notes.append(f"LogME {verb} with this order (rank correlation {self.agreement:.2f}).")
        return notes


def rank_backbones(
    X: Any,
    y: Any,
    backbones: Sequence[Any] | None = None,
    *,
    extractor: PretrainedFeatureExtractor | None = None,
    cv: Any = None,
    groups: Any = None,
    random_state: Any = 0,
) -> BackboneRanking:
    """Rank backbones for a task by the accuracy of a linear probe on their embeddings.

    Each network embeds each image once; no network is trained. The table is sorted by the
    cross-validated accuracy of a logistic regression (`C=30`) on embeddings of unit length. It also
    shows LogME, which needs no folds but is only comparable between backbones.

    Parameters
    ----------
    X : images in any container that `PretrainedFeatureExtractor` takes
    y : array-like of shape (N,)
        Class labels.
    backbones : sequence of (str, Module, callable or PretrainedFeatureExtractor), default=None
        Backbones to rank. An extractor is cloned, with all of its settings. None is all backbones
        whose weights are on this machine.
    extractor : PretrainedFeatureExtractor or None, default=None
        Settings for backbones that are not extractors; its `backbone` is ignored. It is cloned.
        None is `PretrainedFeatureExtractor()`.
    cv : int, splitter, iterable or None, default=None
        None is 5 shuffled, stratified folds, or fewer if a class has fewer images.
    groups : array-like of shape (N,), default=None
        Groups for `cv`. If `cv` is None, no fold divides a group.
    random_state : int, RandomState or None, default=0
        Seed of the folds if `cv` is None.

    Returns
    -------
    BackboneRanking

    Raises
    ------
    ValueError
        If a backbone or a parameter is invalid, for a single class, or for a class with a single
        image or in a single group; before any image is embedded.
    ImageError
        If images cannot be read; names all of them.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import PretrainedFeatureExtractor, rank_backbones
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> scans = PretrainedFeatureExtractor(image_shape=(8, 8))
    >>> ranking = rank_backbones(X[:60], y[:60], ["efficientnet_lite0"], extractor=scans)
    >>> ranking.rows[0].name, ranking.rows[0].accuracy > 0.8
    ('efficientnet_lite0', True)
    """
    check_not_swapped(X, y)
    if isinstance(backbones, (str, BaseEstimator)) or callable(backbones):
        backbones = [backbones]
    if backbones is not None and not isinstance(backbones, Iterable):
        raise TypeError(
            f"Got backbones={backbones!r}, but expected a list of names, modules or extractors, or "
            "None for all on this machine"
        )
    check_random_state(random_state, maximum=2**32 - 1)  # as in scikit-learn
    base = resolve_extractor(extractor)
    extractors = [
        clone(backbone)
        if isinstance(backbone, PretrainedFeatureExtractor)
        else clone(base).set_params(backbone=backbone)
        for backbone in (_local() if backbones is None else backbones)
    ]
    if not extractors:
        raise ValueError("Got no backbones; pass at least one, or None for all on this machine")
    for candidate in extractors:  # before images are embedded, so that an error is raised early
        check_extractor(candidate)
    labels = check_labels(as_images(X, image_shape=extractors[0].image_shape), y)
    codes = labels.y
    if groups is not None:
        check_one_per_image("groups", groups, codes)
        groups = check_not_missing(groups, "groups")
    splits = (
        make_folds(codes, groups, random_state, labels.classes)
        if cv is None
        else check_splits(cv, len(codes), codes, groups)
    )
    rows = [_rank(extractor, X, codes, splits) for extractor in extractors]
    order = sorted(range(len(rows)), key=lambda index: -rows[index].accuracy)
    return BackboneRanking(
        tuple(rows[index] for index in order), tuple(extractors[index] for index in order)
    )


def _local() -> list[str]:
    """Return the names of the backbones whose weights are on this machine."""
    return [row.name for row in list_backbones() if row.local]


def make_folds(
    codes: np.ndarray,
    groups: np.ndarray | None = None,
    random_state: Any = 0,
    classes: Sequence[Any] | np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Build 5 shuffled, stratified folds, or fewer if a class has fewer images or groups.

    The training set of each fold contains all classes.

    Parameters
    ----------
    codes : ndarray of shape (N,)
        Class numbers, 0 to K - 1.
    groups : ndarray of shape (N,) or None
        No fold divides a group.
    random_state : int, RandomState or None
    classes : array-like of shape (K,) or None
        Labels for error messages; None is the class numbers.

    Returns
    -------
    list of (train, test)
        Rows of each fold.

    Raises
    ------
    ValueError
        If a class has a single image, or is in a single group.

    Examples
    --------
    >>> len(make_folds(np.array([0, 0, 1, 1, 1])))
    2
    """
    counts = np.bincount(codes)
    if counts.min() < 2:
        raise ValueError(
            f"Got a single image of {_list_classes(counts < 2, classes)}, but cross-validation "
            "needs at least two images of each class; leave the class out, or add images"
        )
    if groups is None:
        folds = StratifiedKFold(
            min(_DEFAULT_N_FOLDS, counts.min()), shuffle=True, random_state=random_state
        )
        return list(folds.split(codes, codes))
    n_groups = np.array([len(np.unique(groups[codes == code])) for code in range(len(counts))])
    if n_groups.min() < 2:
        raise ValueError(
            f"Got a single group of {_list_classes(n_groups < 2, classes)}, but cross-validation "
            "needs at least two groups of each class; leave the class out, or pass finer groups"
        )
    for count in range(min(_DEFAULT_N_FOLDS, n_groups.min()), 1, -1):
        shuffled = StratifiedGroupKFold(count, shuffle=True, random_state=random_state)
        splits = list(shuffled.split(codes, codes, groups))
        if all(len(np.unique(codes[train])) == codes.max() + 1 for train, _ in splits):
            return splits
    # For groups so few and uneven that fewer folds would lack a class.
    return list(LeaveOneGroupOut().split(codes, codes, groups))


def _list_classes(chosen: np.ndarray, classes: Sequence[Any] | np.ndarray | None) -> str:
    """Name the chosen classes; `chosen` is a mask (K,)."""
    numbers = np.flatnonzero(chosen)
    names = numbers.tolist() if classes is None else np.asarray(classes)[numbers].tolist()
    listed = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    return f"the class {listed}" if len(names) == 1 else f"each of the classes {listed}"


def _rank(
    extractor: PretrainedFeatureExtractor, X: Any, codes: np.ndarray, splits: list[Any]
) -> RankedBackbone:
    embeddings = extractor.fit_transform(X)
    if extractor.errors_:  # all backbones must be ranked on the same images
        raise ImageError.of(extractor.errors_)
    # With metadata routing enabled, scikit-learn 1.6 does not accept params=None.
    scores = cross_val_score(make_probe(), embeddings, codes, cv=splits, params={})
    backbone = load_backbone(extractor.backbone, extractor.weights)
    return RankedBackbone(
        name=_name(backbone.name, extractor),
        accuracy=float(scores.mean()),
        spread=float(scores.std(ddof=1)) if len(scores) > 1 else math.nan,
        logme=logme(embeddings, codes),
        features=embeddings.shape[1],
        megabytes=backbone.n_bytes / 1e6,
        seconds=_time(extractor, X),
    )


def _name(backbone: str, extractor: PretrainedFeatureExtractor) -> str:
    """Return the name of a row: the backbone, and settings that are not the default."""
    layer, size = extractor.layer, extractor.image_size
    layers = layer if isinstance(layer, (list, tuple)) else [layer]
    parts = [backbone]
    if layer is not None:
        parts.append(" + ".join("penultimate" if name is None else name for name in layers))
    if size is not None:
        parts.append(" x ".join(map(str, size)) if isinstance(size, (list, tuple)) else str(size))
    return ", ".join(parts)


def _time(extractor: PretrainedFeatureExtractor, X: Any) -> float:
    """Measure the seconds per image of a second pass, with the engine that embedded all images."""
    images = read_images(extractor, X)[:_N_TIMED_IMAGES]
    timed = clone(extractor).set_params(cache=None, engine=extractor.engine_, verbose=0)
    timed.fit_transform(images)
    start = time.perf_counter()
    timed.transform(images)
    return (time.perf_counter() - start) / len(images)
