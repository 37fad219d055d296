"""find_leaks: duplicate images on both sides of a split, or with different labels.

Shapes: N images, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sktransfer.data.decoding import encode_jpeg
from sktransfer.data.images import Images, as_images
from sktransfer.data.labels import as_labels, check_not_missing, check_one_per_image
from sktransfer.data.validation import check_not_swapped
from sktransfer.diagnostics.extraction import read_images, resolve_extractor
from sktransfer.diagnostics.splits import check_splits
from sktransfer.embedding.duplicates import (
    MIN_CANDIDATE_COSINE,
    MIN_DUPLICATE_CORRELATION,
    EmbeddedImages,
    Pairs,
    connect,
    find_pairs,
)
from sktransfer.extractor import PretrainedFeatureExtractor, check_extractor
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import ImageError, list_errors, warn_user
from sktransfer.utils.runtime import resolve_threads
from sktransfer.utils.tables import Html, counted, html_image, html_list, html_table, text_table

KINDS = ("identical", "copy", "mirrored", "alike")

# Two images with different pixels are "alike" if the cosine of their embeddings is at least this.
MIN_ALIKE_COSINE = 0.95

# All pixels are compared if the correlation of two thumbnails is at least this.
_MIN_IDENTICAL_CORRELATION = 0.9999

# Maximum number of pairs in the table of a report, and the side of their images in pixels.
_MAX_SHOWN_PAIRS = 20
_SHOWN_SIDE = 128
_SHOWN_SIZE = Preprocessing(resize=_SHOWN_SIDE)


@dataclass(frozen=True, repr=False, eq=False)
class LeakReport:
    """Result of `find_leaks`, shown as a table; in a notebook, with the images.

    Parameters
    ----------
    pairs : ndarray of shape (P, 2)
        Rows i and j of two images; int, the most similar pair first. With two sets, i is a row of
        `X` and j a row of `X_test`.
    cosines : ndarray of shape (P,)
        Cosine of the embeddings of the two images, float64.
    kinds : ndarray of shape (P,)
        `"identical"` (the same pixels), `"copy"` (resized, recompressed or cropped), `"mirrored"`,
        or `"alike"` (different pixels with a similar embedding, such as two shots of one scene).
    across : ndarray of shape (P,)
        Whether the two images are separated by a split of `cv`, or by different groups or sets.
    conflicts : ndarray of shape (P,)
        Whether the two images have different labels.
    groups : ndarray of shape (N,) or None
        Group numbers, the same for images that pairs connect. Pass them as `groups` to a
        `GroupKFold` or `StratifiedGroupKFold`, which keeps these images together. None for two
        sets.
    n_images : tuple of int
        Number of images that were compared, for each set.
    unreadable : ndarray of int
        Rows of broken images, which were left out; rows of a second set continue after the first.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_sample_images
    >>> china, flower = load_sample_images().images
    >>> report = find_leaks([china, flower, china[:, ::-1]], ["a", "b", "c"])
    >>> report.pairs.tolist(), report.kinds.tolist(), report.conflicts.tolist()
    ([[0, 2]], ['mirrored'], [True])
    """

    pairs: np.ndarray
    cosines: np.ndarray
    kinds: np.ndarray
    across: np.ndarray
    conflicts: np.ndarray
    groups: np.ndarray | None
    n_images: tuple[int, ...]
    unreadable: np.ndarray
    _is_split: bool
    _paths: tuple[tuple[str | None, str | None], ...]
    _images: tuple[Images, Images]

    @property
    def summary(self) -> list[str]:
        """The results, one sentence each."""
        sets = " and ".join(f"{count:,}" for count in self.n_images)
        if not len(self.pairs):
            sentences = [f"No duplicates or near-duplicates among {sets} images."]
        else:
            counts = {kind: int((self.kinds == kind).sum()) for kind in KINDS}
            by_kind = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
            sentences = [f"{counted(len(self.pairs), 'pair')} among {sets} images: {by_kind}."]
        if self.across.any():
            remedy = (
                "Remove one image of each pair."
                if self.groups is None
                else "Pass report.groups to a StratifiedGroupKFold, which keeps such images "
                "together."
            )
            count = counted(self.across.sum(), "pair")
            sentences.append(
                f"{count} on both sides of a split, so scores are too optimistic. {remedy}"
            )
        elif self._is_split and len(self.pairs):
            pairs = "This pair is not" if len(self.pairs) == 1 else "None of these pairs is"
            sentences.append(f"{pairs} on both sides of a split.")
        if self.conflicts.any():
            sentences.append(f"{counted(self.conflicts.sum(), 'pair')} with different labels.")
        if len(self.unreadable):
            count = counted(len(self.unreadable), "image")
            sentences.append(f"{count} could not be read and left out.")
        return sentences

    def __repr__(self) -> str:
        lines = [*self.summary]
        if len(self.pairs):
            lines += ["", text_table(*self._table())]
        return "\n".join([*lines, *self._note()])

    def _repr_html_(self) -> str:
        parts = [html_list([*self.summary, *self._note()])]
        if len(self.pairs):
            header, rows, left = self._table()
            images = list(map(self._show, self._shown_rows(), self._names()))
            rows = [[image, *row] for image, row in zip(images, rows, strict=True)]
            parts.append(html_table(["", *header], rows, [0, *(1 + column for column in left)]))
        return "".join(parts)

    def _table(self) -> tuple[list[str], list[list[str]], list[int]]:
        """Build the table of pairs, without columns that have no entries."""
        rows, names = self._shown_rows(), self._names()
        images = {"image i": [name for name, _ in names], "image j": [name for _, name in names]}
        results = {
            "cosine": [f"{cosine:.3f}" for cosine in self.cosines[: len(rows)]],
            "kind": [str(kind) for kind in self.kinds[: len(rows)]],
            "split": ["across" if across else "" for across in self.across[: len(rows)]],
            "labels": ["differ" if conflict else "" for conflict in self.conflicts[: len(rows)]],
        }
        if any(path for paths in self._paths for path in paths):
            numbers = {"i": [str(i) for i, _ in rows], "j": [str(j) for _, j in rows]}
            columns = {**numbers, **results, **images}
        else:  # the names of the images are their rows
            columns = {**images, **results}
        columns = {title: cells for title, cells in columns.items() if any(cells)}
        left = [i for i, title in enumerate(columns) if title not in ("i", "j", "cosine")]
        return list(columns), [list(line) for line in zip(*columns.values(), strict=True)], left

    def _shown_rows(self) -> list[list[int]]:
        return self.pairs[:_MAX_SHOWN_PAIRS].tolist()

    def _names(self) -> list[tuple[str, str]]:
        """Return the names of the shown images: the path if there is one, else the row."""
        first, second = ("", "") if len(self.n_images) == 1 else (" of X", " of X_test")
        return [
            (path_i or f"row {i}{first}", path_j or f"row {j}{second}")
            for (i, j), (path_i, path_j) in zip(self._shown_rows(), self._paths, strict=True)
        ]

    def _note(self) -> list[str]:
        rest = len(self.pairs) - _MAX_SHOWN_PAIRS
        return [f"and {rest:,} more in report.pairs"] if rest > 0 else []

    def _show(self, rows: list[int], names: tuple[str, str]) -> Html:
        """Build the cell with the two images of a pair."""
        parts: list[str] = []
        for images, row, name in zip(self._images, rows, names, strict=True):
            try:
                pixels = _SHOWN_SIZE.resized(images.decode(row, _SHOWN_SIDE))
                parts.append(html_image(encode_jpeg(pixels), name))
            except ImageError as error:  # the file was deleted after the comparison
                parts.append(html_list([str(error)]))
        # Notebooks set images to display: block, which would stack them.
        cells = "".join(f"<div>{part}</div>" for part in parts)
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
    """Compute pairs of duplicate images, and check whether they cross a split or differ in labels.

    Images whose embeddings have a cosine of at least 0.5 are compared pixel by pixel as
    thumbnails, also mirrored and cropped by up to a tenth; they are copies if the correlation is at
    least 0.95. Other images are alike if the cosine is at least 0.95. With these thresholds 0.98 or
    more of the resized, recompressed, mirrored or cropped copies of 432 photographs were found, and
    0.96 or more of the pairs found were such copies.

    Parameters
    ----------
    X : images in any container that `PretrainedFeatureExtractor` takes
    y : array-like of shape (N,), default=None
        Labels. Pairs with different labels are conflicts; a missing label never conflicts.
    cv : int, splitter, iterable of (train, test) or None, default=None
        Splits. A pair is separated if a split has one image in train and the other in test.
    groups : array-like of shape (N,), default=None
        Groups for `cv`. If `cv` is None, a pair is separated if its images have different groups.
    X_test, y_test : images and labels, default=None
        A second set. Each pair then has one image from each set, and all pairs are separated.
    extractor : PretrainedFeatureExtractor or None, default=None
        Reads and embeds the images. It is cloned, but its cache is shared. Its `on_error` is
        ignored. None is `PretrainedFeatureExtractor()`.

    Returns
    -------
    LeakReport

    Raises
    ------
    ValueError
        If lengths differ, if groups are missing, if a parameter of the extractor or a split of `cv`
        is invalid, or if `X_test` is passed together with `cv` or `groups`; before any image is
        embedded.

    Warns
    -----
    UserWarning
        If images cannot be read; they are left out. Names the first ten.

    Notes
    -----
    The thresholds are chosen for photographs. Small scans, such as digits, can have nearly the same
    pixels without being copies. Each image is compared with the 50 most similar ones.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> china, flower = load_sample_images().images
    >>> find_leaks([china, flower, china[::2, ::2]], [0, 1, 0], cv=[([0, 1], [2])])
    1 pair among 3 images: 1 copy.
    1 pair on both sides of a split, so scores are too optimistic. Pass report.groups to a \
