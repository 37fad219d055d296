"""What a fit, a cross-validation or a search will cost: counted without fitting, and timed.

Shapes: N images.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from sklearn.base import clone, is_classifier
from sklearn.model_selection import ParameterGrid, ParameterSampler, check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils.validation import _num_samples, check_consistent_length

from sktransfer.adaptation.batch_norm import MAX_MATCHED_IMAGES
from sktransfer.backbones.loading import load_backbone
from sktransfer.classifier import FineTunedImageClassifier
from sktransfer.data.labels import split_domains
from sktransfer.data.validation import check_images
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.embed import embed
from sktransfer.embedding.recipe import Recipe, output_width
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.finetuning.activations import fits_on_disk
from sktransfer.finetuning.cut_network import Network
from sktransfer.finetuning.fit_inputs import check_parameters
from sktransfer.finetuning.plan import FitPlan, held_out_fraction, make_plan
from sktransfer.finetuning.schedule import HEAD, PRE_LOGITS, Stage
from sktransfer.finetuning.task import UNLABELED, ClassificationTask
from sktransfer.finetuning.train_stage import make_net
from sktransfer.store.session import resolve_store
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.views import Views
from sktransfer.utils.runtime import seeded

# Images that are timed, on a CPU and on an accelerator, which wants many at once.
_FEW, _MANY = 8, 64

_OURS = (FineTunedImageClassifier, PretrainedFeatureExtractor)


@dataclass(frozen=True)
class Cost:
    """What fits cost, as `estimate_cost` finds it; counts are at most.

    Parameters
    ----------
    fits : int
        Of the estimator, refits included.
    images_embedded : int
        Images and copies that go through frozen blocks: once for each boundary where a store
        shares them, as often as they are needed where none does, and to adapt BatchNorm.
    images_trained : int
        Images of all training steps, if no stage ends early.
    bytes_cached : int
        What activations take on the disk: in the store, and in the files of one fit at a time.
    seconds : float
        Of one process on this machine. Solving the head, and other steps of a pipeline, are not
        in it.
    """

    fits: int
    images_embedded: int
    images_trained: int
    bytes_cached: int
    seconds: float

    def __repr__(self) -> str:
        lines = [f"  {k.replace('_', ' '):<18} {round(v, 1):,}" for k, v in vars(self).items()]
        return "\n".join(["Cost, at most", *lines]) + " in one process, besides solving heads"


def estimate_cost(
    estimator: Any, X: Any, y: Any = None, *, cv: Any = None, sample_domain: Any = None
) -> Cost:
    """Estimate what fitting an estimator costs, before it is fitted.

    Nothing is fitted, and no store is looked into or filled: what it holds already costs less.

    Parameters
    ----------
    estimator : estimator
        A `FineTunedImageClassifier`, a `PretrainedFeatureExtractor`, a `Pipeline` or `FeatureUnion`
        with them, or a search of scikit-learn's around one of these. For a halving search the cost
        is an upper bound: as if all its fits had all resources. A random search without
        `random_state` may draw other candidates later.
    X : images in any container that the estimator takes
    y : array-like of shape (N,), default=None
        Labels; only an extractor alone does without.
    cv : int, splitter or None, default=None
        The cost of `cross_val_score(estimator, X, y, cv=cv)`; around a search that is a nested
        cross-validation. `None` is the cost of `estimator.fit(X, y)`.
    sample_domain : array-like of shape (N,), int, default=None
        As `FineTunedImageClassifier.fit` takes it: which images are of the target domain.

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
      images embedded    120
      images trained     600
      bytes cached       ...
      seconds            ... in one process, besides solving heads
    """
    state = np.random.get_state()
    try:
        with seeded():
            return _Estimate(X, y, sample_domain).cost(estimator, cv)
    finally:
        np.random.set_state(state)


class _CostTally:
    """What fits take: the sums of `Cost`, and what the store shares of which rows, masks (N,)."""

    def __init__(self, fits: int = 0) -> None:
        self.sums, self.scratch = np.array([fits, 0, 0, 0.0]), 0  # bytes apart
        self.kept: dict[Hashable, tuple[float, int, np.ndarray]] = {}

    def add(self, other: _CostTally, *, most: bool = False) -> None:
        """Take another tally on; or, with `most`, the larger one of each sum."""
        self.sums = (np.maximum if most else np.add)(self.sums, other.sums)
        self.scratch = max(self.scratch, other.scratch)
        for key, item in other.kept.items():
            self.keep(key, *item)

    def keep(self, key: Hashable, seconds: float, size: int, rows: np.ndarray) -> None:
        """Share with other fits what is done to some rows."""
        seen = rows | self.kept[key][2] if key in self.kept else rows
        self.kept[key] = (seconds, size, seen)

    def add_images(self, count: int, seconds: float, embeds: int = 0, trains: int = 0) -> None:
        """Do something to images, each of which takes some seconds."""
        self.sums += (0, count * embeds, count * trains, count * seconds)


class _Part:
    """An estimator of this package, and what its fits take."""

    def __init__(
        self,
        estimator: Any,
        X: Any,
        task: ClassificationTask,
        is_target: np.ndarray,
        times: dict[Any, float],
    ) -> None:
        self.is_target = is_target
        self.estimator, self.task, self._times = estimator, task, times
        self._images = check_images(clone(estimator), X, reset=True)
        self.tunes = isinstance(estimator, FineTunedImageClassifier)
        if self.tunes:
            check_parameters(estimator)
        self.backbone = load_backbone(estimator.backbone, estimator.weights)
        names = [name for name, _ in self.backbone.block_list.blocks]
        self.end = len(names)
        self.augmentation = resolve_augmentation(estimator.augment) if self.tunes else None
        self.plan = make_plan(estimator, names, self.augmentation) if self.tunes else None
        self.stages = self.plan.stages if self.plan else ()
        size = self.backbone.image_size_for(estimator.image_size, self._images)
        seen = self.backbone.preprocessing.with_image_size(size)
        last = self.stages[-1].boundary if self.tunes else self.end
        dropout = estimator.dropout if self.tunes else 0.0
        learns = estimator.batch_norm == "train" or estimator.weights is None
        self.network = Network(self.backbone, seen, last, task.n_outputs, dropout, learns)
        self.compute = ComputeConfig.of(clone(estimator).set_params(cache=None))
        self.store = resolve_store(estimator.cache)

    def recipe(self, boundary: int | None) -> Recipe:
        """Build the recipe of a boundary, or of an extractor's layers."""
        if boundary is not None:
            return self.network.recipe(boundary, self.compute)
        layer = self.estimator.layer
        layers = tuple(layer) if isinstance(layer, (list, tuple)) else (layer,)
        recipe = self.network.recipe(self.end, self.compute)
        return replace(recipe, layers=layers, pooling=self.estimator.pooling)

    def bytes_at(self, boundary: int | None) -> int:
        """Count the bytes of an image's activations."""
        recipe = self.recipe(boundary)
        return output_width(recipe) * np.dtype(recipe.dtype).itemsize

    def tally(self, rows: np.ndarray, predicted: list[np.ndarray]) -> _CostTally:
        """Count a fit on some rows, and predictions of others; all are masks (N,)."""
        tally, salt = _CostTally(), b""
        source, target = rows & ~self.is_target, rows & self.is_target
        if self.estimator.batch_norm == "adapt":  # to other images, it is another network
            adapted = int(source.sum())
            if self.tunes and target.any():  # both domains are matched when training has ended
                adapted = sum(min(int(each.sum()), MAX_MATCHED_IMAGES) for each in (source, target))
            elif not self.tunes:
                adapted = int(rows.sum())
            tally.add_images(adapted, self._embedding(self.end), embeds=1)
            salt = rows.tobytes()
        if self.plan is None:
            self._embed(tally, None, np.any([rows, *predicted], axis=0), 0, salt)
            return tally
        self._train(tally, self.plan, source, target, salt)
        for mask in predicted:
            if not self.stages[-1].head_only:  # prediction takes no more than a training step
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
            copied = self.augmentation.digest if view and self.augmentation else None
            key = (self.store.directory, digest, view, copied, salt)
            tally.keep(key, seconds, self.bytes_at(boundary), rows)

    def _train(
        self,
        tally: _CostTally,
        plan: FitPlan,
        source: np.ndarray,
        target: np.ndarray,
        salt: bytes,
    ) -> None:
        """Count what `FineTuning` does with images of the source and of the target, masks (N,)."""
        options, n = self.estimator, int(source.sum())
        views, first = plan.count_cached_views(n, int(target.sum())), plan.first_boundary
        if plan.cached and fits_on_disk(views, self.recipe(first), self.store) is not None:
            plan = plan.without_cache()
        start = plan.gathering_boundary
        if plan.cached or plan.stages[0].head_only:
            self._embed(tally, start, source, plan.n_views, salt)
            if plan.cached and plan.adversarial:
                self._embed(tally, start, target, plan.n_views, salt)
            later = {stage.boundary for stage in plan.stages if stage.boundary > start}
            for boundary in later:
                between = max(0.0, self._embedding(boundary) - self._embedding(start))
                tally.add_images(views, between)
            most = max(map(self.bytes_at, later), default=0)
            tally.scratch = views * (self.bytes_at(start) + most)
        fraction = held_out_fraction(options, n)
        if first and not plan.cached and fraction:
            held_out = math.ceil(fraction * n) + self.network.n_outputs
            tally.add_images(held_out, self._embedding(first), embeds=1)
        # Each image of the source trains beside one of the target.
        shown = n * options.max_epochs * (2 if plan.adversarial else 1)
        for stage in plan.trained_stages:
            tally.add_images(shown, self._step(stage), trains=1)
            if stage.boundary and not plan.cached:
                tally.add_images(shown, self._embedding(stage.boundary), embeds=1)

    @cached_property
    def _views(self) -> Views:
        """A few images, from everywhere in `X`, augmented where copies are made."""
        few = self._images.sample(_FEW if self.compute.device.type == "cpu" else _MANY)
        return Views(few, self.network.preprocessing, self.augmentation, only=1)

    def _embedding(self, boundary: int | None) -> float:
        """Measure the seconds that an image takes from the file to a boundary."""
        recipe = self.recipe(boundary)
        run = partial(embed, self._views, recipe, self.compute, n_images=len(self._images))
        return self._time(recipe.digest, len(self._views), run)

    def _step(self, stage: Stage) -> float:
        """Measure the seconds that an image takes in a training step."""
        options, compute = self.estimator, self.compute
        size = min(options.batch_size, len(self._views))
        key = (self.recipe(self.end).digest, stage, self.network.boundary, size)
        if key not in self._times:
            suffix = self.network.suffix({stage.boundary}, compute)
            net = make_net(suffix, self.task, device=compute.device, optimizer=options.optimizer)
            suffix.move_boundary(stage.boundary, (*stage.blocks, PRE_LOGITS, HEAD))
            x = torch.rand(size, *suffix.shapes[stage.boundary], device=compute.device)
            y = torch.ones(size, self.network.n_outputs, device=compute.device)
            with seeded(0, compute.device):
                self._time(key, size, lambda: net.train_step((x, y))["loss"].item())
        # Images that are not cached have to be read too; the first block is on the safe side.
        return self._times[key] + (0 if stage.boundary else self._embedding(1))

    def _time(self, key: Hashable, count: int, action: Callable[[], Any]) -> float:
        """Measure what an action takes for one of `count` images, the second time."""
        if key not in self._times:
            action()
            start = time.perf_counter()
            action()
            self._times[key] = (time.perf_counter() - start) / count
        return self._times[key]


