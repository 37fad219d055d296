"""Duplicate images: identical, resized, recompressed, mirrored or slightly cropped.

Embeddings select the candidates, and pixels decide.

Shapes: N images, D features, P pairs, W windows, S x S pixels of a thumbnail, T x T of a window.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from sktransfer.data.images import Images
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views

# Pixels are compared if the cosine of embeddings is at least this, with so many images at most: the
# most similar ones.
POSSIBLE, _MOST = 0.5, 50
# Two images are duplicates if the correlation of their pixels is at least this.
SAME = 0.95

# Images with a shorter side of fewer pixels, such as scans of digits, can correlate as much
# without being duplicates.
SCAN = 48

# The mirrored image must fit better by this much, as some images are symmetric.
_CLEARLY = 0.01

# A window whose pixels differ less than this from their mean, as a vector, is blank, and matches
# nothing.
_BLANK = 10.0

# How much of the width and of the height a crop may leave, and where it may lie.
_SCALES, _PLACES = (0.95, 0.9), (-1, 0, 1)

_THUMBNAIL_SIDE, _WINDOW = 64, 32
_THUMBNAIL = Preprocessing(
    resize=(_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), crop=(_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
)

# Rows whose cosines, and pairs whose windows, are in memory at once.
_ROWS, _PAIRS = 128, 64


class EmbeddedImages(NamedTuple):
    """Images and their embeddings.

    Parameters
    ----------
    images : Images of length N
    embeddings : ndarray of shape (N, D)
        A row of NaN for an image that cannot be read.
    """

    images: Images
    embeddings: np.ndarray


class Pairs(NamedTuple):
    """Pairs of images, the most similar ones first.

    Parameters
    ----------
    rows : ndarray of shape (P, 2)
    cosines : ndarray of shape (P,)
        Of their embeddings.
    correlations : ndarray of shape (P,)
        Best correlation of their pixels, -1 to 1.
    mirrored : ndarray of shape (P,)
        Whether they fit best if one of them is mirrored.
    """

    rows: np.ndarray
    cosines: np.ndarray
    correlations: np.ndarray
    mirrored: np.ndarray


def find_pairs(
    ones: EmbeddedImages,
    others: EmbeddedImages | None = None,
    *,
    threads: int = 1,
    possible: float = POSSIBLE,
) -> Pairs:
    """Return pairs of similar images, and compare their pixels.

    Parameters
    ----------
    ones : EmbeddedImages
    others : Embedded or None
        The second of each pair is one of these; None looks for pairs within `ones`.
    threads : int
        Threads that decode images.
    possible : float
        Minimum cosine of embeddings for a comparison of pixels.

    Returns
    -------
    Pairs
        All candidates, but no more than the 50 best of each image.
    """
    rows, cosines = _possible(
        ones.embeddings, None if others is None else others.embeddings, possible
    )
    first = _thumbnails(ones.images, rows[:, 0] if others else rows.ravel(), threads)
    second = _thumbnails(others.images, rows[:, 1], threads) if others else first
    correlations, mirrored = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for start in range(0, len(rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        unique, place = np.unique(rows[part, 0], return_inverse=True)
        found = match(
            torch.stack([first[row] for row in unique.tolist()]),
            torch.stack([second[row] for row in rows[part, 1].tolist()]),
            torch.from_numpy(place),
        )
        correlations[part], mirrored[part] = (each.numpy() for each in found)
    order = np.argsort(-cosines, kind="stable")
    return Pairs(rows[order], cosines[order], correlations[order], mirrored[order])


def _possible(
    ones: np.ndarray, others: np.ndarray | None, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (P, 2) whose embeddings are alike, and their cosines (P,)."""
    left = _unit(ones)
    right = left if others is None else _unit(others)
    rows, cosines = [np.empty((0, 2), dtype=int)], [np.empty(0)]
    for start in range(0, len(left), _ROWS):
        found = left[start : start + _ROWS] @ right.T
        if others is None:  # each pair once
            found[np.tri(len(found), len(right), start, dtype=bool)] = -1
        best = np.argpartition(found, -min(_MOST, len(right)), axis=1)[:, -_MOST:]
        values = np.take_along_axis(found, best, axis=1)
        i, place = np.nonzero(values >= least)
        rows.append(np.stack([start + i, best[i, place]], axis=1))
        cosines.append(values[i, place].astype(float))
    return np.concatenate(rows), np.concatenate(cosines)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.nan_to_num(embeddings.astype(np.float32))
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(norms > 0, norms, 1)


