"""recommend_strategy: which of the four cases a set of images is, and what to do.

Shapes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_consistent_length, column_or_1d

from sktransfer.classifier import FineTunedImageClassifier
from sktransfer.data.decoding import encode_jpeg
from sktransfer.data.images import Images, as_images
from sktransfer.data.labels import check_labels
from sktransfer.diagnostics.cost import Cost, estimate_cost
from sktransfer.diagnostics.data_warnings import find_data_warnings
from sktransfer.diagnostics.leaks import ALIKE, LeakReport, compare
from sktransfer.diagnostics.probes import ProbeResults, make_probe, measure
from sktransfer.diagnostics.ranking import make_folds
from sktransfer.embedding.duplicates import POSSIBLE, EmbeddedImages
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.finetuning.fit_inputs import draw_seed
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.runtime import resolve_threads
from sktransfer.utils.tables import html_image, html_list, html_table, text_table

# Threshold of the mean inter-class cosine above which images are different from those of the
# weights, and of the mean number of images a class above which they are many. The sets on which
# these were chosen, and the others on which they were tested, are in benchmarks/_sets.py.
DIFFERENT, MANY = 0.45, 10

# What to do in each case: many images, different ones.
CHOICES = {
    (False, False): "frozen",
    (True, False): "staged",
    (False, True): "full",
    (True, True): "full",
}

# What each strategy is called.
STRATEGIES = {
    "frozen": "a linear classifier on frozen embeddings",
    "staged": "solve the head, then tune the last two blocks",
    "full": "solve the head, then tune all blocks",
    "scratch": "train all blocks from random weights",
}

# Why each strategy.
_WHY = {
    "frozen": "So few photographs are classified as well without tuning, which takes seconds.",
    "staged": "The network knows what to look for; its last blocks are fitted to these classes.",
    "full": "What the first blocks look for in photographs has to change, so all blocks are tuned.",
    "scratch": "Got weights=None: there is nothing to keep.",
}

# Of all blocks: as fast as the last one, three times the default, and for longer. Chosen on digits
# alone.
_FAST = {"lr": 3e-3, "lr_decay": 1.0, "max_epochs": 10}

# Images that are measured at most, and of each class at least, where it has so many.
_MEASURED, _OF_EACH = 2000, 10

# Images that the report shows, one of a class.
_SHOWN, _SIDE = 10, 96
_GALLERY = Preprocessing(resize=_SIDE)


@dataclass(frozen=True, repr=False, eq=False)
class StrategyReport:
    """What `recommend_strategy` found; it shows as text, in a notebook as a page.

    Parameters
    ----------
    many : bool
        Whether there are many images of a class.
    different : bool
        Whether they are unlike those that the weights were made for.
    strategy : {"frozen", "staged", "full", "scratch"}
        What to do: a linear classifier on frozen embeddings; fine-tuning of the last two blocks,
        or of all of them; training from random weights.
    reasons : tuple of str
        Why, a sentence each.
    warnings : tuple of str
        What to mind, a sentence each.
    counts : dict of str to int
        Images of each class.
    evidence : ProbeResults
        What was measured.
    rows : ndarray of int
        Which images of `X` were measured: all, or a share of each class.
    leaks : LeakReport
        Which of these are there twice, numbered within `rows`, and the groups that keep them
        together.
    cost : Cost
        Of fitting the estimator with all images, at most.
    estimator_ : Pipeline or FineTunedImageClassifier
        Configured, and not fitted.
    """

    many: bool
    different: bool
    strategy: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    counts: dict[str, int]
    evidence: ProbeResults
    rows: np.ndarray
    leaks: LeakReport
    cost: Cost
    estimator_: Any
    _images: tuple[tuple[str, np.ndarray], ...]

    @property
    def case(self) -> str:
        """Which of the four cases this is, in words."""
        amount = "Many" if self.many else "Few"
        if self.strategy == "scratch":
            return f"{amount} images, and no weights"
        likeness = "different from" if self.different else "similar to"
        return f"{amount} images, {likeness} those of the weights"

    def __repr__(self) -> str:
        lines = [f"{self.case}: {STRATEGIES[self.strategy]}", ""]
        lines += [f"- {reason}" for reason in self.reasons]
        if self.warnings:
            lines += ["", "Mind:", *(f"- {warning}" for warning in self.warnings)]
        lines += ["", text_table(*self._table()), "", f"estimator_: {self.estimator_!r}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        labels = [label for label, _ in self._images]
        shown = [
            html_image(encode_jpeg(_GALLERY.resized(each)), label) for label, each in self._images
        ]
        parts = [
            f"<p><b>{self.case}: {STRATEGIES[self.strategy]}</b></p>",
            html_table(labels, [shown], list(range(len(labels)))),
            html_list(self.reasons),
        ]
        if self.warnings:
            parts.append(f"<p><b>Mind</b></p>{html_list(self.warnings)}")
        parts.append(html_table(*self._table()))
        parts.append(f"<pre>{escape(repr(self.estimator_))}</pre>")
        return "".join(parts)

    def _table(self) -> tuple[list[str], list[list[str]], list[int]]:
        found, cost = self.evidence, self.cost
        rows = [
            ["linear classifier on embeddings", f"{found.accuracy:.3f} ± {found.spread:.3f}"],
            *(
                [f"the same, {count:,} training images", f"{accuracy:.3f}"]
                for count, accuracy in found.curve[:-1]
            ),
            ["nearest neighbor by embeddings", f"{found.neighbor:.3f}"],
            ["linear classifier on pixels", f"{found.pixels:.3f}"],
            ["mean_interclass_cosine of embeddings", f"{found.mean_interclass_cosine:.2f}"],
            ["shorter sides, pixels", f"{found.side[0]} - {found.side[2]:,}"],
            ["gray images", f"{found.gray:.0%}"],
            ["contrast, of 255", f"{found.contrast:.0f}"],
            ["images embedded by the fit", f"{cost.images_embedded:,}"],
            ["images of its training steps", f"{cost.images_trained:,}"],
            ["seconds, besides solving the head", f"{cost.seconds:,.0f}"],
        ]
        return ["measured", ""], rows, [0]


def recommend_strategy(
    X: Any,
    y: Any,
    backbone: Any = "efficientnet_lite0",
    *,
    groups: Any = None,
    weights: Any = "default",
    image_size: Any = "auto",
    image_shape: Sequence[int] | None = None,
    pixel_range: Any = "auto",
    device: Any = "auto",
    engine: str = "auto",
    n_jobs: int | None = None,
    cache: Any = "auto",
    random_state: Any = None,
    verbose: int = 0,
) -> StrategyReport:
    """Tell whether to freeze or to tune, and what to mind, before anything is trained.

    Parameters
    ----------
    X : images in any container that `PretrainedFeatureExtractor` takes
    y : array-like of shape (N,)
        Class labels.
    backbone : str, Module or callable, default="efficientnet_lite0"
        As in `PretrainedFeatureExtractor`.
    groups : array-like of shape (N,), default=None
        Images of one group, such as those of one patient, are never on both sides of a fold.
    weights, image_size, image_shape, pixel_range, device, engine, n_jobs, cache, verbose
        As in `FineTunedImageClassifier`; the recommended estimator has them too.
    random_state : int, RandomState or None, default=None
        Shuffles the folds; the recommended estimator has it too.

    Returns
    -------
    StrategyReport

    Raises
    ------
    ValueError
        For lengths that differ, a single class, a class with a single image or in a single
        group; before any image is embedded.
    ImageError
        At the first broken image.

    See Also
    --------
    rank_backbones : Which network to take.
    find_leaks : What is there twice, with images.
    estimate_cost : What a fit or a search costs.

    Notes
    -----
    Each image goes through the network once, and its embedding is shared with what is fitted
    later, unless that is staged and needs what crosses an earlier boundary. Of more than 2,000
    images a share of each class is measured.

    Images are *different* where the embeddings of different classes have a mean cosine of at
    least 0.45: to the network they are all one thing. The bound holds for EfficientNet-Lite0; other
    networks have not been measured.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import recommend_strategy
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> report = recommend_strategy(
    ...     X[:60], y[:60], image_shape=(8, 8), image_size=(64, 64), random_state=0
    ... )
    >>> report.case
    'Many images, different from those of the weights'
    >>> report.strategy, report.estimator_.unfreeze
    ('full', (0, 'all'))
    """
    labels = check_labels(as_images(X, image_shape=image_shape), y, estimator="recommend_strategy")
    if groups is not None:
        groups = column_or_1d(groups)
        check_consistent_length(labels.y, groups)
    seed = draw_seed(random_state) % 2**32
    rows = _sample(labels.y, seed)
    # Fails before images are embedded, if at all.
    splits = make_folds(labels.y[rows], None if groups is None else groups[rows], seed)
    settings = {
        "weights": weights,
        "image_size": image_size,
        "image_shape": image_shape,
        "pixel_range": pixel_range,
        "device": device,
        "engine": engine,
        "n_jobs": n_jobs,
        "cache": cache,
        "verbose": verbose,
    }
    extractor = PretrainedFeatureExtractor(backbone, **settings).fit(X)
    found = _measure(extractor, X, rows, labels.y[rows], splits, seed)
    counts = dict(zip(map(str, labels.classes), np.bincount(labels.y).tolist(), strict=True))
    many = len(labels.y) >= MANY * len(counts)
    different = found.evidence.mean_interclass_cosine >= DIFFERENT
    strategy = "scratch" if weights is None else CHOICES[many, different]
    estimator = make_estimator(
        strategy, backbone, different=different, random_state=random_state, **settings
    )
    side = extractor.preprocessing_.crop[0]
    return StrategyReport(
        many=many,
        different=different,
        strategy=strategy,
        reasons=_reasons(many, different, strategy, counts, found.evidence),
        warnings=find_data_warnings(counts, found.evidence, found.leaks, side),
        counts=counts,
        evidence=found.evidence,
        rows=found.rows,
        leaks=found.leaks,
        cost=estimate_cost(estimator, X, y),
        estimator_=estimator,
        _images=found.one_of_each(list(counts)),
    )


class _Measured(NamedTuple):
    """What was measured, and on which images."""

    rows: np.ndarray
    images: Images
    codes: np.ndarray
    evidence: ProbeResults
    leaks: LeakReport

    def one_of_each(self, labels: list[str]) -> tuple[tuple[str, np.ndarray], ...]:
        """Decode an image of each of the first classes."""
        return tuple(
            (label, self.images[int(np.argmax(self.codes == code))])
            for code, label in enumerate(labels[:_SHOWN])
        )


def _measure(
    extractor: PretrainedFeatureExtractor,
    X: Any,
    rows: np.ndarray,
    codes: np.ndarray,
    splits: list[tuple[np.ndarray, np.ndarray]],
    seed: int,
) -> _Measured:
    """Embed the images in some rows, of these classes, and measure what they tell."""
    shape, limits = extractor.image_shape, extractor.pixel_range_
    images = as_images(X, image_shape=shape, pixel_range=limits).take(rows)
    embedded = EmbeddedImages(images, extractor.transform(images))
    threads = resolve_threads(extractor.n_jobs)
    evidence = measure(embedded, codes, splits, seed=seed, threads=threads)
    # Where all embeddings are alike, all pairs of them would be possible.
    possible = ALIKE if evidence.mean_interclass_cosine >= DIFFERENT else POSSIBLE
    leaks = compare(
        embedded, None, codes, codes, cv=splits, groups=None, threads=threads, possible=possible
    )
    return _Measured(rows, images, codes, evidence, leaks)


def make_estimator(
    strategy: str, backbone: Any, *, different: bool, random_state: Any, **settings: Any
) -> Any:
    """Make what follows a strategy, unfitted.

    Parameters
    ----------
    strategy : {"frozen", "staged", "full", "scratch"}
    backbone : str, Module or callable
    different : bool
        Images unlike photographs are augmented lightly: digits and text must not be mirrored.
    random_state : int, RandomState or None
    **settings
        Parameters that extractor and classifier have in common.
    """
    if strategy == "frozen":
        steps = [step for _, step in make_probe().steps]
        return make_pipeline(PretrainedFeatureExtractor(backbone, **settings), *steps)
    augment = "light" if different else "standard"
    options: dict[str, Any] = {"augment": augment, "random_state": random_state, **settings}
    if strategy == "full":
        options |= {"unfreeze": (0, "all"), **_FAST}
    elif strategy == "scratch":
        options |= {"unfreeze": "all", "weights": None, **_FAST}
    return FineTunedImageClassifier(backbone, **options)


def _sample(codes: np.ndarray, seed: int) -> np.ndarray:
    """Choose the rows to measure: all of them, or the same share of each class."""
    share = min(1.0, _MEASURED / len(codes))
    rng = np.random.default_rng(seed)
    chosen = []
    for code in range(codes.max() + 1):
        rows = rng.permutation(np.flatnonzero(codes == code))
        chosen.append(rows[: max(_OF_EACH, round(share * len(rows)))])
    return np.sort(np.concatenate(chosen))


def _reasons(
    many: bool, different: bool, strategy: str, counts: dict[str, int], evidence: ProbeResults
) -> tuple[str, ...]:
    total = sum(counts.values())
    embeddings = "random" if strategy == "scratch" else "frozen"
    reasons = [
        f"{total:,} images in {len(counts)} classes, {total / len(counts):.0f} of each: "
        f"{'many' if many else 'few'}, as {MANY} are the bound.",
        f"On {embeddings} embeddings a linear classifier reaches {evidence.accuracy:.2f}, on the "
        f"pixels alone {evidence.pixels:.2f}.",
    ]
    if strategy != "scratch":
        meaning = (
            f"from {DIFFERENT} on, all images are one thing to the network."
            if different
            else f"below {DIFFERENT}, so the network tells them apart as it does photographs."
        )
        cosine = evidence.mean_interclass_cosine
        reasons.insert(
            1, f"The embeddings of different classes have a mean cosine of {cosine:.2f}: {meaning}"
        )
    half = evidence.curve[-2:][0][1]  # of two images of a class, there is no half
    if evidence.accuracy - half > evidence.spread:
        reasons.append(
            f"With half of the images it reaches {half:.2f}: more of them would help further."
        )
    if evidence.n_images < total:
        reasons.append(f"Measured on {evidence.n_images:,} of the images.")
    return (*reasons, _WHY[strategy])