class _Estimate:
    """The tallies of fits, added up, and what they come to."""

    def __init__(self, X: Any, y: Any, sample_domain: Any) -> None:
        check_consistent_length(X, y)
        self.X, self.n = X, _num_samples(X)
        self.is_target = np.zeros(self.n, dtype=bool)
        if sample_domain is not None:
            self.is_target[split_domains(sample_domain, self.n)[1]] = True
        self.y = None if y is None else np.asarray(y)
        self._parts: dict[Any, list[tuple[_Part, bool]]] = {}
        self._times: dict[Hashable, float] = {}

    def cost(self, estimator: Any, cv: Any) -> Cost:
        rows = np.ones(self.n, dtype=bool)
        folds = [] if cv is None else self._split(cv, estimator, rows)
        tally = self._cross(estimator, folds) if folds else self._tally(estimator, rows, [])
        for seconds, _, rows in tally.kept.values():
            tally.add_images(int(rows.sum()), seconds, embeds=1)
        size = sum(size * int(rows.sum()) for _, size, rows in tally.kept.values())
        fits, embedded, trained, seconds = tally.sums.tolist()
        return Cost(int(fits), int(embedded), int(trained), size + tally.scratch, seconds)

    def _tally(self, estimator: Any, rows: np.ndarray, predicted: list[np.ndarray]) -> _CostTally:
        """Count a fit on some rows, and predictions of others."""
        if isinstance(estimator, BaseSearchCV):
            return self._search(estimator, rows, predicted)
        if estimator not in self._parts:
            found = list(_find_parts(estimator))
            if not found:
                raise _cannot(estimator)
            if self.y is None and any(hasattr(each, "unfreeze") for each, _ in found):
                raise ValueError("Got y=None, but a FineTunedImageClassifier needs labels")
            task = (
                UNLABELED
                if self.y is None
                else ClassificationTask(np.unique(self.y[~self.is_target]))
            )
            common = (self.X, task, self.is_target, self._times)
            self._parts[estimator] = [(_Part(each, *common), last) for each, last in found]
        tally = _CostTally(fits=1)
        for part, last in self._parts[estimator]:
            tally.add(part.tally(rows, predicted if last else [rows, *predicted]))
        return tally

    def _cross(self, estimator: Any, splits: list[Any], *, twice: bool = False) -> _CostTally:
        """Count a cross-validation; with `twice`, training rows are predicted too."""
        tally = _CostTally()
        for train, test in splits:
            tally.add(self._tally(estimator, train, [test, train] if twice else [test]))
        return tally

    def _search(self, search: Any, rows: np.ndarray, predicted: list[np.ndarray]) -> _CostTally:
        tally, most_expensive, refit = _CostTally(), _CostTally(), _CostTally()
        splits = self._split(search.cv, search.estimator, rows)
        candidates, total = _candidates(search, len(splits), int(rows.sum()))
        for candidate in candidates:
            own = self._cross(candidate, splits, twice=search.return_train_score)
            tally.add(own)
            most_expensive.add(own, most=True)
            if search.refit:  # which one it will be is not known yet
                refit.add(self._tally(candidate, rows, predicted), most=True)
        rounds = [most_expensive] * (total - len(candidates))  # of a halving search
        for more in [refit, *rounds]:
            tally.add(more)
        return tally

    def _split(self, cv: Any, estimator: Any, rows: np.ndarray) -> list[Any]:
        if isinstance(cv, Iterator):
            raise TypeError(f"Got cv={cv!r}, which ends when it is counted; pass list(cv)")
        places = np.flatnonzero(rows)
        y = None if self.y is None else self.y[places]
        splitter = check_cv(copy.deepcopy(cv), y, classifier=is_classifier(estimator))
        splits = splitter.split(np.zeros(len(places)), y)
        return [[np.bincount(places[f], minlength=self.n) > 0 for f in split] for split in splits]