def _thumbnails(images: Images, rows: np.ndarray, threads: int) -> dict[int, torch.Tensor]:
    """Resize some images to (3, S, S), uint8."""
    reader = ImageReader(Views(images, _THUMBNAIL), threads, ImageErrors("raise"))
    batches = reader.batches(np.unique(rows).tolist(), _PAIRS)
    return {
        row: pixels for found, batch in batches for row, pixels in zip(found, batch, strict=True)
    }


class Match(NamedTuple):
    """How much images are the same as their partners: see `Pairs`."""

    correlations: torch.Tensor
    mirrored: torch.Tensor


def match(ones: torch.Tensor, others: torch.Tensor, place: torch.Tensor | None = None) -> Match:
    """Compare images with their partners, pixel by pixel.

    Each whole image is laid upon windows of the other, 0.9 to 1 times as wide and high, as it is
    and mirrored; the best place counts.

    Parameters
    ----------
    ones, others : Tensor of shape (P, 3, S, S)
        Thumbnails, uint8.
    place : Tensor of shape (P,)
        If the partner of each of `others` lies in `ones`, which may then be of any length. None
        takes them as they come.

    Examples
    --------
    >>> thumbnails = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    >>> found = match(thumbnails, thumbnails.flip(3))
    >>> bool((found.correlations > 0.999).all()), found.mirrored.tolist()
    (True, [True, True])
    """
    mine, theirs = _windows(ones), _windows(others)
    if place is not None:
        mine = mine[place]
    # To mirror the whole image is to mirror the windows.
    plain, mirrored = (
        torch.maximum(_fit(turned(mine[:, 0]), theirs), _fit(turned(theirs[:, 0]), mine))
        for turned in (torch.Tensor.contiguous, _mirrored)
    )
    return Match(torch.maximum(plain, mirrored), mirrored > plain + _CLEARLY)


def _fit(wholes: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Return the best correlation of an image (P, 3 T T) with windows (P, W, 3 T T)."""
    return torch.einsum("pd,pwd->pw", wholes, windows).amax(dim=1)


def _mirrored(wholes: torch.Tensor) -> torch.Tensor:
    return wholes.view(-1, 3, _WINDOW, _WINDOW).flip(3).flatten(1)


def _windows(thumbnails: torch.Tensor) -> torch.Tensor:
    """Cut windows out, the first of which is the whole: unit vectors (P, W, 3 T T)."""
    pixels = thumbnails.float()
    cuts = []
    for strips in _cuts():
        for rows in strips:
            strip = rows @ pixels
            cuts += [strip @ columns.T for columns in strips]
    windows = torch.stack(cuts, dim=1).flatten(2)
    return nn.functional.normalize(windows - windows.mean(dim=2, keepdim=True), dim=2, eps=_BLANK)


@cache
def _cuts() -> list[list[torch.Tensor]]:
    """Build the matrices (T, S) that cut windows of one scale out of rows and columns."""
    return [[_cut(1.0, 0)], *([_cut(scale, place) for place in _PLACES] for scale in _SCALES)]


def _cut(scale: float, place: int) -> torch.Tensor:
    """Build a matrix that averages over a window at one end, in the middle, or at the other end."""
    start = (1 - scale) * (1 + place) / 2 * _THUMBNAIL_SIDE
    edges = start + torch.linspace(0, scale * _THUMBNAIL_SIDE, _WINDOW + 1, dtype=torch.float64)
    pixels = torch.arange(_THUMBNAIL_SIDE, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    covered = covered.clamp(min=0)
    return (covered / covered.sum(dim=1, keepdim=True)).float()


def connect(rows: np.ndarray, count: int) -> np.ndarray:
    """Return group numbers: images that pairs connect have the same one.

    Examples
    --------
    >>> connect(np.array([[0, 2], [2, 3]]), 5).tolist()
    [0, 1, 0, 0, 2]
    """
    edges = coo_array((np.ones(len(rows)), rows.T.astype(np.int32)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


# Minimum cosine for the check in a fit, which must cost little.
_FIT_CHECK_COSINE = 0.9


def warn_of_leak(train: EmbeddedImages, valid: EmbeddedImages, threads: int) -> None:
    """Warn of validation images that are copies of training images.

    Small scans are not checked: they can be alike without being copies.
    """
    if min(valid.images[0].shape[:2]) < SCAN:
        return
    found = find_pairs(valid, train, threads=threads, possible=_FIT_CHECK_COSINE)
    rows = found.rows[found.correlations >= SAME]
    if len(rows):
        names = valid.images.describe(rows[0, 0]), train.images.describe(rows[0, 1])
        warnings.warn(
            f"Got {len(np.unique(rows[:, 0]))} validation images that are copies of training "
            f"images, such as {names[0]} of {names[1]}: what is chosen by them looks better than "
            "it is. find_leaks shows such pairs, and its groups keep them on one side of a split",
            stacklevel=2,
        )