StratifiedGroupKFold, which keeps such images together.
    <BLANKLINE>
    image i  image j  cosine  kind  split
    row 0    row 2     0.906  copy  across
    """
    if X_test is not None and (cv is not None or groups is not None):
        raise ValueError(
            "Got X_test together with cv or groups, but expected only one of them, because a "
            "second set is already a split; leave out X_test, or cv and groups"
        )
    if X_test is None and y_test is not None:
        raise ValueError("Got y_test without X_test; pass the images of these labels as X_test")
    check_not_swapped(X, y)
    extractor = resolve_extractor(extractor).set_params(on_error="nan")
    check_extractor(extractor)
    y = _check_labels("y", y, X, extractor)
    if groups is not None:
        groups = check_not_missing(_check_labels("groups", groups, X, extractor), "groups")
    splits = None
    if cv is not None:
        n_images = len(as_images(X, image_shape=extractor.image_shape))
        splits = check_splits(cv, n_images, _stratified(y), groups)
    second_y = y if X_test is None else _check_labels("y_test", y_test, X_test, extractor)
    extractor.fit(X)
    first, errors = _embed(extractor, read_images(extractor, X)), list(extractor.errors_)
    second = None
    if X_test is not None:
        second = _embed(extractor, read_images(extractor, X_test).of_argument("X_test"))
        errors += extractor.errors_
    threads = resolve_threads(extractor.n_jobs)
    report = compare(first, second, y, second_y, splits=splits, groups=groups, threads=threads)
    if len(report.unreadable):
        start = "" if second is None else f" (those of X_test begin at {len(first.images)})"
        reasons = list_errors(errors) if errors else ". Their embeddings are NaN"
        warn_user(
            f"Got {counted(len(report.unreadable), 'image')} that cannot be read; the report "
            f"leaves them out, and its attribute unreadable lists all of their rows{start}{reasons}"
        )
    return report


def compare(
    first: EmbeddedImages,
    second: EmbeddedImages | None,
    y: np.ndarray | None,
    second_y: np.ndarray | None,
    *,
    splits: list[tuple[np.ndarray, np.ndarray]] | None,
    groups: np.ndarray | None,
    threads: int,
    min_cosine: float = MIN_CANDIDATE_COSINE,
) -> LeakReport:
    """Compute the report of `find_leaks` for embedded images; see `find_pairs`."""
    pairs = find_pairs(first, second, threads=threads, min_cosine=min_cosine)
    sets = [first] if second is None else [first, second]
    images = (sets[0].images, sets[-1].images)
    kinds = _kinds(pairs, images)
    reported = kinds != ""
    rows, kinds = pairs.rows[reported], kinds[reported]
    sizes = tuple(len(embedded.images) for embedded in sets)
    unreadable = [np.isnan(embedded.embeddings).any(axis=1) for embedded in sets]
    return LeakReport(
        pairs=rows,
        cosines=pairs.cosines[reported],
        kinds=kinds,
        across=_across(rows, sizes, splits, groups),
        conflicts=_conflicts(rows, y, second_y),
        groups=connect(rows, sizes[0]) if second is None else None,
        n_images=tuple(int((~mask).sum()) for mask in unreadable),
        unreadable=np.flatnonzero(np.concatenate(unreadable)),
        _is_split=not (second is None and splits is None and groups is None),
        _paths=tuple(
            (images[0].path(i), images[1].path(j)) for i, j in rows[:_MAX_SHOWN_PAIRS].tolist()
        ),
        _images=images,
    )


def _check_labels(
    name: str, y: Any, X: Any, extractor: PretrainedFeatureExtractor
) -> np.ndarray | None:
    """Check that `y` has an entry for each image, None if missing, before images are embedded."""
    if y is None:
        return None
    check_one_per_image(name, y, as_images(X, image_shape=extractor.image_shape))
    return as_labels(y)[0]


def _embed(extractor: PretrainedFeatureExtractor, images: Images) -> EmbeddedImages:
    return EmbeddedImages(images, extractor.transform(images))


def _kinds(pairs: Pairs, images: tuple[Images, Images]) -> np.ndarray:
    """Return the kind of each pair, one of `KINDS`, or an empty string for no duplicates."""
    same = pairs.correlations >= MIN_DUPLICATE_CORRELATION
    conditions = [same & pairs.mirrored, same, pairs.cosines >= MIN_ALIKE_COSINE]
    kinds = np.select(conditions, ["mirrored", "copy", "alike"], "").astype(object)
    for pair in np.flatnonzero(pairs.correlations >= _MIN_IDENTICAL_CORRELATION):
        i, j = pairs.rows[pair].tolist()
        if np.array_equal(images[0][i], images[1][j]):
            kinds[pair] = "identical"
    return kinds


def _across(
    rows: np.ndarray,
    sizes: tuple[int, ...],
    splits: list[tuple[np.ndarray, np.ndarray]] | None,
    groups: np.ndarray | None,
) -> np.ndarray:
    """Return which pairs are separated."""
    if len(sizes) == 2:
        return np.ones(len(rows), dtype=bool)
    if splits is None:
        if groups is None:
            return np.zeros(len(rows), dtype=bool)
        return groups[rows[:, 0]] != groups[rows[:, 1]]
    across = np.zeros(len(rows), dtype=bool)
    for train, test in splits:
        side = np.zeros(sizes[0], dtype=np.int8)
        side[train], side[test] = 1, -1
        across |= side[rows[:, 0]] * side[rows[:, 1]] < 0
    return across


def _conflicts(rows: np.ndarray, y: np.ndarray | None, second_y: np.ndarray | None) -> np.ndarray:
    """Return which pairs have different labels."""
    if y is None or second_y is None:
        return np.zeros(len(rows), dtype=bool)
    left, right = y[rows[:, 0]], second_y[rows[:, 1]]
    has_labels = ~(as_labels(left)[1] | as_labels(right)[1])
    differ = np.zeros(len(rows), dtype=bool)
    differ[has_labels] = left[has_labels] != right[has_labels]
    return differ


def _stratified(y: np.ndarray | None) -> np.ndarray | None:
    """Return labels by which splits can be stratified: missing labels are a class of their own."""
    if y is None or not (missing := as_labels(y)[1]).any():
        return y
    codes = np.full(len(y), -1)
    codes[~missing] = np.unique(y[~missing].astype(str), return_inverse=True)[1]
    return codes
