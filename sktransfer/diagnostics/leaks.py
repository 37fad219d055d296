"""find_leaks: duplicate images, on both sides of a split or with different labels.

Shapes: N images, P pairs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_consistent_length, column_or_1d

from sktransfer.data.decoding import encode_jpeg
from sktransfer.data.images import Images, as_images
from sktransfer.data.items import are_missing
from sktransfer.diagnostics.extraction import read_images, resolve_extractor
from sktransfer.embedding.duplicates import (
    POSSIBLE,
    SAME,
    EmbeddedImages,
    Pairs,
    connect,
    find_pairs,
)
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import ImageError
from sktransfer.utils.runtime import resolve_threads
from sktransfer.utils.tables import Html, html_image, html_list, html_table, text_table

KINDS = ("identical", "copy", "mirrored", "alike")

# Images with different pixels are alike if the cosine of their embeddings is at least this.
ALIKE = 0.95

# All pixels are compared if the correlation of the thumbnails is at least this.
_MAYBE_IDENTICAL = 0.9999

# Number of pairs that a report shows, and the size of their images in pixels.
_MAX_SHOWN_PAIRS = 20
_THUMBNAIL_SIDE = 128
_THUMBNAIL = Preprocessing(resize=_THUMBNAIL_SIDE)


@dataclass(frozen=True, repr=False, eq=False)
class LeakReport:
    """Result of `find_leaks`, shown as a table, in a notebook with the images.

    Parameters
    ----------
    pairs : ndarray of shape (P, 3)
        Rows i and j of two images, and the cosine of their embeddings; float64, the most similar
        ones first. Of two sets, i is a row of `X` and j one of `X_test`.
    kinds : ndarray of shape (P,)
        `"identical"` (the same pixels), `"copy"` (resized, recompressed or cropped), `"mirrored"`,
        or `"alike"`: other pixels that the network can hardly tell apart, such as two shots of one
        scene.
    across : ndarray of shape (P,)
        Whether the two images are separated: by a split of `cv`, or because they are in different
        groups or sets.
    conflicts : ndarray of shape (P,)
        Whether the two images have different labels.
    groups : ndarray of shape (N,) or None
        Numbers that are the same for images that pairs connect: the `groups` of a
        `GroupKFold` or `StratifiedGroupKFold` that keeps them together. None for two sets.
    n_images : tuple of int
        Number of images that were compared, of one set or of both.
    unreadable : ndarray of int
        Rows of broken images, which were left out; of both sets, the second after the first.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_sample_images
    >>> china, flower = load_sample_images().images
    >>> report = find_leaks([china, flower, china[:, ::-1]], ["a", "b", "c"])
    >>> report.pairs[:, :2].astype(int).tolist(), report.kinds.tolist(), report.conflicts.tolist()
    ([[0, 2]], ['mirrored'], [True])
    """

    pairs: np.ndarray
    kinds: np.ndarray
    across: np.ndarray
    conflicts: np.ndarray
    groups: np.ndarray | None
    n_images: tuple[int, ...]
    unreadable: np.ndarray
    _names: tuple[tuple[str, str], ...]
    _images: tuple[Images, Images]

    @property
    def summary(self) -> list[str]:
        """The results, a sentence each."""
        sets = " and ".join(f"{count:,}" for count in self.n_images)
        if not len(self.pairs):
            found = [f"No duplicates or near-duplicates among {sets} images."]
        else:
            counts = {kind: int((self.kinds == kind).sum()) for kind in KINDS}
            listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
            found = [f"{_pairs(len(self.pairs))} among {sets} images: {listed}."]
        if self.across.any():
            found.append(
                f"{_pairs(int(self.across.sum()))} on both sides of a split: scores are too high. "
                + (
                    "Pass report.groups to a StratifiedGroupKFold, which keeps such images "
                    "together."
                    if self.groups is not None
                    else "Remove one image of each pair."
                )
            )
        if self.conflicts.any():
            found.append(f"{_pairs(int(self.conflicts.sum()))} with different labels.")
        if len(self.unreadable):
            found.append(f"{len(self.unreadable):,} images could not be read and were left out.")
        return found

    def __repr__(self) -> str:
        lines = [*self.summary]
        if len(self.pairs):
            lines += ["", text_table(*self._table())]
        return "\n".join([*lines, *self._more()])

    def _repr_html_(self) -> str:
        parts = [html_list([*self.summary, *self._more()])]
        if len(self.pairs):
            header, rows, left = self._table()
            images = [self._show(*pair) for pair in self._shown()]
            rows = [[image, *row] for image, row in zip(images, rows, strict=True)]
            parts.append(html_table(["", *header], rows, [0, *(1 + column for column in left)]))
        return "".join(parts)

    def _table(self) -> tuple[list[str], list[list[str]], list[int]]:
        header = ["i", "j", "cosine", "kind", "split", "labels", "image i", "image j"]
        rows = [
            [
                *(str(row) for row in pair),
                f"{cosine:.3f}",
                str(kind),
                "across" if across else "",
                "differ" if conflict else "",
                *names,
            ]
            for pair, cosine, kind, across, conflict, names in zip(
                self._shown(),
                self.pairs[:, 2],
                self.kinds,
                self.across,
                self.conflicts,
                self._names,
                strict=False,
            )
        ]
        return header, rows, [3, 4, 5, 6, 7]

    def _shown(self) -> list[list[int]]:
        return self.pairs[:_MAX_SHOWN_PAIRS, :2].astype(int).tolist()

    def _more(self) -> list[str]:
        rest = len(self.pairs) - _MAX_SHOWN_PAIRS
        return [f"and {rest:,} more in report.pairs"] if rest > 0 else []

    def _show(self, i: int, j: int) -> Html:
        shown: list[str] = []
        for images, row in zip(self._images, (i, j), strict=True):
            try:
                pixels = _THUMBNAIL.resized(images.decode(row, _THUMBNAIL_SIDE))
                shown.append(html_image(encode_jpeg(pixels), images.describe(row)))
            except ImageError as error:  # deleted after it was compared
                shown.append(html_list([str(error)]))
        # Notebooks set images to display: block, which would stack them.
        cells = "".join(f"<div>{cell}</div>" for cell in shown)
        return Html(f'<div style="display: flex; min-width: max-content">{cells}</div>')


def find_leaks(
    X: Any,
    y: Any = None,
    cv: Any = None,
    groups: Any = None,
    *,
    X_test: Any = None,
    y_test: Any = None,
    extractor: PretrainedFeatureExtractor | None = None,
) -> LeakReport:
    """Compute pairs of duplicate images, and check splits and labels for leaks and conflicts.

    Images whose embeddings have a cosine of at least 0.5 are compared pixel by pixel as
    thumbnails, also mirrored and cropped by up to a tenth: they are copies if the correlation is at
    least 0.95. Others are alike if the cosine is at least 0.95. At these thresholds 0.98 or more of
    the resized, recompressed, mirrored or cropped copies of 432 photographs were found, and 0.96 or
    more of the pairs found were such copies.

    Parameters
    ----------
    X : images in any container that `PretrainedFeatureExtractor` takes
    y : array-like of shape (N,), default=None
        Labels: pairs with different labels are conflicts; a missing label never conflicts.
    cv : int, splitter, iterable of (train, test) or None, default=None
        Splits: a pair is separated if a split has one image in train and the other in test.
    groups : array-like of shape (N,), default=None
        Groups for `cv`; if `cv` is None, pairs of different groups count as separated.
    X_test, y_test : images and labels, default=None
        A second set: each pair then has one image of each set, and all pairs are separated.
    extractor : PretrainedFeatureExtractor or None, default=None
        Reads and embeds the images; it is cloned, and shares its embeddings. Its `on_error` is
        ignored. None is `PretrainedFeatureExtractor()`.

    Returns
    -------
    LeakReport

    Raises
    ------
    ValueError
        If lengths differ, or for `X_test` together with `cv` or `groups`.

    Warns
    -----
    UserWarning
        If images cannot be read; they are left out.

    Notes
    -----
    Made for photographs. Small scans, such as digits, can have nearly the same pixels without
    being copies. Each image is compared with the 50 most similar ones.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> china, flower = load_sample_images().images
    >>> find_leaks([china, flower, china[::2, ::2]], [0, 1, 0], cv=[([0, 1], [2])])
    1 pair among 3 images: 1 copy.
    1 pair on both sides of a split: scores are too high. Pass report.groups to a \
