"""estimate_cost: the cost of a fit, a cross-validation or a search, estimated before it runs.

Shapes: N images.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import StackingClassifier, VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import ParameterGrid, ParameterSampler
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import _num_samples

from sktransfer.adaptation.batch_norm import MAX_MATCHED_IMAGES
from sktransfer.backbones.loading import load_backbone
from sktransfer.classifier import FineTunedImageClassifier
from sktransfer.data.images import Images
from sktransfer.data.labels import (
    as_labels,
    check_class_labels,
    check_not_missing,
    check_one_per_image,
    split_domains,
)
from sktransfer.data.validation import check_images, check_not_swapped
from sktransfer.diagnostics.splits import check_splits
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.embed import embed
from sktransfer.embedding.recipe import Recipe, output_width, recipe_at
from sktransfer.extractor import PretrainedFeatureExtractor, check_extractor
from sktransfer.finetuning.activations import disk_problem
from sktransfer.finetuning.averaging import averages, held_out_to_choose
from sktransfer.finetuning.cut_network import Network
from sktransfer.finetuning.decision import (
    MAX_MEASURED,
    choose_training,
    decide_parameters,
    is_auto,
    mean_interclass_cosine,
    measured_boundary,
    needs_embeddings,
    sample_rows,
    with_decision,
)
from sktransfer.finetuning.fit_inputs import check_parameters
from sktransfer.finetuning.plan import FitPlan, held_out_fraction, make_plan
from sktransfer.finetuning.schedule import HEAD, PRE_LOGITS, Stage
from sktransfer.finetuning.task import UNLABELED, ClassificationTask
from sktransfer.finetuning.train_stage import make_net
from sktransfer.store.session import resolve_store
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.loader import find_broken
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError
from sktransfer.utils.runtime import seeded
from sktransfer.utils.tables import format_bytes, format_seconds

# Number of images that are timed on a CPU, and on an accelerator, which needs large batches.
_N_TIMED_ON_CPU, _N_TIMED_ON_ACCELERATOR = 8, 64
# Number of images that are embedded to decide what a fit trains, if it decides.
_N_MEASURED = 100

_COUNTED_ESTIMATORS = (FineTunedImageClassifier, PretrainedFeatureExtractor)


@dataclass(frozen=True)
class Cost:
    """Result of `estimate_cost`; all counts are upper bounds.

    Parameters
    ----------
    fits : int
        Number of fits of the estimator, including refits; of an ensemble, of its members.
    images_embedded : int
        Number of images and augmented views that pass through frozen blocks: once per boundary if
        they are cached in a store, otherwise each time they are needed. Passes that adapt BatchNorm
        are included.
    images_trained : int
        Number of images in all training steps, if no stage ends early.
    bytes_cached : int
        Disk space of activations, in the store and in the files of one fit at a time.
    seconds : float
        Time of one process on this machine, excluding the steps in `excluded`.
    excluded : tuple of str
        What the time does not include: `"the head fit"`, and `"the other steps"` of a pipeline or
        ensemble.
    """

    fits: int
    images_embedded: int
    images_trained: int
    bytes_cached: int
    seconds: float
    excluded: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = {
            "fits": f"{self.fits:,}",
            "images embedded": f"{self.images_embedded:,}",
            "images trained": f"{self.images_trained:,}",
            "disk space": format_bytes(self.bytes_cached),
            "time": f"{format_seconds(self.seconds)} in one process{list_excluded(self)}",
        }
        return "\n".join(["Cost, at most", *(f"  {name:<18} {shown[name]}" for name in shown)])


def list_excluded(cost: Cost) -> str:
    """Return the steps that a time excludes, as the end of a phrase; empty if there are none."""
    return f", excluding {' and '.join(cost.excluded)}" if cost.excluded else ""


def estimate_cost(
    estimator: Any, X: Any, y: Any = None, *, cv: Any = None, sample_domain: Any = None
) -> Cost:
    """Estimate the cost of fitting an estimator, without fitting it.

    No store is read or filled. Embeddings that are already in a store reduce the actual cost.

    Parameters
    ----------
    estimator : estimator
        A `FineTunedImageClassifier`, a `PretrainedFeatureExtractor`, a `Pipeline`,
        `ColumnTransformer` or `FeatureUnion` with them, a `VotingClassifier`, `StackingClassifier`
        or `CalibratedClassifierCV` of these, or a scikit-learn search around any of these. For a
        halving search the estimate assumes that each fit uses all resources. A random search
        without `random_state` may draw other candidates when it is fitted.
    X : images in any container that the estimator takes
    y : array-like of shape (N,), default=None
        Labels; only an extractor alone does not need them.
    cv : int, splitter or None, default=None
        Estimate the cost of `cross_val_score(estimator, X, y, cv=cv)`, which for a search is a
        nested cross-validation. With `None`, estimate the cost of `estimator.fit(X, y)`.
    sample_domain : array-like of shape (N,), int, default=None
        Domain of each image, as in `FineTunedImageClassifier.fit`.

    Returns
    -------
    Cost

    Raises
    ------
    TypeError
        If the cost of the estimator cannot be counted, or `cv` is an iterator.
    ValueError
        If a parameter is invalid, or labels are missing.
    ImageError
        If images that are timed cannot be read, unless the estimator's `on_error` leaves them out;
        names all broken images of `X`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sktransfer import FineTunedImageClassifier
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> classifier = FineTunedImageClassifier(
    ...     image_shape=(8, 8), image_size=32, n_views=1, max_epochs=2
    ... )
    >>> search = GridSearchCV(classifier, {"lr": [1e-3, 1e-4]}, cv=3)
    >>> estimate_cost(search, X[:60], y[:60])  # doctest: +ELLIPSIS
    Cost, at most
      fits               7
      images embedded    180
      images trained     1,046
      disk space         ...
      time               ... in one process, excluding the head fit
    """
    state = np.random.get_state()
    try:
        with seeded():
            return _Estimate(X, y, sample_domain).cost(estimator, cv)
    finally:
        np.random.set_state(state)


class _CostTally:
    """Cost of some fits: sums, and the rows, masks (N,), that a store embeds once for all fits."""

    def __init__(self, fits: int = 0) -> None:
        # Sums of fits, images embedded, images trained and seconds; scratch bytes are a maximum.
        self.sums, self.scratch = np.array([fits, 0, 0, 0.0]), 0
        self.cached: dict[Hashable, tuple[float, int, np.ndarray]] = {}

    def add(self, tally: _CostTally, *, maximum: bool = False) -> None:
        """Add another tally; with `maximum`, take the larger value of each sum instead."""
        self.sums = (np.maximum if maximum else np.add)(self.sums, tally.sums)
        self.scratch = max(self.scratch, tally.scratch)
        for key, entry in tally.cached.items():
            self.add_cached(key, *entry)

    def add_cached(self, key: Hashable, seconds: float, size: int, rows: np.ndarray) -> None:
        """Add rows whose activations are cached, so each row is computed once for all fits."""
        all_rows = rows | self.cached[key][2] if key in self.cached else rows
        self.cached[key] = (seconds, size, all_rows)

    def add_images(self, count: int, seconds: float, embeds: int = 0, trains: int = 0) -> None:
        """Add a pass over `count` images, with the seconds that each image takes."""
        self.sums += (0, count * embeds, count * trains, count * seconds)


class _Part:
    """An estimator of this package, and the cost of its fits."""

    def __init__(
        self,
        estimator: Any,
        X: Any,
        task: ClassificationTask,
        codes: np.ndarray,
        is_target: np.ndarray,
        times: dict[Any, float],
    ) -> None:
        self.is_target = is_target
        self.task, self._times = task, times
        self.tunes = isinstance(estimator, FineTunedImageClassifier)
        if self.tunes:
            check_parameters(estimator)
            self.backbone = load_backbone(estimator.backbone, estimator.weights)
        else:
            self.backbone = check_extractor(estimator)
        self._images = check_images(clone(estimator), X, reset=True)
        self._leaves_out_broken = estimator.on_error != "raise"
        names = self.backbone.block_list.names
        self.end = len(names)
        size = self.backbone.image_size_for(estimator.image_size, self._images)
        preprocessing = self.backbone.preprocessing.with_image_size(size)
        self.compute = ComputeConfig.of(clone(estimator).set_params(cache=None))
        self._codes = codes
        self._measured_at: int | None = None
        self.chooses_epochs = self.tunes and is_auto(estimator.max_epochs)
        if self.tunes:
            if needs_embeddings(estimator):
                blocks = self.backbone.block_list.blocks
                self._measured_at = measured_boundary(estimator, blocks)
            estimator = self._decided(estimator, codes, preprocessing)
        self.estimator = estimator
        self.augmentation = resolve_augmentation(estimator.augment) if self.tunes else None
        self.plan = make_plan(estimator, names, self.augmentation) if self.tunes else None
        self.stages = self.plan.stages if self.plan else ()
        boundary = self.stages[-1].boundary if self.tunes else self.end
        dropout = estimator.dropout if self.tunes else 0.0
        trains_batch_norm = estimator.batch_norm == "train" or estimator.weights is None
        self.network = Network(
            self.backbone, preprocessing, boundary, task.n_outputs, dropout, trains_batch_norm
        )
        self.store = resolve_store(estimator.cache)

    def _decided(self, estimator: Any, codes: np.ndarray, preprocessing: Preprocessing) -> Any:
        """Return a copy with the values that a fit would decide, measured on some images."""
        cosine = None
        if needs_embeddings(estimator):
            recipe = recipe_at(self.backbone, preprocessing, self.end, self.compute.precision)
            key = ("cosine", recipe.digest)
            if key not in self._times:
                rows = _some_of_each(codes)
                rows = rows[self._readable(self._images.take(rows))]
                values, *_ = embed(
                    Views(self._images.take(rows), preprocessing), recipe, self.compute
                )
                sampled = np.unique(codes[rows], return_inverse=True)[1]
                self._times[key] = mean_interclass_cosine(values, sampled)
            cosine = self._times[key]
        counts = np.bincount(codes[codes >= 0])
        blocks = self.backbone.block_list.blocks
        return with_decision(estimator, decide_parameters(estimator, blocks, counts, cosine))

    def recipe(self, boundary: int | None) -> Recipe:
        """Build the recipe of a boundary; None is the layers of an extractor."""
        if boundary is not None:
            return self.network.recipe(boundary, self.compute)
        layer = self.estimator.layer
        layers = tuple(layer) if isinstance(layer, (list, tuple)) else (layer,)
        recipe = self.network.recipe(self.end, self.compute)
        return replace(recipe, layers=layers, pooling=self.estimator.pooling)

    def bytes_at(self, boundary: int | None) -> int:
        """Return the number of bytes of an image's activations."""
        recipe = self.recipe(boundary)
        return output_width(recipe) * np.dtype(recipe.dtype).itemsize

    def tally(self, rows: np.ndarray, predicted: list[np.ndarray]) -> _CostTally:
        """Count one fit and its predictions; rows are masks (N,)."""
        tally, salt = _CostTally(), b""
        source, target = rows & ~self.is_target, rows & self.is_target
        if self.estimator.batch_norm == "adapt":
            adapted = int(source.sum())
            if self.tunes and target.any():  # both domains are matched after training
                adapted = sum(min(int(mask.sum()), MAX_MATCHED_IMAGES) for mask in (source, target))
            elif not self.tunes:
                adapted = int(rows.sum())
            tally.add_images(adapted, self._embedding(self.end), embeds=1)
            salt = rows.tobytes()  # fits that adapt to different images share no embeddings
        if self.plan is None:
            self._embed(tally, None, np.any([rows, *predicted], axis=0), 0, salt)
            return tally
        self._train(tally, self.plan, source, target, salt)
        for mask in predicted:
            if not self.stages[-1].head_only:  # a training step is an upper bound
                tally.add_images(int(mask.sum()), self._step(self.stages[-1]))
            if self.network.boundary:
                self._embed(tally, self.network.boundary, mask, 0, salt)
        return tally

    def _embed(
        self, tally: _CostTally, boundary: int | None, rows: np.ndarray, n_views: int, salt: bytes
    ) -> None:
        seconds, digest = self._embedding(boundary), self.recipe(boundary).digest
        if self.store is None:
            tally.add_images(int(rows.sum()) * (1 + n_views), seconds, embeds=1)
            return
        for view in range(1 + n_views):
            augmented = self.augmentation.digest if view and self.augmentation else None
            key = (self.store.directory, digest, view, augmented, salt)
            tally.add_cached(key, seconds, self.bytes_at(boundary), rows)

    def _train(
        self,
        tally: _CostTally,
        plan: FitPlan,
        source: np.ndarray,
        target: np.ndarray,
        salt: bytes,
    ) -> None:
        """Count the work of `FineTuning` on source and target rows, masks (N,)."""
        options, n = self.estimator, int(source.sum())
        views, first = plan.count_cached_views(n, int(target.sum())), plan.first_boundary
        if plan.cached and disk_problem(views, self.recipe(first), self.store) is not None:
            plan = plan.without_cache()
        self._measure(tally, source, salt)
        start = plan.gathering_boundary
        if plan.cached or plan.stages[0].head_only:
            self._embed(tally, start, source, plan.n_views, salt)
            if plan.cached and plan.adversarial:
                self._embed(tally, start, target, plan.n_views, salt)
            later = {stage.boundary for stage in plan.stages if stage.boundary > start}
            for boundary in later:
                between = max(0.0, self._embedding(boundary) - self._embedding(start))
                tally.add_images(views, between)
            largest = max(map(self.bytes_at, later), default=0)
            tally.scratch = views * (self.bytes_at(start) + largest)
        fraction = held_out_fraction(options, n)
        held_out = math.ceil(fraction * n) + self.network.n_outputs if fraction else 0
        n_trained = n * (2 if plan.adversarial else 1)  # an adversary pairs images of both domains
        if not fraction and (held_out := self._count_tried(plan, source)):
            n_trained += n - held_out
        # The store has those that were measured through the same boundary.
        stored = self.store is not None and self._measured_at == first and n <= MAX_MEASURED
        if first and not plan.cached and not stored:
            tally.add_images(held_out, self._embedding(first), embeds=1)
        epochs = options.max_epochs
        if self.chooses_epochs:
            _, epochs = choose_training(plan.trains_all, n)
        trained = n_trained * epochs
        for stage in plan.trained_stages:
            tally.add_images(trained, self._step(stage), trains=1)
            if stage.boundary and not plan.cached:
                tally.add_images(trained, self._embedding(stage.boundary), embeds=1)

    def _measure(self, tally: _CostTally, source: np.ndarray, salt: bytes) -> None:
        """Count the images that are embedded to decide what to train."""
        if self._measured_at is not None:
            measured, rows = np.zeros_like(source), np.flatnonzero(source)
            measured[rows[sample_rows(self._codes[rows], 0)]] = True
            self._embed(tally, self._measured_at, measured, 0, salt)

    def _count_tried(self, plan: FitPlan, source: np.ndarray) -> int:
        """Count the images that are held out of another training; 0 if there is none."""
        averaging = self.estimator.averaging
        if averaging != "auto" or not averages(averaging, plan):
            return 0
        return len(held_out_to_choose(plan, self.task, self._codes[source], 0))

    @cached_property
    def _views(self) -> Views:
        """The images that are timed: evenly spaced in `X`, and augmented if the fit augments."""
        on_cpu = self.compute.device.type == "cpu"
        timed = self._images.sample(_N_TIMED_ON_CPU if on_cpu else _N_TIMED_ON_ACCELERATOR)
        timed = timed.take(self._readable(timed))
        return Views(timed, self.network.preprocessing, self.augmentation, only=1)

    def _readable(self, sample: Images) -> np.ndarray:
        """Return the positions of the images of a sample that can be read.

        Raises
        ------
        ImageError
            If there are none, or if the fit would raise an error; names all broken images of `X`.
        """
        threads = self.compute.threads
        broken = find_broken([sample], threads)
        if not broken:
            return np.arange(len(sample))
        readable = sample.without(broken[0])
        if not len(readable) or not self._leaves_out_broken:
            raise ImageError.of(find_broken([self._images], threads))
        return readable

    def _embedding(self, boundary: int | None) -> float:
        """Measure the seconds per image from the file to a boundary."""
        recipe = self.recipe(boundary)
        run = partial(embed, self._views, recipe, self.compute, n_images=len(self._images))
        return self._time(recipe.digest, len(self._views), run)

    def _step(self, stage: Stage) -> float:
        """Measure the seconds per image of a training step."""
        options, compute = self.estimator, self.compute
        size = min(options.batch_size, len(self._views))
        if self.network.learn_statistics:
            size = max(size, 2)  # BatchNorm may not learn from a single image
        key = (self.recipe(self.end).digest, stage, self.network.boundary, size)
        if key not in self._times:
            suffix = self.network.suffix({stage.boundary}, compute)
            net = make_net(suffix, self.task, device=compute.device, optimizer=options.optimizer)
            suffix.move_boundary(stage.boundary, (*stage.blocks, PRE_LOGITS, HEAD))
            x = torch.rand(size, *suffix.shapes[stage.boundary], device=compute.device)
            y = torch.ones(size, self.network.n_outputs, device=compute.device)
            with seeded(0, compute.device):
                self._time(key, size, lambda: net.train_step((x, y))["loss"].item())
        # Images that are not cached must be read too; the time up to block 1 is an upper bound.
        return self._times[key] + (0 if stage.boundary else self._embedding(1))

    def _time(self, key: Hashable, count: int, action: Callable[[], Any]) -> float:
        """Measure the seconds per image of the second run of an action on `count` images."""
        if key not in self._times:
            action()
            start = time.perf_counter()
            action()
            self._times[key] = (time.perf_counter() - start) / count
        return self._times[key]