def _find_parts(estimator: Any, last: bool = True) -> Iterator[tuple[Any, bool]]:
    """Return the estimators of this package, and whether each is the last step."""
    if isinstance(estimator, _OURS):
        yield estimator, last
    elif isinstance(estimator, FeatureUnion):
        for _, each in estimator.transformer_list:
            yield from _find_parts(each, False)
    elif isinstance(estimator, Pipeline):
        steps = [step for _, step in estimator.steps if step not in (None, "passthrough")]
        if any(_contains_ours(step) for step in steps[1:]):
            raise _cannot(estimator)
        for step in steps[:1]:
            yield from _find_parts(step, last and len(steps) == 1)
    elif _contains_ours(estimator):
        raise _cannot(estimator)


def _contains_ours(estimator: Any) -> bool:
    inner = estimator.get_params().values() if hasattr(estimator, "get_params") else ()
    return any(isinstance(each, _OURS) for each in (estimator, *inner))


def _cannot(estimator: Any) -> TypeError:
    return TypeError(
        f"Got {type(estimator).__name__}, whose cost cannot be counted; expected a "
        "FineTunedImageClassifier, a PretrainedFeatureExtractor, a Pipeline that begins with one "
        "or with a FeatureUnion of them, or a search of scikit-learn's around any of these"
    )


def _candidates(search: Any, n_folds: int, n: int) -> tuple[list[Any], int]:
    """Build the candidates of a search, and count how often one of them is cross-validated."""
    halving = hasattr(search, "factor")
    if hasattr(search, "param_grid"):
        chosen = list(ParameterGrid(search.param_grid))
    elif hasattr(search, "param_distributions"):
        count = search.n_candidates if halving else search.n_iter
        if count == "exhaust":  # at most
            least, most = search.min_resources, search.max_resources
            smallest = 2 * n_folds if search.resource == "n_samples" else 1
            count = (n if most == "auto" else most) // (smallest if least == "smallest" else least)
        random_state = copy.deepcopy(search.random_state)
        chosen = list(
            ParameterSampler(search.param_distributions, count, random_state=random_state)
        )
    else:
        raise _cannot(search)
    if halving and search.resource != "n_samples":
        chosen = [{**each, search.resource: search.max_resources} for each in chosen]
    candidates = [clone(search.estimator).set_params(**clone(each, safe=False)) for each in chosen]
    total = remaining = len(candidates)
    while halving and remaining > 1:
        remaining = math.ceil(remaining / search.factor)
        total += remaining
    return candidates, total
