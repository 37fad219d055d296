"""Fine-tuning: for each stage, move the boundary, gather the activations there, and train.

Shapes: N images, V views of each, W values at a boundary, D features, K classes.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer.adaptation.adversary import Adversary
from sktransfer.backbones.weights import to_arrays
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.duplicates import EmbeddedImages, warn_of_leak
from sktransfer.finetuning.activations import (
    SelectedActivations,
    ViewActivations,
    disk_problem,
)
from sktransfer.finetuning.averaging import (
    TUNED,
    USUAL,
    Averaging,
    Tuned,
    averages,
    choose_averaging,
    held_out_to_choose,
)
from sktransfer.finetuning.batches import (
    CachedBatches,
    EpochBatches,
    ImageBatches,
    MapChange,
    PairedBatches,
    SoftTargets,
)
from sktransfer.finetuning.cut_network import Network
from sktransfer.finetuning.head import Head, LabeledEmbeddings
from sktransfer.finetuning.plan import FitPlan
from sktransfer.finetuning.schedule import ADVERSARY, HEAD, PRE_LOGITS, Stage, peak_rates
from sktransfer.finetuning.suffix import TrainedSuffix
from sktransfer.finetuning.task import UNLABELED, Task
from sktransfer.finetuning.train_stage import (
    StageConfig,
    TrainingState,
    evaluate,
    make_net,
    restore_history,
    resume_run,
    save_run,
    train_stage,
)
from sktransfer.finetuning.training_set import TrainingSet
from sktransfer.transforms.augmentation import Augmentation
from sktransfer.transforms.loader import find_broken
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError, warn_user
from sktransfer.utils.progress import FitProgress, TrialProgress
from sktransfer.utils.runtime import seeded

# Weight decay by default, and the larger one if some class has few images.
DECAY, SMALL_SET_DECAY = 0.01, 0.1
# Sides from which a cached feature map can lose a row and a column.
MIN_CROPPED_SIDE = 6


@dataclass(frozen=True)
class TunedState:
    """The result of a fit, from which the tuned network is rebuilt.

    Parameters
    ----------
    weights : dict of str to ndarray
        Of all parts that were trained, as `TrainedSuffix.state_of` names them.
    history : list of dict
        One for each epoch.
    """

    weights: dict[str, np.ndarray]
    history: list[dict[str, Any]]


class FineTuning:
    """One fit of a fine-tuned estimator.

    Parameters
    ----------
    estimator : FineTunedEstimator
        Only its parameters are read; nothing is set.
    network : Network
    task : Task
    plan : FitPlan
    train : TrainingSet
    valid : TrainingSet or None
    target : TrainingSet or None
        Unlabeled images of the domain on which the estimator will predict.
    compute : ComputeConfig
    augmentation : Augmentation or None
    seed : int
    checkpoint : Path or None
    activations : dict of str to SelectedActivations, optional
        Of each set of images, if they have been gathered; by name.
    strength : float or None
        The head's regularization; None chooses it.
    """

    def __init__(
        self,
        estimator: Any,
        network: Network,
        task: Task,
        plan: FitPlan,
        train: TrainingSet,
        valid: TrainingSet | None,
        *,
        target: TrainingSet | None = None,
        compute: ComputeConfig,
        augmentation: Augmentation | None,
        seed: int,
        checkpoint: Path | None = None,
        activations: dict[str, SelectedActivations] | None = None,
        strength: float | None = None,
    ) -> None:
        self.estimator, self.network, self.task = estimator, network, task
        self.train, self.valid, self.target, self.compute = train, valid, target, compute
        self.processes = compute.processes
        self.augmentation, self.seed = augmentation, seed
        self.checkpoint = checkpoint if self.processes.is_main else None
        self._selected, self._given_strength = activations, strength
        self.averaging = TUNED
        self.plan, self.stages = self._limit_to_disk(plan), plan.stages
        names = {block for stage in plan.stages for block in stage.blocks}
        self.trained = (*sorted(names, key=self._depth), *([PRE_LOGITS] if names else []), HEAD)
        self.saved_parts = (*self.trained, ADVERSARY)
        self.interrupted, self.verbose, self.min_batch = False, False, 1
        self.small = task.is_small(train.y, train.counts)
        self.valid_metric = f"valid_{task.metric_name}"
        if self.plan.adversarial and not names:
            raise ValueError(
                f"Got domain_adversarial={estimator.domain_adversarial:g} and unfreeze="
                f"{estimator.unfreeze!r}, but it only affects trained blocks, and no stage trains "
                "any; train blocks, as with unfreeze=(0, 2), or set domain_adversarial=0"
            )

    def _depth(self, block: str) -> int:
        return self.network.backbone.block_list.names.index(block)

    def run(self, progress: FitProgress | TrialProgress) -> tuple[Any, list[dict[str, Any]]]:
        """Train all stages; return the net and a report of each stage."""
        self.verbose = progress.drawn
        net = make_net(
            self._suffix(),
            self.task,
            device=self.compute.device,
            optimizer=self.estimator.optimizer,
            weight_decay=self.weight_decay,
            callbacks=self.estimator.callbacks or (),
        )
        if self.processes.count > 1:
            self._check_shareable(net.module_)
        self.min_batch = self._smallest_batch(net.module_)
        state = resume_run(self.checkpoint, net, self.processes) or TrainingState(seed=self.seed)
        for number in range(len(state.reports), len(self.stages)):
            start = time.perf_counter()
            completed = self._run_stage(net, state, number, progress)
            progress.stop = self.processes.any(progress.stop)
            state.reports.append(self._report(net, state, number, time.perf_counter() - start))
            if completed and not progress.stop:  # otherwise a fit resumes from the last epoch
                save_run(self.checkpoint, net, state, self.saved_parts)
            if not completed:
                self.interrupted = True
                warn_user(
                    f"The fit was interrupted in stage {self.stages[number].name!r}; the estimator "
                    "has the best weights so far",
                )
            if not completed or progress.stop:
                break
        if averages(self.estimator.averaging, self.plan) and not self.interrupted:
            self._average(net, state, progress)
        net.module_.detach_adversary()
        net.module_.move_boundary(self.network.boundary, ())
        return net, self._take_from_main(net, state.reports)

    def _take_from_main(self, net: Any, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Set weights and history to those of the main process, and return its reports.

        Otherwise times would differ, and on different devices the last bits of weights.
        """
        if self.processes.count == 1:
            return reports
        weights, history, reports = self.processes.from_main(
            lambda: (net.module_.state_of(self.trained), list(net.history_), reports)
        )
        net.module_.restore(weights)
        restore_history(net, history)
        return reports

    # The average of the weights before and after tuning.

    def _average(
        self, net: Any, state: TrainingState, progress: FitProgress | TrialProgress
    ) -> None:
        """Replace the tuned weights by their average with the weights before, and calibrate."""
        tuned = self._tuned(net)
        if state.averaging is not None:
            self.averaging = Averaging(*state.averaging)
        else:
            self.averaging = self._choose_averaging(tuned, progress)
            if not progress.stop:
                tuned.restore(TUNED)
                state.averaging = (self.averaging.share, self.averaging.factor)
                save_run(self.checkpoint, net, state, self.saved_parts)
                progress.note(f"Averaging: {self.averaging.describe()}")
        tuned.restore(self.averaging)

    def _choose_averaging(self, tuned: Tuned, progress: FitProgress | TrialProgress) -> Averaging:
        if self.estimator.averaging != "auto":
            return Averaging(float(self.estimator.averaging), 1.0)
        if self.valid is not None:
            batches = self._plain_batches(self.valid, self.stages[-1], self._activations["valid"])
            return self._choose_on(tuned, batches, self.valid)
        return self._usual if progress.stop else self._try_on_held_out(progress)

    def _choose_on(self, tuned: Tuned, batches: EpochBatches, held_out: TrainingSet) -> Averaging:
        chosen = choose_averaging(tuned, batches, held_out, self.task)
        return self.processes.from_main(lambda: chosen)

    def _tuned(self, net: Any) -> Tuned:
        suffix = self.network.suffix({stage.boundary for stage in self.stages}, self.compute)
        self._set_head(suffix)
        suffix.scale_head(self.task.start_factor)
        before, after = suffix.state_of(self.trained), net.module_.state_of(self.trained)
        return Tuned(net.module_, before, after)

    @property
    def _usual(self) -> Averaging:
        """The averaging of a fit that can hold out no images."""
        return TUNED if self.plan.trains_all else USUAL

    def _try_on_held_out(self, progress: FitProgress | TrialProgress) -> Averaging:
        """Train on some of the training images, and choose on the others."""
        held_out_rows = held_out_to_choose(self.plan, self.task, self.train.y, self.seed)
        if not len(held_out_rows):
            return self._usual
        rest = np.setdiff1d(np.arange(len(self.train.y)), held_out_rows)
        options = copy.copy(self.estimator)
        options.callbacks, options.averaging = None, 1.0
        n_views, whole = 1 + self.plan.n_views, self._view_activations["train"]
        views = (rest[:, None] * n_views + np.arange(n_views)).ravel()
        trial = FineTuning(
            options,
            self.network,
            self.task,
            self.plan,
            self.train.take(rest),
            None,
            compute=self.compute,
            augmentation=self.augmentation,
            seed=self.seed,
            activations={"train": SelectedActivations(whole, views)},
            strength=self._head.strength,
        )
        trial_progress = TrialProgress(progress.drawn, "held-out check")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit itself has warned
            try:
                net, _ = trial.run(trial_progress)
                interrupted = trial.interrupted
            except FloatingPointError:
                return self._usual
            except KeyboardInterrupt:
                if self.processes.count > 1:  # the other processes end, too
                    raise
                interrupted = True
        if interrupted:
            self.interrupted = True
            warn_user(
                "The fit was interrupted in its check on held-out images; the estimator averages "
                "the weights as usual",
            )
            return self._usual
        held_out, last = self.train.take(held_out_rows), self.stages[-1]
        unchanged: ViewActivations | SelectedActivations
        if self.plan.cached:
            unchanged = SelectedActivations(whole, held_out_rows * n_views)
        else:
            unchanged = self._new_activations(held_out, 0, last.boundary)
        batches = self._plain_batches(held_out, last, unchanged)
        return self._choose_on(trial._tuned(net), batches, held_out)

    def _suffix(self) -> TrainedSuffix:
        """Build the trained part, with an adversary if there is one."""
        suffix = self.network.suffix({stage.boundary for stage in self.stages}, self.compute)
        if self.plan.adversarial:
            with seeded(self.seed):
                adversary = Adversary(suffix.head.in_features, self.estimator.domain_adversarial)
            suffix.attach_adversary(adversary)
        return suffix

    def _check_shareable(self, suffix: TrainedSuffix) -> None:
        """Raise a ValueError if processes that share batches would train another network."""
        options = self.estimator
        learning = any(
            suffix.learning_layers((*stage.blocks, PRE_LOGITS))
            for stage in self.plan.trained_stages
        )
        if learning:
            raise ValueError(
                f"Got batch_norm={options.batch_norm!r} and weights={options.weights!r} with "
                f"{self.processes.count} processes, but BatchNorm would learn the statistics of a "
                "part of each batch only. Use batch_norm='frozen' with pretrained weights, or fit "
                "in one process"
            )
        if self.plan.adversarial:
            raise ValueError(
                f"Got domain_adversarial={options.domain_adversarial:g} with "
                f"{self.processes.count} processes, but an adversary needs whole batches; set "
                "domain_adversarial=0, or fit in one process"
            )

    def _smallest_batch(self, suffix: TrainedSuffix) -> int:
        """Return the number of images from which every stage can learn BatchNorm statistics.

        Raises
        ------
        ValueError
            If no batch can have that many.
        """
        if not any(
            suffix.needs_several_images(stage.boundary, (*stage.blocks, PRE_LOGITS))
            for stage in self.plan.trained_stages
        ):
            return 1
        options, n_images = self.estimator, len(self.train.y)
        if options.batch_size > 1 and n_images > 1:
            return 2
        got = f"batch_size={options.batch_size}" if n_images > 1 else "one training image"
        crop = self.network.preprocessing.crop
        raise ValueError(
            f"Got {got}, but BatchNorm learns its statistics (batch_norm={options.batch_norm!r}, "
            f"weights={options.weights!r}), and at {crop[0]}x{crop[1]} pixels a feature map has "
            "one position, so a single image has no variance. Use batch_size=2 or more and at "
            "least two training images, a larger image_size, or batch_norm='frozen' with "
            "pretrained weights"
        )

    def tuned_state(self, net: Any) -> TunedState:
        """Return the state from which an estimator predicts as the net does now."""
        return TunedState(to_arrays(net.module_.state_of(self.trained)), list(net.history_))

    @property
    def weight_decay(self) -> float:
        """The weight decay in use."""
        if self.estimator.weight_decay == "auto":
            return SMALL_SET_DECAY if self.small else DECAY
        return float(self.estimator.weight_decay)

    def _run_stage(
        self, net: Any, state: TrainingState, number: int, progress: FitProgress | TrialProgress
    ) -> bool:
        stage, options = self.stages[number], self.estimator
        rates = peak_rates(
            stage,
            lr=options.lr,
            lr_drop=options.lr_drop,
            lr_decay=options.lr_decay,
            scratch=options.weights is None,
            adversarial=self.plan.adversarial,
        )
        net.module_.move_boundary(stage.boundary, rates)
        trainable = net.module_.count_trained()
        if stage.head_only:
            with progress.stage(stage.name, 0, trainable=trainable) as epochs:
                self._run_head_stage(net, state)
                metrics = {}
                if self.valid is not None:
                    metrics = {"valid_loss": state.best_loss, self.valid_metric: state.best_metric}
                epochs.update(metrics, self._reconstruction(net))
            return True
        after_head = number == 1 and self.stages[0].head_only
        config = StageConfig(
            number=number,
            stage=stage,
            task=self.task,
            rates=rates,
            train=self._train_batches_of_stage(number),
            valid=self._valid_batches(stage),
            max_epochs=options.max_epochs,
            patience=options.n_iter_no_change if options.early_stopping else None,
            checkpoint=self.checkpoint,
            saved_parts=self.saved_parts,
            reconstruction=self._reconstruction(net),
            head_factor=self.task.start_factor if after_head else 1.0,
            averaged_later=after_head and averages(options.averaging, self.plan),
        )
        shown = (max(rates.values()), min(rates.values()))
        with progress.stage(stage.name, config.max_epochs, trainable=trainable, lr=shown) as epochs:
            try:
                return train_stage(net, state, config, epochs)
            except ImageError as error:  # an epoch reads only some of the images
                sets = (self.train, self.valid, self.target)
                images = (part.images for part in sets if part is not None)
                broken = find_broken(images, self.compute.threads)
                raise ImageError.of([error, *broken]) from error

    def _reconstruction(self, net: Any) -> Callable[[], dict[str, Any]]:
        """Return a function to the fitted attributes of a copy that predicts as the net does."""
        return lambda: {"_net": None, "_tuned": self.tuned_state(net)}

    def _run_head_stage(self, net: Any, state: TrainingState) -> None:
        self._set_head(net.module_)
        valid_batches = self._valid_batches(self.stages[0])
        if valid_batches is not None:
            state.best_loss, state.best_metric = evaluate(net, valid_batches, self.task)

    def _set_head(self, suffix: TrainedSuffix) -> None:
        suffix.set_head(self._head.weight, self._head.bias, self._head.penalty)

    @cached_property
    def _head(self) -> Head:
        """The head on embeddings of the network before tuning."""
        train = self._activations["train"].at(self.plan.n_blocks)
        values = None
        if self.valid is not None:
            values = self._activations["valid"].at(self.plan.n_blocks).values
        return self.processes.from_main(lambda: self._fit_head_on(train.values, values))

    def _fit_head_on(self, train: np.ndarray, values: np.ndarray | None) -> Head:
        """Fit the head on embeddings of training views, and of validation images if any."""
        embeddings = train.reshape(len(self.train.y), -1, train.shape[1])
        valid = None
        if self.valid is not None and values is not None:
            valid = LabeledEmbeddings(values[:, None], self.valid.y, self.valid.weights)
            warn_of_leak(
                EmbeddedImages(self.train.images, embeddings[:, 0]),
                EmbeddedImages(self.valid.images, values),
                self.compute.threads,
            )
        return self.task.fit_head(
            LabeledEmbeddings(embeddings, self.train.y, self.train.weights),
            valid,
            strength=self._given_strength,
            device=self.compute.device,
        )

    # Batches to train and to validate on.

    def _train_batches_of_stage(self, number: int) -> EpochBatches | PairedBatches:
        """Return the batches of a stage, paired with target images if it is adversarial."""
        targets = SoftTargets(
            self.train.y, self.train.weights, self.task, self.estimator.label_smoothing
        )
        batches = self._view_batches(number, self.train, targets, "train")
        if self.target is None or not self.plan.adversarial:
            return batches
        placeholder = SoftTargets(self.target.y, self.target.weights, UNLABELED)
        target = self._view_batches(number, self.target, placeholder, "target", len(batches))
        return PairedBatches(batches, target)

    def _view_batches(
        self,
        number: int,
        images: TrainingSet,
        targets: SoftTargets,
        name: str,
        length: int | None = None,
    ) -> EpochBatches:
        """Return batches of the views of images, cached or read again in each epoch."""
        options, stage = self.estimator, self.stages[number]
        settings: dict[str, Any] = {
            "mixup": options.mixup,
            "length": length,
            "min_size": self.min_batch,
            "processes": self.processes,
        }
        common = (targets, options.batch_size, self.compute.device)
        if self.plan.is_cached(stage):
            values = self._activations[name].at(stage.boundary).values
            values = values.reshape(len(targets.y), 1 + self.plan.n_views, -1)
            return CachedBatches(values, *common, change=self._map_change(stage), **settings)
        change = None
        run = self.network.runner(stage.boundary, self.compute, len(targets.y) * options.max_epochs)
        if self.plan.fresh or stage.boundary == 0:
            n_earlier = sum(not earlier.head_only for earlier in self.stages[:number])
            views_of = partial(self._fresh_views, images, n_earlier * options.max_epochs)
        else:
            views_of, change = partial(self._fixed_views, images), self._map_change(stage)
        threads = self.compute.threads
        return ImageBatches(views_of, run, threads, *common, change=change, **settings)

    def _map_change(self, stage: Stage) -> MapChange | None:
        """Return how feature maps of fixed views are augmented; None if they have no positions."""
        shape = self.network.shape_at(stage.boundary, self.compute)
        layout = self.network.backbone.block_list.layout
        if self.augmentation is None or layout != "NCHW" or len(shape) != 3:
            return None
        smaller = (shape[0], shape[1] - 1, shape[2] - 1)
        crops = min(shape[1:]) >= MIN_CROPPED_SIDE and self.network.accepts(
            stage.boundary, smaller, self.compute
        )
        return MapChange(shape, self.augmentation.mirrors, crops)

    def _valid_batches(self, stage: Stage) -> EpochBatches | None:
        if self.valid is None:
            return None
        return self._plain_batches(self.valid, stage, self._activations["valid"])

    def _plain_batches(
        self,
        images: TrainingSet,
        stage: Stage,
        activations: ViewActivations | SelectedActivations,
    ) -> EpochBatches:
        """Return batches of images without augmentation, in their order."""
        targets = SoftTargets(images.y, images.weights, self.task)
        common = (targets, self.estimator.batch_size, self.compute.device)
        settings: dict[str, Any] = {"shuffle": False, "processes": self.processes}
        if stage.boundary > 0:
            values = activations.at(stage.boundary).values
            return CachedBatches(values[:, None], *common, **settings)
        views = Views(images.images, self.network.preprocessing)
        run = self.network.runner(0, self.compute, len(targets.y))
        return ImageBatches(lambda _: (views, 1), run, self.compute.threads, *common, **settings)

    def _fixed_views(self, images: TrainingSet, epoch: int) -> tuple[Views, int]:
        """Return the views that every epoch draws from, and their number per image."""
        return self._views(images, self.plan.n_views), 1 + self.plan.n_views

    def _fresh_views(
        self, images: TrainingSet, n_earlier_epochs: int, epoch: int
    ) -> tuple[Views, int]:
        """Return one view of each image, different in each epoch of each stage."""
        views = Views(
            images.images,
            self.network.preprocessing,
            self.augmentation,
            only=1 + n_earlier_epochs + epoch,
            salt=self.seed.to_bytes(8, "little"),
        )
        return views, 1

    def _views(self, images: TrainingSet, n_views: int) -> Views:
        return Views(images.images, self.network.preprocessing, self.augmentation, n_views)

    # Activations at the boundaries.

    def _limit_to_disk(self, plan: FitPlan) -> FitPlan:
        """Return the plan without cached activations, after a warning, if they do not fit."""
        if not plan.cached or self._selected is not None:
            return plan
        n_target = 0 if self.target is None else len(self.target.y)
        count = plan.count_cached_views(len(self.train.y), n_target)
        recipe = self.network.recipe(plan.first_boundary, self.compute)
        store = self.compute.store
        problem = self.processes.from_main(lambda: disk_problem(count, recipe, store))
        if problem is None:
            return plan
        parts = [*self.network.backbone.block_list.names, HEAD]
        warn_user(
            f"The activations of {count} views before {parts[plan.first_boundary]!r} take "
            f"{problem}, so they are computed again in every epoch, which is slow. Decrease "
            "n_views, train fewer blocks, or pass a cache with a higher limit",
        )
        return plan.without_cache()

    @property
    def _activations(self) -> Mapping[str, ViewActivations | SelectedActivations]:
        """The activations of each set of images."""
        return self._view_activations if self._selected is None else self._selected

    @cached_property
    def _view_activations(self) -> dict[str, ViewActivations]:
        """The activations of each set of images, gathered when the first ones are needed."""
        first, n_views = self.plan.first_boundary, self.plan.n_views
        wanted = {
            "train": (self.train, n_views, self.plan.gathering_boundary),
            "valid": (self.valid, 0, first),
            "target": (self.target, n_views, first),
        }
        activations = {
            name: self._new_activations(images, count, boundary)
            for name, (images, count, boundary) in wanted.items()
            if images is not None
        }
        self._gather(activations)
        return activations

    def _new_activations(self, images: TrainingSet, n_views: int, boundary: int) -> ViewActivations:
        recipe_at = partial(self.network.recipe, compute=self.compute)
        views = self._views(images, n_views)
        return ViewActivations(views, recipe_at, boundary, self.compute, self.verbose)

    def _gather(self, activations: dict[str, ViewActivations]) -> None:
        """Gather the activations that the fit needs; one error names the broken images of all."""
        needed = {
            "train": self.plan.cached or self.stages[0].head_only,
            "valid": True,
            "target": self.plan.cached and self.plan.adversarial,
        }
        broken: list[ImageError] = []
        for name, views in activations.items():
            if needed[name]:
                try:
                    views.gathered  # noqa: B018
                except ImageError as error:
                    broken.append(error)
        if broken:
            raise ImageError.of(broken)

    def _report(
        self, net: Any, state: TrainingState, number: int, seconds: float
    ) -> dict[str, Any]:
        stage = self.stages[number]
        epochs = 0 if stage.head_only else state.epoch
        return {
            "stage": stage.name,
            "blocks": list(stage.blocks),
            "boundary": stage.boundary,
            "trainable": net.module_.count_trained(),
            "epochs": epochs,
            "best_epoch": state.best_epoch if epochs and self.valid is not None else epochs,
            "valid_loss": None if self.valid is None else state.best_loss,
            self.valid_metric: None if self.valid is None else state.best_metric,
            "C": self._head.strength if stage.head_only else None,
            "seconds": round(seconds, 2),
        }