def _some_of_each(codes: np.ndarray) -> np.ndarray:
    """Return rows of the first images of each class, without unlabeled ones (-1)."""
    labeled = np.flatnonzero(codes >= 0)
    n_each = max(1, _N_MEASURED // (int(codes.max()) + 1))
    chosen = [labeled[codes[labeled] == code][:n_each] for code in range(codes.max() + 1)]
    return np.concatenate(chosen)


class _Estimate:
    """The images, labels and timings that all counted fits share."""

    def __init__(self, X: Any, y: Any, sample_domain: Any) -> None:
        if y is not None:
            check_not_swapped(X, y)
            check_one_per_image("y", y, X)
        self.X, self.n = X, _num_samples(X)
        self.is_target = np.zeros(self.n, dtype=bool)
        if sample_domain is not None:
            self.is_target[split_domains(sample_domain, self.n)[1]] = True
        self.y = None if y is None else self._labels(y)
        self._parts: dict[Any, list[tuple[_Part, bool]]] = {}
        self._times: dict[Hashable, float] = {}

    def _labels(self, y: Any) -> np.ndarray:
        """Return labels; missing ones are allowed in the target, and take a label of the source."""
        if np.ndim(y) > 1 and np.shape(y)[1] > 1:  # several outputs of a regressor
            return np.asarray(y)
        labels, missing = as_labels(y)
        source = np.flatnonzero(~self.is_target)
        known = check_not_missing(labels[source], "y", source)
        if known.dtype.kind in "OScV":
            known = check_class_labels(known)
        if missing.any():
            labels[missing] = known[0]
            labels = np.array(labels.tolist())
        return labels

    def cost(self, estimator: Any, cv: Any) -> Cost:
        rows = np.ones(self.n, dtype=bool)
        folds = [] if cv is None else self._split(cv, estimator, rows)
        if folds:
            tally = self._cross_validate(estimator, folds)
        else:
            tally = self._tally(estimator, rows, [])
        for seconds, _, rows in tally.cached.values():
            tally.add_images(int(rows.sum()), seconds, embeds=1)
        size = sum(size * int(rows.sum()) for _, size, rows in tally.cached.values())
        fits, embedded, trained, seconds = tally.sums.tolist()
        size += tally.scratch
        excluded = self._excluded(estimator)
        return Cost(int(fits), int(embedded), int(trained), size, seconds, excluded)

    def _excluded(self, estimator: Any) -> tuple[str, ...]:
        """Name the work of a fit that is not counted."""
        while isinstance(estimator, BaseSearchCV):
            estimator = estimator.estimator
        parts = [counted for all_counted in self._parts.values() for counted in all_counted]
        is_ensemble = isinstance(estimator, tuple(self._meta_estimators))
        excluded = {
            "the head fit": any(part.tunes for part, _ in parts),
            "the other steps": is_ensemble or not all(last for _, last in parts),
        }
        return tuple(name for name, is_excluded in excluded.items() if is_excluded)

    def _tally(self, estimator: Any, rows: np.ndarray, predicted: list[np.ndarray]) -> _CostTally:
        """Count a fit on some rows, and the predictions of others."""
        if isinstance(estimator, type) or not hasattr(estimator, "get_params"):
            raise _unsupported(estimator)
        for kind, count in self._meta_estimators.items():
            if isinstance(estimator, kind):
                return count(self, estimator, rows, predicted)
        if estimator not in self._parts:
            counted = list(_find_parts(estimator, self.X))
            if not counted:
                raise _unsupported(estimator)
            if self.y is None and any(hasattr(part, "unfreeze") for part, *_ in counted):
                raise ValueError(
                    "Got y=None, but a FineTunedImageClassifier needs labels; pass them as y"
                )
            task = (
                UNLABELED
                if self.y is None
                else ClassificationTask(np.unique(self.y[~self.is_target]))
            )
            codes = np.full(self.n, -1)
            if self.y is not None:
                source = ~self.is_target
                codes[source] = np.unique(self.y[source], return_inverse=True)[1]
            common = (task, codes, self.is_target, self._times)
            self._parts[estimator] = [(_Part(part, X, *common), last) for part, X, last in counted]
        tally = _CostTally(fits=1)
        for part, last in self._parts[estimator]:
            tally.add(part.tally(rows, predicted if last else [rows, *predicted]))
        return tally

    def _cross_validate(
        self, estimator: Any, splits: list[Any], *, train_scores: bool = False
    ) -> _CostTally:
        """Count a cross-validation; with `train_scores`, training rows are predicted too."""
        tally = _CostTally()
        for train, test in splits:
            tally.add(self._tally(estimator, train, [test, train] if train_scores else [test]))
        return tally

    def _search(self, search: Any, rows: np.ndarray, predicted: list[np.ndarray]) -> _CostTally:
        tally, most_expensive, refit = _CostTally(), _CostTally(), _CostTally()
        splits = self._split(search.cv, search.estimator, rows)
        candidates, total = _candidates(search, len(splits), int(rows.sum()))
        for candidate in candidates:
            validated = self._cross_validate(
                candidate, splits, train_scores=search.return_train_score
            )
            tally.add(validated)
            most_expensive.add(validated, maximum=True)
            if search.refit:  # the best candidate is not known, so count the most expensive refit
                refit.add(self._tally(candidate, rows, predicted), maximum=True)
        later_rounds = [most_expensive] * (total - len(candidates))  # of a halving search
        for addition in [refit, *later_rounds]:
            tally.add(addition)
        return tally

    def _vote(
        self, ensemble: VotingClassifier, rows: np.ndarray, predicted: list[np.ndarray]
    ) -> _CostTally:
        tally = _CostTally()
        for member in _members(ensemble):
            tally.add(self._tally(member, rows, predicted))
        return tally

    def _stack(
        self, ensemble: StackingClassifier, rows: np.ndarray, predicted: list[np.ndarray]
    ) -> _CostTally:
        """Count the members, fitted on all rows, and their cross-validated predictions."""
        if _is_or_contains_counted(ensemble.final_estimator):
            raise _unsupported(ensemble)
        splits = self._split(_check_refit(ensemble), ensemble, rows)
        tally = _CostTally()
        for member in _members(ensemble):
            tally.add(self._tally(member, rows, predicted))
            tally.add(self._cross_validate(member, splits))
        return tally

    def _calibrate(
        self, calibrated: CalibratedClassifierCV, rows: np.ndarray, predicted: list[np.ndarray]
    ) -> _CostTally:
        """Count a classifier for each fold, or one for all rows and cross-validated predictions."""
        inner, tally = calibrated.estimator, _CostTally()
        if not _is_or_contains_counted(inner) or isinstance(inner, FrozenEstimator):
            raise _unsupported(calibrated)
        splits = self._split(_check_refit(calibrated), inner, rows)
        if not calibrated.ensemble:
            tally.add(self._tally(inner, rows, predicted))
            tally.add(self._cross_validate(inner, splits))
            return tally
        for train, test in splits:
            tally.add(self._tally(inner, train, [test, *predicted]))
        return tally

    # How a fit of each kind of meta-estimator is counted.
    _meta_estimators: ClassVar[dict[type, Callable[..., _CostTally]]] = {
        BaseSearchCV: _search,
        VotingClassifier: _vote,
        StackingClassifier: _stack,
        CalibratedClassifierCV: _calibrate,
    }

    def _split(self, cv: Any, estimator: Any, rows: np.ndarray) -> list[Any]:
        if isinstance(cv, Iterator):
            raise TypeError(
                f"Got cv={cv!r}, an iterator, which counting would exhaust; pass list(cv)"
            )
        chosen = np.flatnonzero(rows)
        y = None if self.y is None else self.y[chosen]
        splits = check_splits(cv, len(chosen), y, classifier=is_classifier(estimator))
        return [
            [np.bincount(chosen[side], minlength=self.n) > 0 for side in split] for split in splits
        ]


def _find_parts(estimator: Any, X: Any, last: bool = True) -> Iterator[tuple[Any, Any, bool]]:
    """Yield the estimators of this package, their images, and whether each is the last step."""
    if isinstance(estimator, _COUNTED_ESTIMATORS):
        yield estimator, X, last
    elif isinstance(estimator, FeatureUnion):
        for _, transformer in estimator.transformer_list:
            yield from _find_parts(transformer, X, False)
    elif isinstance(estimator, ColumnTransformer):
        for transformer, columns in _counted_columns(estimator, X):
            yield from _find_parts(transformer, columns, False)
    elif isinstance(estimator, Pipeline):
        steps = [step for _, step in estimator.steps if step not in (None, "passthrough")]
        if any(_is_or_contains_counted(step) for step in steps[1:]):
            raise _unsupported(estimator)
        for step in steps[:1]:
            yield from _find_parts(step, X, last and len(steps) == 1)
    elif _is_or_contains_counted(estimator):
        raise _unsupported(estimator)


def _counted_columns(transformer: ColumnTransformer, X: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the transformers that have a cost, and their columns."""
    if _is_or_contains_counted(transformer.remainder):
        raise _unsupported(transformer)
    for _, inner, columns in transformer.transformers:
        if _is_or_contains_counted(inner):
            chosen = columns(X) if callable(columns) else columns
            yield inner, _safe_indexing(X, chosen, axis=1)


def _is_or_contains_counted(estimator: Any) -> bool:
    has_inner = hasattr(estimator, "get_params") and not isinstance(estimator, type)
    inner = estimator.get_params().values() if has_inner else ()
    return any(isinstance(part, _COUNTED_ESTIMATORS) for part in (estimator, *inner))


def _members(ensemble: Any) -> list[Any]:
    """Return the members of an ensemble that have a cost."""
    members = [member for _, member in ensemble.estimators if _is_or_contains_counted(member)]
    if not members:
        raise _unsupported(ensemble)
    return members


def _check_refit(ensemble: Any) -> Any:
    """Return the `cv` of an ensemble, unless its members are fitted already."""
    if isinstance(ensemble.cv, str):
        raise TypeError(
            f"Got {type(ensemble).__name__} with cv={ensemble.cv!r}, whose cost cannot be counted, "
            "because it does not fit its members; estimate the cost of the members"
        )
    return ensemble.cv


def _unsupported(estimator: Any) -> TypeError:
    return TypeError(
        f"Got {type(estimator).__name__}, whose cost cannot be counted; expected a "
        "FineTunedImageClassifier, a PretrainedFeatureExtractor, a Pipeline that begins with one "
        "or with a FeatureUnion or ColumnTransformer of them, a VotingClassifier, "
        "StackingClassifier or CalibratedClassifierCV of these, or a scikit-learn search around "
        "any of these"
    )


def _candidates(search: Any, n_folds: int, n: int) -> tuple[list[Any], int]:
    """Return the candidates of a search, and the number of cross-validations in all rounds."""
    halving = hasattr(search, "factor")
    if hasattr(search, "param_grid"):
        chosen = list(ParameterGrid(search.param_grid))
    elif hasattr(search, "param_distributions"):
        count = search.n_candidates if halving else search.n_iter
        if count == "exhaust":
            low, high = search.min_resources, search.max_resources
            smallest = 2 * n_folds if search.resource == "n_samples" else 1
            # The search may stop earlier, so this is an upper bound.
            count = (n if high == "auto" else high) // (smallest if low == "smallest" else low)
        random_state = copy.deepcopy(search.random_state)
        chosen = list(
            ParameterSampler(search.param_distributions, count, random_state=random_state)
        )
    else:
        raise _unsupported(search)
    if halving and search.resource != "n_samples":
        chosen = [{**params, search.resource: search.max_resources} for params in chosen]
    candidates = [
        clone(search.estimator).set_params(**clone(params, safe=False)) for params in chosen
    ]
    total = remaining = len(candidates)
    while halving and remaining > 1:
        remaining = math.ceil(remaining / search.factor)
        total += remaining
    return candidates, total
