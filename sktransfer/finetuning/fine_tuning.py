"""Fine-tuning: for each stage, move the boundary, bring what crosses it, and train.

Shapes: N images, V views of each, W values at a boundary, D features, K classes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sktransfer.adaptation.adversary import Adversary
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.duplicates import EmbeddedImages, warn_of_leak
from sktransfer.finetuning.activations import Activations, fits_on_disk, gather
from sktransfer.finetuning.batches import (
    CachedBatches,
    EpochBatches,
    ImageBatches,
    PairedBatches,
    SoftTargets,
)
from sktransfer.finetuning.cut_network import Network
from sktransfer.finetuning.head import LabeledEmbeddings
from sktransfer.finetuning.plan import FitPlan
from sktransfer.finetuning.schedule import ADVERSARY, HEAD, PRE_LOGITS, Stage, peak_rates
from sktransfer.finetuning.suffix import TrainedSuffix
from sktransfer.finetuning.task import UNLABELED, Task
from sktransfer.finetuning.train_stage import (
    StageConfig,
    TrainingState,
    evaluate,
    make_net,
    resume_run,
    save_run,
    train_stage,
)
from sktransfer.finetuning.training_set import TrainingSet
from sktransfer.transforms.augmentation import Augmentation
from sktransfer.transforms.views import Views
from sktransfer.utils.progress import FitProgress
from sktransfer.utils.runtime import seeded

# Weight decay where the estimator leaves it open; more where some class has few images.
DECAY, SMALL_SET_DECAY = 0.01, 0.1


class FineTuning:
    """One fit of a classifier.

    Parameters
    ----------
    estimator : FineTunedImageClassifier
        Its parameters are read, and nothing is written.
    network : Network
    task : Task
    plan : FitPlan
    train : TrainingSet
    valid : TrainingSet or None
    target : TrainingSet or None
        Unlabeled, of the domain that the classifier is for.
    machine : ComputeConfig
    augmentation : Augmentation or None
    seed : int
    checkpoint : Path or None
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
        machine: ComputeConfig,
        augmentation: Augmentation | None,
        seed: int,
        checkpoint: Path | None = None,
    ) -> None:
        self.estimator, self.network, self.task = estimator, network, task
        self.plan, self.stages = plan, plan.stages
        self.train, self.valid, self.target, self.machine = train, valid, target, machine
        self.augmentation, self.seed, self.checkpoint = augmentation, seed, checkpoint
        self._valid_at_boundary: Activations | None = None
        names = {block for stage in plan.stages for block in stage.blocks}
        self.trained = (*sorted(names, key=self._depth), *([PRE_LOGITS] if names else []), HEAD)
        self.kept = (*self.trained, ADVERSARY)
        self.interrupted = False
        self.small = task.is_small(train.y, train.counts)
        self.valid_metric = f"valid_{task.metric_name}"
        if self.plan.adversarial and not names:
            raise ValueError(
                f"Got domain_adversarial={estimator.domain_adversarial:g} and unfreeze="
                f"{estimator.unfreeze!r}, but no stage trains blocks that could learn from it; add "
                "one, such as unfreeze=(0, 2), or set domain_adversarial=0"
            )

    def _depth(self, block: str) -> int:
        return [name for name, _ in self.network.backbone.block_list.blocks].index(block)

    def run(self, progress: FitProgress) -> tuple[Any, list[dict[str, Any]]]:
        """Train all stages; give the net, and what each stage did."""
        net = make_net(
            self._suffix(),
            self.task,
            device=self.machine.device,
            optimizer=self.estimator.optimizer,
            weight_decay=self.weight_decay,
            callbacks=self.estimator.callbacks or (),
        )
        state = resume_run(self.checkpoint, net) or TrainingState(seed=self.seed)
        for number in range(len(state.reports), len(self.stages)):
            start = time.perf_counter()
            going_on = self._run_stage(net, state, number, progress)
            state.reports.append(self._report(net, state, number, time.perf_counter() - start))
            if going_on and not progress.stop:  # otherwise, the last epoch is what to resume from
                save_run(self.checkpoint, net, state, self.kept)
            if not going_on:
                self.interrupted = True
                warnings.warn(
                    f"Interrupted in stage {self.stages[number].name!r}; the classifier has the "
                    "best weights up to there",
                    stacklevel=2,
                )
            if not going_on or progress.stop:
                break
        net.module_.detach_adversary()
        net.module_.move_boundary(self.network.boundary, ())
        return net, state.reports

    def _suffix(self) -> TrainedSuffix:
        """Build the trained part, with an adversary if there is one."""
        suffix = self.network.suffix({stage.boundary for stage in self.stages}, self.machine)
        if self.plan.adversarial:
            with seeded(self.seed):
                adversary = Adversary(suffix.head.in_features, self.estimator.domain_adversarial)
            suffix.attach_adversary(adversary)
        return suffix

    def attributes(self, net: Any) -> dict[str, Any]:
        """Return the fitted attributes of an estimator that predicts as the net does now."""
        return {
            "_net": None,
            "_tuned": net.module_.state_of(self.trained),
            "_history": list(net.history_),
            "_n_features_out": net.module_.head.in_features,
        }

    @property
    def weight_decay(self) -> float:
        """The weight decay in use."""
        asked = self.estimator.weight_decay
        if asked != "auto":
            return float(asked)
        return SMALL_SET_DECAY if self.small else DECAY

    def _run_stage(
        self, net: Any, state: TrainingState, number: int, progress: FitProgress
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
        attributes = partial(self.attributes, net)
        if stage.head_only:
            with progress.stage(stage.name, 0, trainable=trainable) as epochs:
                self._fit_head(net, state)
                metrics = {}
                if self.valid is not None:
                    metrics = {"valid_loss": state.best_loss, self.valid_metric: state.best_metric}
                epochs.update(metrics, attributes)
            return True
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
            kept=self.kept,
            attributes=attributes,
        )
        shown = (max(rates.values()), min(rates.values()))
        with progress.stage(stage.name, config.max_epochs, trainable=trainable, lr=shown) as epochs:
            return train_stage(net, state, config, epochs)

    def _fit_head(self, net: Any, state: TrainingState) -> None:
        train = self._train_at(self.plan.n_blocks)
        embeddings = train.values.reshape(len(self.train.y), -1, train.values.shape[1])
        valid = None
        if self.valid is not None:
            values = self._valid_at(self.plan.n_blocks).values
            valid = LabeledEmbeddings(values[:, None], self.valid.y, self.valid.weights)
            warn_of_leak(
                EmbeddedImages(self.train.images, embeddings[:, 0]),
                EmbeddedImages(self.valid.images, values),
                self.machine.threads,
            )
        head = self.task.fit_head(
            LabeledEmbeddings(embeddings, self.train.y, self.train.weights),
            valid,
            small=self.small,
            device=self.machine.device,
        )
        net.module_.set_head(head.weight, head.bias, head.penalty)
        self._strength = head.strength
        feed = self._valid_batches(self.stages[0])
        if feed is not None:
            state.best_loss, state.best_metric = evaluate(net, feed, self.task)

    # Batches to train and to validate on.

    def _train_batches_of_stage(self, number: int) -> EpochBatches | PairedBatches:
        """Return the batches of a stage, with those of the target if there is one."""
        smooth = self.estimator.label_smoothing
        targets = SoftTargets(self.train.y, self.train.weights, self.task, smooth)
        feed = self._view_batches(number, self.train, targets, self._train_at)
        if self.target is None or not self.plan.adversarial:
            return feed
        placeholder = SoftTargets(self.target.y, self.target.weights, UNLABELED)
        other = self._view_batches(number, self.target, placeholder, self._target_at, len(feed))
        return PairedBatches(feed, other)

    def _view_batches(
        self,
        number: int,
        examples: TrainingSet,
        targets: SoftTargets,
        activations_at: Callable[[int], Activations],
        length: int | None = None,
    ) -> EpochBatches:
        """Return batches of the views of images, from cached activations or read anew."""
        options, stage = self.estimator, self.stages[number]
        settings = {"mixup": options.mixup, "length": length}
        common = (targets, options.batch_size, self.machine.device)
        if self.plan.is_cached(stage, self.does_fit):
            values = activations_at(stage.boundary).values
            values = values.reshape(len(targets.y), 1 + self.plan.n_views, -1)
            return CachedBatches(values, *common, **settings)
        run = self.network.runner(stage.boundary, self.machine, len(targets.y) * options.max_epochs)
        before = sum(not each.head_only for each in self.stages[:number])
        fresh = partial(self._fresh_views, before * options.max_epochs)
        kind = fresh if self.plan.fresh or stage.boundary == 0 else self._fixed_views
        return ImageBatches(partial(kind, examples), run, self.machine.threads, *common, **settings)

    def _valid_batches(self, stage: Stage) -> EpochBatches | None:
        if self.valid is None:
            return None
        targets = SoftTargets(self.valid.y, self.valid.weights, self.task)
        common = (targets, self.estimator.batch_size, self.machine.device)
        if stage.boundary > 0:
            values = self._valid_at(stage.boundary).values
            return CachedBatches(values[:, None], *common, shuffle=False)
        views = Views(self.valid.images, self.network.preprocessing)
        run = self.network.runner(0, self.machine, len(targets.y))
        return ImageBatches(lambda _: (views, 1), run, self.machine.threads, *common, shuffle=False)

    def _fixed_views(self, examples: TrainingSet, epoch: int) -> tuple[Views, int]:
        """Return all views that could be cached."""
        return self._views(examples, self.plan.n_views), 1 + self.plan.n_views

    def _fresh_views(self, before: int, examples: TrainingSet, epoch: int) -> tuple[Views, int]:
        """Return a view of each image that no other epoch sees; `before` were in other stages."""
        salt = self.seed.to_bytes(8, "little")
        fresh = Views(
            examples.images,
            self.network.preprocessing,
            self.augmentation,
            only=1 + before + epoch,
            salt=salt,
        )
        return fresh, 1

    def _views(self, examples: TrainingSet, n_views: int) -> Views:
        return Views(examples.images, self.network.preprocessing, self.augmentation, n_views)

    # What crosses the boundaries.

    @cached_property
    def does_fit(self) -> bool:
        """Whether the activations of all views can be kept; a warning says where they cannot."""
        recipe = self.network.recipe(self.plan.first_boundary, self.machine)
        n_target = 0 if self.target is None else len(self.target.y)
        count = self.plan.count_views(len(self.train.y), n_target)
        problem = fits_on_disk(count, recipe, self.machine.store)
        if problem is not None:
            parts = [*(name for name, _ in self.network.backbone.block_list.blocks), HEAD]
            warnings.warn(
                f"The activations of {count} views before {parts[self.plan.first_boundary]!r} take "
                f"{problem}; "
                "they are computed again in every epoch. A smaller n_views, later blocks in "
                "unfreeze, or cache= a store with more room make it fast again",
                stacklevel=2,
            )
        return problem is None

    @cached_property
    def train_activations(self) -> Activations:
        """What the training views are at the first boundary, or behind all blocks."""
        boundary = self.plan.gathering_boundary(self.does_fit)
        return self._gather(self._views(self.train, self.plan.n_views), boundary)

    @cached_property
    def target_activations(self) -> Activations:
        """What the views of the target are at the first boundary."""
        assert self.target is not None
        return self._gather(self._views(self.target, self.plan.n_views), self.plan.first_boundary)

    @cached_property
    def valid_activations(self) -> Activations:
        """What the validation images are at the first boundary."""
        assert self.valid is not None
        return self._gather(self._views(self.valid, 0), self.plan.first_boundary)

    def _gather(self, views: Views, boundary: int) -> Activations:
        recipe = self.network.recipe(boundary, self.machine)
        return gather(views, recipe, boundary, self.machine)

    def _train_at(self, boundary: int) -> Activations:
        return self.train_activations.advance(boundary, self.machine.device)

    def _target_at(self, boundary: int) -> Activations:
        return self.target_activations.advance(boundary, self.machine.device)

    def _valid_at(self, boundary: int) -> Activations:
        """Advance the validation images, once for a boundary: two ask for them there."""
        if self._valid_at_boundary is None or self._valid_at_boundary.boundary != boundary:
            self._valid_at_boundary = self.valid_activations.advance(boundary, self.machine.device)
        return self._valid_at_boundary

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
            "C": self._strength if stage.head_only else None,
            "seconds": round(seconds, 2),
        }
