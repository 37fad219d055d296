"""What pictures and labels tell before anything is trained on them.

Shapes: N pictures, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

from sktransfer.data.images import Pictures
from sktransfer.embedding.duplicates import Embedded
from sktransfer.transforms.loader import Faults, PictureReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views

# Shares of the training pictures for which the learning curve says how accurate the probe is.
_SHARES = (0.25, 0.5, 1.0)

# Pictures as the baseline sees them: so small that their pixels are few.
_SMALL = Preprocessing(resize=(16, 16), crop=(16, 16))
_BATCH = 64

# Pictures that are decoded to tell sizes, colour and contrast.
_LOOKED_AT = 200

# Colours that differ by less, of 255, are grey.
_GREY = 8


@dataclass(frozen=True)
class Evidence:
    """What was measured, with nothing trained but classifiers on embeddings.

    Parameters
    ----------
    n_pictures : int
        On how many it was measured.
    accuracy : float
        Of a linear probe on the embeddings, 0-1, mean over the folds.
    spread : float
        Standard deviation of this accuracy over the folds.
    neighbour : float
        Accuracy of the nearest neighbour's label, by the cosine of embeddings.
    pixels : float
        Accuracy of a linear classifier on the pixels themselves, at 16 x 16.
    curve : tuple of (int, float)
        Training pictures, and accuracy of the probe with so many.
    crowding : float
        Mean cosine between the embeddings of pictures of different classes: near 1 where the
        network sees the same in all of them.
    side : tuple of int
        The least, the median and the greatest shorter side, in pixels.
    grey : float
        Share of the pictures that have no colour.
    contrast : float
        Median standard deviation of a picture's brightness, 0-255.
    """

    n_pictures: int
    accuracy: float
    spread: float
    neighbour: float
    pixels: float
    curve: tuple[tuple[int, float], ...]
    crowding: float
    side: tuple[int, int, int]
    grey: float
    contrast: float


def make_probe() -> Pipeline:
    """Make the linear classifier for embeddings, unfitted.

    Each embedding gets length 1. To scale each dimension by its standard deviation, which is hard
    to tell from few pictures, cost 6 to 22 points of accuracy with 5 pictures of a class.
    """
    return make_pipeline(Normalizer(), LogisticRegression(C=30.0, max_iter=2000))


def measure(
    embedded: Embedded,
    codes: np.ndarray,
    splits: list[tuple[np.ndarray, np.ndarray]],
    *,
    seed: int,
    threads: int,
) -> Evidence:
    """Measure what can be measured on embeddings and small pictures.

    Parameters
    ----------
    embedded : Embedded
        N pictures, all of them readable.
    codes : ndarray of shape (N,)
        Class numbers, 0 to K - 1.
    splits : list of (train, test)
        Rows of each fold.
    seed : int
        Of the pictures that the learning curve leaves out.
    threads : int
        Threads that decode pictures.
    """
    embeddings = embedded.embeddings
    scores = cross_val_score(make_probe(), embeddings, codes, cv=splits)
    pixels = LogisticRegression(max_iter=2000)
    nearest = KNeighborsClassifier(1, metric="cosine")
    side, grey, contrast = _look(embedded.pictures)
    return Evidence(
        n_pictures=len(codes),
        accuracy=float(scores.mean()),
        spread=float(scores.std(ddof=1)),
        neighbour=float(cross_val_score(nearest, embeddings, codes, cv=splits).mean()),
        pixels=float(
            cross_val_score(pixels, _small(embedded.pictures, threads), codes, cv=splits).mean()
        ),
        curve=_curve(embeddings, codes, splits, seed),
        crowding=crowding(embeddings, codes),
        side=side,
        grey=grey,
        contrast=contrast,
    )


def crowding(embeddings: np.ndarray, codes: np.ndarray) -> float:
    """Give the mean cosine between pictures of different classes, each pair of classes alike.

    Examples
    --------
    >>> crowding(np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]]), np.array([0, 0, 1]))
    0.6
    """
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(lengths > 0, lengths, 1)
    means = np.stack([unit[codes == code].mean(axis=0) for code in range(codes.max() + 1)])
    cosines = means @ means.T
    return float(cosines[~np.eye(len(means), dtype=bool)].mean())


def _curve(
    embeddings: np.ndarray, codes: np.ndarray, splits: list[Any], seed: int
) -> tuple[tuple[int, float], ...]:
    """Score the probe with fewer training pictures, the same share of each class."""
    points: dict[int, float] = {}
    for share in _SHARES:
        fewer = [(_thin(train, codes, share, seed), test) for train, test in splits]
        count = round(float(np.mean([len(train) for train, _ in fewer])))
        points[count] = float(cross_val_score(make_probe(), embeddings, codes, cv=fewer).mean())
    return tuple(points.items())


def _thin(rows: np.ndarray, codes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Leave pictures out, but at least one of each class in."""
    rows = np.random.default_rng(seed).permutation(rows)
    kept = []
    for code in np.unique(codes[rows]):
        own = rows[codes[rows] == code]
        kept.append(own[: max(1, round(share * len(own)))])
    return np.concatenate(kept)


def _small(pictures: Pictures, threads: int) -> np.ndarray:
    """Squeeze pictures to rows of few pixels, float32, 0-1."""
    rows = np.empty((len(pictures), 3 * _SMALL.side**2), dtype=np.float32)
    reader = PictureReader(Views(pictures, _SMALL), threads, Faults("raise"))
    for found, batch in reader.batches(range(len(pictures)), _BATCH):
        rows[found] = batch.flatten(1).numpy() / 255
    return rows


def _look(pictures: Pictures) -> tuple[tuple[int, int, int], float, float]:
    """Give sides, share of grey pictures, and contrast, of pictures from everywhere."""
    count = min(len(pictures), _LOOKED_AT)
    chosen = [pictures[int(row)] for row in np.linspace(0, len(pictures) - 1, count)]
    sides = [min(picture.shape[:2]) for picture in chosen]
    spans = [np.ptp(picture.astype(np.int16), axis=2).max() for picture in chosen]
    return (
        (min(sides), int(np.median(sides)), max(sides)),
        float(np.mean([span < _GREY for span in spans])),
        float(np.median([picture.mean(axis=2).std() for picture in chosen])),
    )
