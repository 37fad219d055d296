"""recommend_strategy: whether to freeze or to fine-tune a network for a data set.

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from sktransfer.backbones.loading import load_backbone
from sktransfer.classifier import FineTunedImageClassifier
from sktransfer.data.decoding import encode_jpeg
from sktransfer.data.images import Images, as_images
from sktransfer.data.labels import check_labels, check_not_missing, check_one_per_image
from sktransfer.data.validation import check_not_swapped
from sktransfer.diagnostics.cost import Cost, estimate_cost, list_excluded
from sktransfer.diagnostics.data_warnings import find_data_warnings
from sktransfer.diagnostics.extraction import read_images, resolve_extractor
from sktransfer.diagnostics.leaks import MIN_ALIKE_COSINE, LeakReport, compare
from sktransfer.diagnostics.probes import ProbeResults, measure
from sktransfer.diagnostics.ranking import make_folds
from sktransfer.embedding.duplicates import MIN_CANDIDATE_COSINE, EmbeddedImages
from sktransfer.extractor import PretrainedFeatureExtractor, check_extractor
from sktransfer.finetuning.decision import (
    DIFFERENT,
    MANY,
    REASONS,
    STRATEGIES,
    Decision,
    decide,
    decide_parameters,
    sample_rows,
    stages_of,
)
from sktransfer.finetuning.fit_inputs import draw_seed
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import ImageError
from sktransfer.utils.runtime import resolve_threads
from sktransfer.utils.tables import (
    format_seconds,
    html_image,
    html_list,
    html_table,
    text_table,
)

# Parameters that an extractor and a classifier share.
_SHARED_PARAMETERS = (
    "backbone",
    "weights",
    "image_size",
    "image_shape",
    "pixel_range",
    "background",
    "device",
    "engine",
    "n_jobs",
    "cache",
    "verbose",
)

# The report shows one image of each class, for at most this many classes.
_MAX_SHOWN_CLASSES = 10
_SHOWN_SIZE = Preprocessing(resize=96)


@dataclass(frozen=True, repr=False, eq=False)
class StrategyReport:
    """Result of `recommend_strategy`, shown as text, or as HTML in a notebook.

    Parameters
    ----------
    many : bool
        Whether the mean number of images per class is at least 5.
    different : bool
        Whether the images differ from the pretraining images of the weights.
    strategy : {"frozen", "staged", "full", "scratch"}
        A linear classifier on frozen embeddings, fine-tuning of the last blocks or of all blocks,
        or training from random weights.
    reasons : tuple of str
        Reasons for the strategy, one sentence each.
    warnings : tuple of str
        Problems of the images and labels, one sentence each.
    counts : dict of str to int
        Number of images of each class.
    probe_results : ProbeResults
    image_size : (int, int)
        Height and width, in pixels, at which the images were embedded.
    rows : ndarray of int
        Rows of `X` that were measured: all of them, or a share of each class.
    leaks : LeakReport
        Duplicates among these images, and the groups that keep them together. Its row numbers are
        positions in `rows`.
    cost : Cost
        Upper bound of the cost of fitting the estimator on all images.
    estimator_ : FineTunedImageClassifier
        The recommended classifier, not fitted. It has the values that the default `"auto"` of
        `unfreeze`, `augment`, `max_epochs` and `lr` decides for these images.
    """

    many: bool
    different: bool
    strategy: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    counts: dict[str, int]
    probe_results: ProbeResults
    image_size: tuple[int, int]
    rows: np.ndarray
    leaks: LeakReport
    cost: Cost
    estimator_: Any
    _images: tuple[tuple[str, np.ndarray], ...]

    @property
    def case(self) -> str:
        """The case: few or many images, similar to the pretraining images or different."""
        amount = "Many" if self.many else "Few"
        if self.strategy == "scratch":
            return f"{amount} images, no pretrained weights"
        similarity = "different from" if self.different else "similar to"
        return f"{amount} images, {similarity} the pretraining images"

    def __repr__(self) -> str:
        lines = [f"{self.case}: {STRATEGIES[self.strategy]}", ""]
        lines += [f"- {reason}" for reason in self.reasons]
        if self.warnings:
            lines += ["", "Warnings:", *(f"- {warning}" for warning in self.warnings)]
        lines += ["", text_table(*self._table()), "", f"estimator_: {self.estimator_!r}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        labels = [label for label, _ in self._images]
        thumbnails = [
            html_image(encode_jpeg(_SHOWN_SIZE.resized(image)), label)
            for label, image in self._images
        ]
        parts = [
            f"<p><b>{self.case}: {STRATEGIES[self.strategy]}</b></p>",
            html_table(labels, [thumbnails], list(range(len(labels)))),
            html_list(self.reasons),
        ]
        if self.warnings:
            parts.append(f"<p><b>Warnings</b></p>{html_list(self.warnings)}")
        parts.append(html_table(*self._table()))
        parts.append(f"<pre>{escape(repr(self.estimator_))}</pre>")
        return "".join(parts)

    def _table(self) -> tuple[list[str], list[list[str]], list[int]]:
        results, cost = self.probe_results, self.cost
        rows = [
            ["image size of the embeddings", "x".join(map(str, self.image_size))],
            ["linear classifier on embeddings", f"{results.accuracy:.3f} ± {results.spread:.3f}"],
            *(
                [f"the same, {count:,} training images", f"{accuracy:.3f}"]
                for count, accuracy in results.curve[:-1]
            ),
            ["nearest neighbor by embeddings", f"{results.neighbor:.3f}"],
            ["linear classifier on pixels", f"{results.pixels:.3f}"],
            ["mean cosine between classes", f"{results.mean_interclass_cosine:.2f}"],
            ["shorter sides, pixels", f"{results.side[0]} - {results.side[2]:,}"],
            ["gray images", f"{results.gray:.0%}"],
            ["contrast, 0-255", f"{results.contrast:.0f}"],
            ["images embedded by the fit", f"{cost.images_embedded:,}"],
            ["images trained on, over all epochs", f"{cost.images_trained:,}"],
            [f"estimated time{list_excluded(cost)}", format_seconds(cost.seconds)],
        ]
        return ["measured", ""], rows, [0]


def recommend_strategy(
    X: Any,
    y: Any,
    *,
    extractor: PretrainedFeatureExtractor | None = None,
    groups: Any = None,
    random_state: Any = 0,
) -> StrategyReport:
    """Recommend whether to freeze or to fine-tune a network, and check the data for problems.

    Parameters
    ----------
    X : images in any container that `PretrainedFeatureExtractor` takes
    y : array-like of shape (N,)
        Class labels.
    extractor : PretrainedFeatureExtractor or None, default=None
        Reads and embeds the images; it is cloned. The recommended estimator has the same settings.
        None is `PretrainedFeatureExtractor(image_size="auto")`.
    groups : array-like of shape (N,), default=None
        Images of the same group, such as those of one patient, are never on both sides of a fold.
    random_state : int, RandomState or None, default=0
        Seed of the folds, and `random_state` of the recommended estimator.

    Returns
    -------
    StrategyReport

    Raises
    ------
    ValueError
        If lengths differ, or for a single class, a class with a single image, or a class in a
        single group; before any image is embedded.
    ImageError
        If images that are measured cannot be read; names all of them.

    See Also
    --------
    rank_backbones : Compare pretrained networks.
    find_leaks : Report duplicate images.
    estimate_cost : Estimate the cost of a fit or a search.

    Notes
    -----
    The network embeds each image once. A later fit reuses the embeddings, unless it is staged and
    needs activations of an earlier boundary. If there are more than 2,000 images, a share of each
    class is measured.

    Images are *different* if the embeddings of different classes have a mean cosine of at least
    0.45, because the network hardly tells such classes apart. The threshold was measured for
    EfficientNet-Lite0 only.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import PretrainedFeatureExtractor, recommend_strategy
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> scans = PretrainedFeatureExtractor(image_shape=(8, 8), image_size=(64, 64))
    >>> report = recommend_strategy(X[:60], y[:60], extractor=scans)
    >>> report.case
    'Many images, different from the pretraining images'
    >>> report.strategy, report.estimator_.unfreeze
    ('full', (0, 'all'))
    """
    check_not_swapped(X, y)
    extractor = resolve_extractor(extractor, image_size="auto")
    check_extractor(extractor)
    images = as_images(X, image_shape=extractor.image_shape)
    labels = check_labels(images, y, estimator="recommend_strategy")
    if groups is not None:
        check_one_per_image("groups", groups, images)
        groups = check_not_missing(groups, "groups")
    seed = draw_seed(random_state) % 2**32
    rows = sample_rows(labels.y, seed)
    # Before images are embedded, so that an error is raised early.
    measured_groups = None if groups is None else groups[rows]
    splits = make_folds(labels.y[rows], measured_groups, seed, labels.classes)
    extractor.fit(X)
    measured = _measure(extractor, X, rows, labels.y[rows], splits, seed)
    counts = dict(zip(map(str, labels.classes), np.bincount(labels.y).tolist(), strict=True))
    decision = decide(
        len(labels.y) / len(counts),
        measured.probe_results.mean_interclass_cosine,
        pretrained=extractor.weights is not None,
    )
    estimator = _decided_estimator(extractor, measured, labels.y, random_state)
    image_size = extractor.preprocessing_.crop
    return StrategyReport(
        many=decision.many,
        different=decision.different,
        strategy=decision.strategy,
        reasons=_reasons(decision, counts, measured.probe_results),
        warnings=find_data_warnings(counts, measured.probe_results, measured.leaks, image_size[0]),
        counts=counts,
        probe_results=measured.probe_results,
        image_size=image_size,
        rows=measured.rows,
        leaks=measured.leaks,
        cost=estimate_cost(estimator, X, y),
        estimator_=estimator,
        _images=measured.one_of_each(list(counts)),
    )


class _Measured(NamedTuple):
    """Results of the probes, and the measured images."""

    rows: np.ndarray
    images: Images
    codes: np.ndarray
    probe_results: ProbeResults
    leaks: LeakReport

    def one_of_each(self, labels: list[str]) -> tuple[tuple[str, np.ndarray], ...]:
        """Decode one image of each of the first classes."""
        return tuple(
            (label, self.images[int(np.argmax(self.codes == code))])
            for code, label in enumerate(labels[:_MAX_SHOWN_CLASSES])
        )


def _measure(
    extractor: PretrainedFeatureExtractor,
    X: Any,
    rows: np.ndarray,
    codes: np.ndarray,
    splits: list[tuple[np.ndarray, np.ndarray]],
    seed: int,
) -> _Measured:
    """Embed the images in some rows, run the probes and search for duplicates."""
    images = read_images(extractor, X).take(rows)
    embedded = EmbeddedImages(images, extractor.transform(images))
    if extractor.errors_:  # with on_error="nan"
        raise ImageError.of(extractor.errors_)
    threads = resolve_threads(extractor.n_jobs)
    results = measure(embedded, codes, splits, seed=seed, threads=threads)
    # If all embeddings are similar, the lower threshold would select all pairs.
    min_cosine = (
        MIN_ALIKE_COSINE if results.mean_interclass_cosine >= DIFFERENT else MIN_CANDIDATE_COSINE
    )
    leaks = compare(
        embedded,
        None,
        codes,
        codes,
        splits=splits,
        groups=None,
        threads=threads,
        min_cosine=min_cosine,
    )
    return _Measured(rows, images, codes, results, leaks)


def _decided_estimator(
    extractor: PretrainedFeatureExtractor, measured: _Measured, codes: np.ndarray, seed: Any
) -> FineTunedImageClassifier:
    """Build the classifier with the values that its fit would decide."""
    classifier = _make_classifier(extractor, random_state=seed)
    decided = decide_parameters(
        classifier,
        _blocks_of(extractor),
        np.bincount(codes),
        measured.probe_results.mean_interclass_cosine,
    )
    return classifier.set_params(**decided.parameters)


def make_estimator(
    strategy: str, extractor: PretrainedFeatureExtractor, **parameters: Any
) -> FineTunedImageClassifier:
    """Build the classifier of a strategy, unfitted, with the settings of an extractor.

    Parameters
    ----------
    strategy : {"frozen", "staged", "full", "scratch"}
        With `"scratch"`, the weights are random, whatever those of the extractor are.
    extractor : PretrainedFeatureExtractor
    **parameters
        Other parameters of the classifier.
    """
    classifier = _make_classifier(extractor, **parameters)
    if strategy == "scratch":
        classifier.set_params(weights=None)
    return classifier.set_params(unfreeze=stages_of(strategy, _blocks_of(extractor)))


def _make_classifier(
    extractor: PretrainedFeatureExtractor, **parameters: Any
) -> FineTunedImageClassifier:
    """Build a classifier with the settings of an extractor."""
    shared = {name: getattr(extractor, name) for name in _SHARED_PARAMETERS}
    return FineTunedImageClassifier(**shared, **parameters)


def _blocks_of(extractor: PretrainedFeatureExtractor) -> tuple[tuple[str, nn.Module], ...]:
    return load_backbone(extractor.backbone, extractor.weights).block_list.blocks


def _reasons(decision: Decision, counts: dict[str, int], results: ProbeResults) -> tuple[str, ...]:
    total = sum(counts.values())
    embeddings = "random" if decision.strategy == "scratch" else "frozen"
    reasons = [
        f"{total:,} images in {len(counts)} classes, about {total / len(counts):.0f} per class: "
        f"{'many' if decision.many else 'few'} (threshold: {MANY} per class).",
        f"A linear classifier has an accuracy of {results.accuracy:.2f} on {embeddings} "
        f"embeddings, and of {results.pixels:.2f} on pixels.",
    ]
    if decision.strategy != "scratch":
        meaning = (
            f"at {DIFFERENT} or more, the network can hardly tell the classes apart."
            if decision.different
            else f"below {DIFFERENT}, the network can tell the classes apart, as for photographs."
        )
        cosine = results.mean_interclass_cosine
        reasons.insert(
            1, f"The embeddings of different classes have a mean cosine of {cosine:.2f}: {meaning}"
        )
    half = results.curve[-2:][0][1]  # with two images per class, the curve has one point
    if results.accuracy - half > results.spread:
        reasons.append(
            f"With half of the training images, its accuracy is only {half:.2f}, so more images "
            "would probably help."
        )
    if results.n_images < total:
        reasons.append(f"Measured on {results.n_images:,} of the images.")
    return (*reasons, REASONS[decision.strategy])
