"""Duplicate images: identical, resized, recompressed, mirrored or slightly cropped.

Embeddings select the candidates, and a comparison of pixels decides.

Shapes: N images, D features, P pairs, W windows, S x S pixels of a thumbnail, T x T of a window.
"""

from __future__ import annotations

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
from sktransfer.utils.errors import warn_user

# The pixels of two images are compared if the cosine of their embeddings is at least this.
MIN_CANDIDATE_COSINE = 0.5
# Each image is compared with at most this many images, the most similar ones.
_MAX_CANDIDATES = 50
# Two images are duplicates if the correlation of their pixels is at least this.
MIN_DUPLICATE_CORRELATION = 0.95

# Images whose shorter side is below this many pixels, such as scanned digits, can reach this
# correlation without being duplicates.
MAX_SCAN_SIDE = 48

# The mirrored image must fit better by this margin, because some images are symmetric.
_MIRROR_MARGIN = 0.01

# A window is blank, and matches nothing, if the norm of its pixels minus their mean is below this.
_BLANK_NORM = 10.0

# Widths and heights of the windows relative to the image, and their positions: start, center, end.
_SCALES, _POSITIONS = (0.95, 0.9), (-1, 0, 1)

_THUMBNAIL_SIDE, _WINDOW_SIDE = 64, 32
_THUMBNAIL = Preprocessing(
    resize=(_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), crop=(_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
)

# Rows whose cosines, and pairs whose windows, are in memory at once.
_ROWS_PER_CHUNK, _PAIRS_PER_CHUNK = 128, 64


class EmbeddedImages(NamedTuple):
    """Images and their embeddings.

    Parameters
    ----------
    images : Images of length N
    embeddings : ndarray of shape (N, D)
        The row of an image that cannot be read is NaN.
    """

    images: Images
    embeddings: np.ndarray


class Pairs(NamedTuple):
    """Pairs of images, the most similar ones first.

    Parameters
    ----------
    rows : ndarray of shape (P, 2)
    cosines : ndarray of shape (P,)
        Cosines of their embeddings.
    correlations : ndarray of shape (P,)
        Best correlation of their pixels, -1 to 1.
    mirrored : ndarray of shape (P,)
        Whether one image fits the other best when it is mirrored.
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
    min_cosine: float = MIN_CANDIDATE_COSINE,
) -> Pairs:
    """Return pairs of images with similar embeddings, after a comparison of their pixels.

    Parameters
    ----------
    ones : EmbeddedImages
    others : EmbeddedImages or None
        Images for the second of each pair; None finds pairs within `ones`.
    threads : int
        Threads that decode images.
    min_cosine : float
        Minimum cosine of embeddings for a comparison of pixels.

    Returns
    -------
    Pairs
        All candidates, but at most the 50 most similar ones of each image.
    """
    rows, cosines = _candidates(
        ones.embeddings, None if others is None else others.embeddings, min_cosine
    )
    first = _thumbnails(ones.images, rows[:, 0] if others else rows.ravel(), threads)
    second = _thumbnails(others.images, rows[:, 1], threads) if others else first
    correlations, mirrored = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for start in range(0, len(rows), _PAIRS_PER_CHUNK):
        chunk = slice(start, start + _PAIRS_PER_CHUNK)
        unique, indices = np.unique(rows[chunk, 0], return_inverse=True)
        matches = match(
            torch.stack([first[row] for row in unique.tolist()]),
            torch.stack([second[row] for row in rows[chunk, 1].tolist()]),
            torch.from_numpy(indices),
        )
        correlations[chunk], mirrored[chunk] = (tensor.numpy() for tensor in matches)
    order = np.argsort(-cosines, kind="stable")
    return Pairs(rows[order], cosines[order], correlations[order], mirrored[order])


def _candidates(
    ones: np.ndarray, others: np.ndarray | None, min_cosine: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows (P, 2) with similar embeddings, and their cosines (P,)."""
    left = _unit(ones)
    right = left if others is None else _unit(others)
    rows, cosines = [np.empty((0, 2), dtype=int)], [np.empty(0)]
    for start in range(0, len(left), _ROWS_PER_CHUNK):
        products = left[start : start + _ROWS_PER_CHUNK] @ right.T
        if others is None:  # each pair once
            products[np.tri(len(products), len(right), start, dtype=bool)] = -1
        n_best = min(_MAX_CANDIDATES, len(right))
        best = np.argpartition(products, -n_best, axis=1)[:, -n_best:]
        values = np.take_along_axis(products, best, axis=1)
        i, j = np.nonzero(values >= min_cosine)
        rows.append(np.stack([start + i, best[i, j]], axis=1))
        cosines.append(values[i, j].astype(float))
    return np.concatenate(rows), np.concatenate(cosines)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.nan_to_num(embeddings.astype(np.float32))
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(norms > 0, norms, 1)


def _thumbnails(images: Images, rows: np.ndarray, threads: int) -> dict[int, torch.Tensor]:
    """Return the thumbnails (3, S, S), uint8, of some images by row."""
    reader = ImageReader(Views(images, _THUMBNAIL), threads, ImageErrors("raise"))
    return {
        row: pixels
        for batch_rows, batch in reader.batches(np.unique(rows).tolist(), _PAIRS_PER_CHUNK)
        for row, pixels in zip(batch_rows, batch, strict=True)
    }


class Match(NamedTuple):
    """Result of `match`; see `Pairs` for its fields."""

    correlations: torch.Tensor
    mirrored: torch.Tensor


def match(ones: torch.Tensor, others: torch.Tensor, partners: torch.Tensor | None = None) -> Match:
    """Compare images with their partners, pixel by pixel.

    Each whole image is compared with windows of the other image that are 0.9 to 1 times as wide
    and high, unchanged and mirrored. The best match counts.

    Parameters
    ----------
    ones, others : Tensor of shape (P, 3, S, S)
        Thumbnails, uint8.
    partners : Tensor of shape (P,)
        Index in `ones` of the partner of each of `others`; `ones` may then be of any length. None
        pairs them in order.

    Examples
    --------
    >>> thumbnails = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    >>> result = match(thumbnails, thumbnails.flip(3))
    >>> bool((result.correlations > 0.999).all()), result.mirrored.tolist()
    (True, [True, True])
    """
    left, right = _windows(ones), _windows(others)
    if partners is not None:
        left = left[partners]
    # The first window is the whole image. The windows are symmetric, so mirroring it is enough.
    plain, mirrored = (
        torch.maximum(_fit(change(left[:, 0]), right), _fit(change(right[:, 0]), left))
        for change in (torch.Tensor.contiguous, _mirror)
    )
    return Match(torch.maximum(plain, mirrored), mirrored > plain + _MIRROR_MARGIN)


def _fit(wholes: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Return the best correlation of an image (P, 3 T T) with windows (P, W, 3 T T)."""
    return torch.einsum("pd,pwd->pw", wholes, windows).amax(dim=1)


def _mirror(wholes: torch.Tensor) -> torch.Tensor:
    return wholes.view(-1, 3, _WINDOW_SIDE, _WINDOW_SIDE).flip(3).flatten(1)


def _windows(thumbnails: torch.Tensor) -> torch.Tensor:
    """Cut windows out of thumbnails, the whole image first: unit vectors (P, W, 3 T T)."""
    pixels = thumbnails.float()
    cuts = []
    for strips in _cuts():
        for rows in strips:
            strip = rows @ pixels
            cuts += [strip @ columns.T for columns in strips]
    windows = torch.stack(cuts, dim=1).flatten(2)
    return nn.functional.normalize(
        windows - windows.mean(dim=2, keepdim=True), dim=2, eps=_BLANK_NORM
    )


@cache
def _cuts() -> list[list[torch.Tensor]]:
    """Build the matrices (T, S) that cut windows out of rows and columns, a list for each scale."""
    return [
        [_cut(1.0, 0)],
        *([_cut(scale, position) for position in _POSITIONS] for scale in _SCALES),
    ]


def _cut(scale: float, position: int) -> torch.Tensor:
    """Build a matrix that averages the pixels of a window at the start (-1), center or end (1)."""
    start = (1 - scale) * (1 + position) / 2 * _THUMBNAIL_SIDE
    length = scale * _THUMBNAIL_SIDE
    edges = start + torch.linspace(0, length, _WINDOW_SIDE + 1, dtype=torch.float64)
    pixels = torch.arange(_THUMBNAIL_SIDE, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    covered = covered.clamp(min=0)
    return (covered / covered.sum(dim=1, keepdim=True)).float()


def connect(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the group number of each image; images that pairs connect share a group.

    Examples
    --------
    >>> connect(np.array([[0, 2], [2, 3]]), 5).tolist()
    [0, 1, 0, 0, 2]
    """
    edges = coo_array((np.ones(len(rows)), rows.T.astype(np.int32)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


# Minimum cosine in the check during a fit, which must be fast.
_FIT_CHECK_COSINE = 0.9


def warn_of_leak(train: EmbeddedImages, valid: EmbeddedImages, threads: int) -> None:
    """Warn of validation images that are copies of training images.

    Small scans are not checked: they can be similar without being copies.
    """
    if min(valid.images[0].shape[:2]) < MAX_SCAN_SIDE:
        return
    pairs = find_pairs(valid, train, threads=threads, min_cosine=_FIT_CHECK_COSINE)
    rows = pairs.rows[pairs.correlations >= MIN_DUPLICATE_CORRELATION]
    if len(rows):
        copy, original = valid.images.path(rows[0, 0]), train.images.path(rows[0, 1])
        example = f", such as {copy} of {original}" if copy and original else ""
        warn_user(
            f"Got {len(np.unique(rows[:, 0]))} validation images that are copies of training "
            f"images{example}, so validation scores are too optimistic. Use find_leaks to list "
            "such pairs, and its groups to keep them on the same side of a split",
        )