StratifiedGroupKFold, which keeps such images together.
    <BLANKLINE>
    i  j  cosine  kind  split   labels  image i                       image j
    0  2   0.906  copy  across          array of shape (427, 640, 3)  array of shape (214, 320, 3)
    """
    if X_test is not None and (cv is not None or groups is not None):
        raise ValueError(
            "Got X_test together with cv or groups, but a second set is already a split; leave "
            "out either"
        )
    if X_test is None and y_test is not None:
        raise ValueError("Got y_test without X_test, the images of these labels")
    extractor = resolve_extractor(extractor).set_params(on_error="nan")
    y, groups = (_labels(X, each, extractor) for each in (y, groups))
    y_other = y if X_test is None else _labels(X_test, y_test, extractor)
    extractor.fit(X)
    ones, broken = _embed(extractor, X), list(extractor.errors_)
    others = None if X_test is None else _embed(extractor, X_test)
    broken = broken if others is None else [*broken, *extractor.errors_]
    report = compare(
        ones, others, y, y_other, cv=cv, groups=groups, threads=resolve_threads(extractor.n_jobs)
    )
    if len(report.unreadable):
        warnings.warn(
            f"Got {len(report.unreadable)} images that cannot be read, which are left out: rows "
            f"{report.unreadable[:10].tolist()}"
            + ("" if others is None else f", of X_test from {len(ones.images)} on")
            + (f". The first: {broken[0]}" if broken else ": their embeddings are NaN"),
            stacklevel=2,
        )
    return report


def compare(
    ones: EmbeddedImages,
    others: EmbeddedImages | None,
    y: np.ndarray | None,
    y_other: np.ndarray | None,
    *,
    cv: Any,
    groups: np.ndarray | None,
    threads: int,
    possible: float = POSSIBLE,
) -> LeakReport:
    """Compute the report of `find_leaks` for embedded images; see `find_pairs`."""
    both = (ones, ones if others is None else others)
    found = find_pairs(ones, others, threads=threads, possible=possible)
    kinds = _kinds(found, both)
    keep = kinds != ""
    rows, cosines, kinds = found.rows[keep], found.cosines[keep], kinds[keep]
    names = [
        (both[0].images.describe(i), both[1].images.describe(j))
        for i, j in rows[:_MAX_SHOWN_PAIRS].tolist()
    ]
    sets = [ones] if others is None else [ones, others]
    sizes = tuple(len(each.images) for each in sets)
    broken = [np.isnan(each.embeddings).any(axis=1) for each in sets]
    return LeakReport(
        pairs=np.column_stack([rows, cosines]),
        kinds=kinds,
        across=_across(rows, sizes, y, cv, groups),
        conflicts=_conflicts(rows, y, y_other),
        groups=connect(rows, sizes[0]) if others is None else None,
        n_images=tuple(int((~each).sum()) for each in broken),
        unreadable=np.flatnonzero(np.concatenate(broken)),
        _names=tuple(names),
        _images=(both[0].images, both[1].images),
    )


def _labels(X: Any, y: Any, extractor: PretrainedFeatureExtractor) -> np.ndarray | None:
    """Check that there is one label or group for each image, before any is embedded."""
    if y is None:
        return None
    labels = column_or_1d(y)
    check_consistent_length(as_images(X, image_shape=extractor.image_shape), labels)
    return labels


def _embed(extractor: PretrainedFeatureExtractor, X: Any) -> EmbeddedImages:
    return EmbeddedImages(read_images(extractor, X), extractor.transform(X))


def _kinds(found: Pairs, both: tuple[EmbeddedImages, EmbeddedImages]) -> np.ndarray:
    """Return the kind of each pair, one of `KINDS`, or an empty string."""
    same = found.correlations >= SAME
    conditions = [same & found.mirrored, same, found.cosines >= ALIKE]
    kinds = np.select(conditions, ["mirrored", "copy", "alike"], "").astype(object)
    ones, others = (each.images for each in both)
    for place in np.flatnonzero(found.correlations >= _MAYBE_IDENTICAL):
        i, j = found.rows[place].tolist()
        if np.array_equal(ones[i], others[j]):
            kinds[place] = "identical"
    return kinds


def _across(
    rows: np.ndarray,
    sizes: tuple[int, ...],
    y: np.ndarray | None,
    cv: Any,
    groups: np.ndarray | None,
) -> np.ndarray:
    """Return which pairs are separated."""
    if len(sizes) == 2:
        return np.ones(len(rows), dtype=bool)
    if cv is None:
        if groups is None:
            return np.zeros(len(rows), dtype=bool)
        return groups[rows[:, 0]] != groups[rows[:, 1]]
    across = np.zeros(len(rows), dtype=bool)
    for train, test in check_cv(cv, y, classifier=True).split(np.empty((sizes[0], 1)), y, groups):
        side = np.zeros(sizes[0], dtype=np.int8)
        side[train], side[test] = 1, -1
        across |= side[rows[:, 0]] * side[rows[:, 1]] < 0
    return across


def _conflicts(rows: np.ndarray, y: np.ndarray | None, y_other: np.ndarray | None) -> np.ndarray:
    """Return which pairs have different labels."""
    if y is None or y_other is None:
        return np.zeros(len(rows), dtype=bool)
    one, other = y[rows[:, 0]], y_other[rows[:, 1]]
    known = ~(are_missing(one) | are_missing(other))
    differ = np.zeros(len(rows), dtype=bool)
    differ[known] = one[known] != other[known]
    return differ


def _pairs(count: int) -> str:
    return f"{count:,} pair" + ("s" if count != 1 else "")
