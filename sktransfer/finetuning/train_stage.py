"""Train one stage after another. This is the only module that uses skorch.

A fit resumes after its last complete epoch: the random numbers of an epoch depend only on the seed,
the stage and the epoch, and the boundary and the rates only on the stage and its progress.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback
from skorch.helper import predefined_split
from skorch.history import History

from sktransfer.adaptation.adversary import reversal_strength
from sktransfer.finetuning.batches import EpochBatches, PairedBatches
from sktransfer.finetuning.checkpoint import load_checkpoint, plain, save_checkpoint
from sktransfer.finetuning.schedule import ADVERSARY, HEAD, PRE_LOGITS, Stage, rate_factor
from sktransfer.finetuning.shared_step import WholeBatchDraws, add_gradients
from sktransfer.finetuning.suffix import TrainedSuffix
from sktransfer.finetuning.task import Task
from sktransfer.utils.errors import check_choice, warn_user
from sktransfer.utils.processes import ALONE, Processes, Share
from sktransfer.utils.progress import StageProgress, TrialProgress
from sktransfer.utils.runtime import GLOBAL_GENERATORS, seeded, tune_malloc

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"decoupled_weight_decay": True, "fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


def resolve_optimizer(optimizer: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Resolve the optimizer class and its settings.

    Raises
    ------
    ValueError
        If it is neither a known name nor an optimizer class of torch.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        return optimizer, {}
    besides = "an optimizer class such as torch.optim.AdamW"
    check_choice("optimizer", optimizer, [*OPTIMIZERS], besides=besides)
    return OPTIMIZERS[optimizer]


def check_callbacks(callbacks: Any) -> None:
    """Check that a parameter is a list of skorch callbacks, or None.

    Raises
    ------
    ValueError
        Otherwise.
    """
    if callbacks is None:
        return
    are_listed = isinstance(callbacks, (list, tuple))
    unnamed = [
        item[-1] if isinstance(item, tuple) and item else item
        for item in (callbacks if are_listed else ())
    ]
    if not are_listed or not all(hasattr(callback, "on_epoch_end") for callback in unnamed):
        raise ValueError(
            f"Got callbacks={callbacks!r}, but expected a list of skorch's callbacks, such as "
            "[skorch.callbacks.GradientNormClipping(1.0)], or None"
        )


def make_net(
    suffix: TrainedSuffix,
    task: Task,
    *,
    device: torch.device,
    optimizer: Any = "adam",
    weight_decay: float = 0.0,
    callbacks: Sequence[Any] = (),
) -> NeuralNet:
    """Build the skorch net of a suffix, with one parameter group for each part.

    All groups exist from the start; parts that a stage does not train get no gradient, and so no
    step. The net takes activations at the suffix's boundary.
    """
    if torch.device(device).type == "cpu":
        tune_malloc()
    kind, settings = resolve_optimizer(optimizer)
    groups = [(f"blocks.{i}.*", {"name": name}) for i, name in enumerate(suffix.names)]
    groups += [(f"{name}.*", {"name": name}) for name in (PRE_LOGITS, HEAD, ADVERSARY)]
    net = _PenalizedNet(
        suffix,
        criterion=task.make_loss,
        optimizer=kind,
        optimizer__param_groups=groups,
        optimizer__weight_decay=weight_decay,
        **{f"optimizer__{name}": value for name, value in settings.items()},
        iterator_train=_iterate_batches,
        iterator_valid=_iterate_batches,
        callbacks=[("epoch_setup", _EpochSetup()), *callbacks, ("best_weights", _BestWeights())],
        # It prints at verbose=0, too, if Ray has replaced the function `print`.
        callbacks__print_log=None,
        device=device,
        verbose=0,
    )
    return net.initialize()


class _PenalizedNet(NeuralNet):
    """Minimize the mean loss plus the penalty on the head, the same objective as the head fit.

    If an adversary is attached, its loss is added. If several processes train, each has its share
    of a batch; losses and gradients are those of the whole batch.
    """

    share_: Share = ALONE.share(1)

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        with GLOBAL_GENERATORS:  # dropout draws from them while other threads read images
            return super().train_step(batch, **fit_params)

    def train_step_single(self, batch: Any, **fit_params: Any) -> Any:
        share = self.share_
        if share.is_whole:
            return super().train_step_single(batch, **fit_params)
        with WholeBatchDraws(share) if len(share) else contextlib.nullcontext():
            step = super().train_step_single(batch, **fit_params)
        loss = add_gradients(
            self.module_.trained_parameters(), step["loss"].detach(), share.processes
        )
        return {**step, "loss": loss}

    def validation_step(self, batch: Any, **fit_params: Any) -> Any:
        step = super().validation_step(batch, **fit_params)
        return {**step, "loss": self.share_.processes.add(step["loss"])}

    def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Any:
        logits, *domain_loss = y_pred if isinstance(y_pred, tuple) else (y_pred,)
        share = self.share_
        if share.is_whole:
            loss = super().get_loss(logits, y_true, X, training)
            return sum(domain_loss, loss + self.module_.penalty()) if training else loss
        # The sum of all processes is the loss of the whole batch. A mean of no images is NaN.
        loss = super().get_loss(logits, y_true, X, training) * share.weight if len(share) else 0.0
        if training:
            return loss + self.module_.penalty() / share.processes.count
        return torch.as_tensor(loss, device=self.module_.device)


def _iterate_batches(
    batches: EpochBatches | PairedBatches, batch_size: int
) -> EpochBatches | PairedBatches:
    """Replace a DataLoader: the dataset yields batches itself."""
    return batches


@dataclass
class TrainingState:
    """The progress of a fit and its best weights so far, as a checkpoint stores them.

    Parameters
    ----------
    seed : int
    stage : int
        Index of the current stage.
    epoch : int
        Completed epochs of that stage.
    stall : int
        Epochs since the best one.
    best_loss, best_metric : float
        Validation metrics of the best weights of this stage.
    best_epoch : int
        Epoch of the best weights; 0 is the state before the stage.
    best : dict of str to Tensor
        The best weights; empty without validation images.
    reports : list of dict
        Reports of the completed stages.
    averaging : (float, float) or None
        The `Averaging` that was chosen after the last stage.
    """

    seed: int
    stage: int = -1
    epoch: int = 0
    stall: int = 0
    best_loss: float = math.nan
    best_metric: float = math.nan
    best_epoch: int = 0
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    averaging: tuple[float, float] | None = None


@dataclass(frozen=True)
class StageConfig:
    """The settings of one stage, constant while it trains.

    Parameters
    ----------
    number : int
    stage : Stage
    task : Task
    rates : dict of str to float
        Peak learning rate of each part.
    train : EpochBatches or PairedBatches
    valid : EpochBatches or None
    max_epochs : int
    patience : int or None
        Epochs without improvement after which the stage ends; None trains all epochs.
    checkpoint : Path or None
        File that is replaced after each epoch.
    saved_parts : tuple of str
        The parts that any stage trains, which a checkpoint stores.
    reconstruction : callable
        Returns the fitted attributes of an estimator that predicts as the net does.
    head_factor : float
        Factor on the logits at the start of the stage.
    averaged_later : bool
        Whether the weights before and after the stage are averaged and calibrated. Then it is
        enough if an epoch has a lower validation loss than the logits with that factor.
    """

    number: int
    stage: Stage
    task: Task
    rates: dict[str, float]
    train: EpochBatches | PairedBatches
    valid: EpochBatches | None
    max_epochs: int
    patience: int | None
    checkpoint: Path | None
    saved_parts: tuple[str, ...]
    reconstruction: Callable[[], dict[str, Any]]
    head_factor: float = 1.0
    averaged_later: bool = False


def train_stage(
    net: NeuralNet,
    state: TrainingState,
    config: StageConfig,
    progress: StageProgress | TrialProgress,
) -> bool:
    """Train one stage, from its start or from the state of an interrupted fit.

    The suffix's boundary must be set. Afterwards the net has the best weights of the stage by
    validation loss, possibly those from before the stage. Without patience, and without validation
    images, it has the weights of the last epoch.

    Returns
    -------
    bool
        False if training was interrupted from the keyboard.

    Raises
    ------
    FloatingPointError
        If the loss is not finite and there are no earlier weights to return to.
    """
    suffix: TrainedSuffix = net.module_
    with seeded(state.seed, net.device):
        if state.stage != config.number:
            _begin(net, state, config)
        completed = _loop(net, state, config, progress)
    if completed:
        _warn_of_rising_loss(net, state, config)
    if state.best:
        suffix.restore(state.best)
    suffix.train(False)
    return completed


# Epochs after which a loss is known to rise.
_MIN_EPOCHS = 3


def _warn_of_rising_loss(net: NeuralNet, state: TrainingState, config: StageConfig) -> None:
    """Warn if the training loss of a stage only rises, or ends above that of guessing."""
    setup = dict(net.callbacks_)["epoch_setup"]
    losses = [float(row["train_loss"]) for row in net.history_[-state.epoch :]]
    # Two epochs show little, and a resumed stage may have ended already.
    if len(losses) < _MIN_EPOCHS or not setup.guess_losses:
        return
    guessing = setup.guess_losses[-1]
    is_high = losses[-1] > guessing or losses == sorted(losses)
    # The loss of an adversary rises as intended.
    rises = net.module_.adversary is None and losses[-1] > 1.5 * losses[0] + 0.1 * guessing
    is_worse = setup.task_losses[-1] > 1.5 * guessing
    # A stage that began with a useless head does not show whether the rates are too high.
    if setup.first_loss < 1.5 * guessing and (is_worse or (rises and is_high)):
        warn_user(
            f"The training loss of the stage {config.stage.name!r} is {losses[-1]:.3g} in its last "
            f"epoch, after {losses[0]:.3g} in its first one; guessing has {guessing:.3g}. The "
            f"rates are too high (lr={config.rates[HEAD]:g}): lower lr, or raise lr_drop",
        )


def _begin(net: NeuralNet, state: TrainingState, config: StageConfig) -> None:
    """Record the state before the stage as the best so far."""
    net.optimizer_.state.clear()
    state.stage, state.epoch, state.stall, state.best_epoch = config.number, 0, 0, 0
    state.best, state.best_loss, state.best_metric = {}, math.inf, math.nan
    if config.averaged_later:
        net.module_.scale_head(config.head_factor)
    if config.valid is not None:
        state.best_loss, state.best_metric = evaluate(net, config.valid, config.task)
        state.best = net.module_.state_of(config.saved_parts)
    if not config.averaged_later:
        net.module_.scale_head(config.head_factor)


def _loop(
    net: NeuralNet,
    state: TrainingState,
    config: StageConfig,
    progress: StageProgress | TrialProgress,
) -> bool:
    callbacks = dict(net.callbacks_)
    epoch_setup, best_weights = callbacks["epoch_setup"], callbacks["best_weights"]
    epoch_setup.state, epoch_setup.config = best_weights.state, best_weights.config = (
        state,
        config,
    )
    best_weights.progress, best_weights.epoch_setup = progress, epoch_setup
    net.set_params(train_split=config.valid and predefined_split(config.valid))
    epoch_setup.task_losses, epoch_setup.guess_losses = [], []
    epoch_setup.first_loss = math.nan
    net.notify("on_train_begin", X=config.train, y=None)
    completed = True
    try:
        if not best_weights.is_over():
            net.fit_loop(config.train, epochs=config.max_epochs - state.epoch)
    except _StopStage:
        pass
    except KeyboardInterrupt:
        if epoch_setup.in_callbacks:  # skorch's way of stopping early
            with contextlib.suppress(_StopStage):
                best_weights.record_epoch(net)
        elif config.train.processes.count > 1:
            raise  # the other processes end, too
        else:
            completed = False
    net.notify("on_train_end", X=config.train, y=None)
    return completed


@torch.no_grad()
def evaluate(net: NeuralNet, batches: EpochBatches, task: Task) -> tuple[float, float]:
    """Return the mean loss and the mean metric of the task."""
    net.module_.train(False)
    loss, metric, total = 0.0, 0.0, 0
    for x, targets in batches:
        if not len(x):
            continue
        logits = net.module_(x)
        loss += float(net.criterion_(logits, targets)) * len(x)
        metric += task.metric(logits, targets)
        total += len(x)
    loss, metric, n_images = _totals(batches.processes, loss, metric, total)
    return loss / n_images, metric / n_images


def _totals(processes: Processes, *values: float) -> list[float]:
    """Return the sum of each value over all processes."""
    return [sum(parts) for parts in zip(*processes.gather(values), strict=True)]


class _StopStage(KeyboardInterrupt):
    """End the loop over epochs, as skorch's own callbacks do."""


# Entry of the history with the number of images of a batch, by whether it is trained on.
_SIZE_OF_BATCH = {True: "train_batch_size", False: "valid_batch_size"}


class _EpochSetup(Callback):
    """Runs before the user's callbacks: seeds an epoch, sets rates, sums the metric."""

    state: TrainingState
    config: StageConfig
    in_callbacks = False
    # Mean losses of the epochs of a stage.
    task_losses: list[float]
    guess_losses: list[float]
    # Loss of the first batch, before its step.
    first_loss: float

    def on_epoch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        self.in_callbacks = False
        self.batch, self.metric, self.seen = 0, {True: 0.0, False: 0.0}, {True: 0, False: 0}
        self.domain_loss, self.task_loss, self.guess_loss = 0.0, 0.0, 0.0
        seed = derive_seed(self.state.seed, self.config.number, self.state.epoch)
        torch.default_generator.manual_seed(seed)
        if net.module_.device.type == "cuda":
            with torch.cuda.device(net.module_.device):
                torch.cuda.manual_seed(seed)
        self.config.train.begin_epoch(seed, self.state.epoch)

    def on_batch_begin(self, net: NeuralNet, training: bool = False, **kwargs: Any) -> None:
        batches = self.config.train if training else self.config.valid
        if batches is not None:
            net.share_ = batches.share
        if training:
            steps = self.config.train.n_batches
            step = self.state.epoch * steps + self.batch
            progress = step / (self.config.max_epochs * steps)
            if net.module_.adversary is not None:
                net.module_.adversary.strength = reversal_strength(progress)
            factor = rate_factor(progress)
            for group in net.optimizer_.param_groups:
                group["lr"] = self.config.rates.get(group["name"], 0.0) * factor
            self.batch += 1

    def on_batch_end(
        self, net: NeuralNet, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        logits, targets = kwargs["y_pred"], batch[1]
        losses = [kwargs["loss"]]
        if isinstance(logits, tuple):
            logits, domain_loss = logits
            losses.append(domain_loss)
        logits = logits.detach()
        if not net.share_.is_whole:
            net.history_.record_batch(_SIZE_OF_BATCH[training], net.share_.total)
        if training:
            self._add_losses(net, logits, targets, losses)
        if len(targets):
            self.metric[training] += self.config.task.metric(logits, targets)
        self.seen[training] += len(targets)

    def on_train_end(self, net: NeuralNet, **kwargs: Any) -> None:
        net.share_ = ALONE.share(1)

    def _add_losses(
        self,
        net: NeuralNet,
        logits: torch.Tensor,
        targets: torch.Tensor,
        losses: list[torch.Tensor],
    ) -> None:
        """Add the losses of a batch: of the task, of guessing, and of the adversary.

        `losses` has the loss that was minimized, and that of the adversary if there is one.
        """
        outputs = (logits, torch.zeros_like(logits))
        # The share of a process may be empty, and a mean of no images is NaN.
        task_losses = [net.criterion_(x, targets) if len(x) else x.sum() for x in outputs]
        # Read together, because each read waits for the device.
        all_losses = torch.stack([loss.detach().float() for loss in (*task_losses, *losses)])
        loss, guess_loss, minimized, *domain_loss = all_losses.tolist()
        if not math.isfinite(minimized):
            self._stop_on_divergence(net)
        if math.isnan(self.first_loss):
            [self.first_loss] = _totals(net.share_.processes, loss * net.share_.weight)
        self.task_loss += loss * len(targets)
        self.guess_loss += guess_loss * len(targets)
        self.domain_loss += sum(domain_loss) * len(targets)

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        sums = (self.task_loss, self.guess_loss, self.domain_loss)
        counts = (self.metric[True], self.seen[True], self.metric[False], self.seen[False])
        totals = _totals(net.share_.processes, *sums, *counts)
        task_loss, guess_loss, domain_loss, metric, n_train, valid_metric, n_valid = totals
        self.task_losses.append(task_loss / n_train)
        self.guess_losses.append(guess_loss / n_train)
        history, name = net.history_, self.config.task.metric_name
        history.record("stage", self.config.stage.name)
        history.record(f"train_{name}", metric / n_train)
        if net.module_.adversary is not None:
            history.record("domain_loss", domain_loss / n_train)
        if n_valid:
            history.record(f"valid_{name}", valid_metric / n_valid)
        history.record("lr", {g["name"]: g["lr"] for g in net.optimizer_.param_groups if g["lr"]})
        self.in_callbacks = True

    def _stop_on_divergence(self, net: NeuralNet) -> None:
        problem = (
            f"Got a loss that is not finite in epoch {self.state.epoch + 1} of stage "
            f"{self.config.stage.name!r}, probably because the learning rate is too high "
            f"(lr={self.config.rates[HEAD]:g}); decrease lr, increase lr_drop, or check "
            "sample_weight for extreme values"
        )
        net.history_.pop()  # the epoch that failed
        self.guess_losses.clear()  # one warning is enough
        if not self.state.best:
            raise FloatingPointError(problem)
        warn_user(f"{problem}. The stage ends with its best weights so far")
        raise _StopStage


class _BestWeights(Callback):
    """Runs after the user's callbacks: keeps the best weights, saves, reports and stops."""

    state: TrainingState
    config: StageConfig
    progress: StageProgress | TrialProgress
    epoch_setup: _EpochSetup

    def on_epoch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        self.progress.begin()

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        self.epoch_setup.in_callbacks = False
        self.record_epoch(net)
        if self.is_over():
            raise _StopStage

    def record_epoch(self, net: NeuralNet) -> None:
        """Record a completed epoch."""
        state, row = self.state, net.history_[-1]
        state.epoch += 1
        loss = float(row.get("valid_loss", math.nan))
        if loss < state.best_loss or (
            self.config.valid is not None and self.config.patience is None
        ):
            state.best_loss, state.best_metric = loss, row[f"valid_{self.config.task.metric_name}"]
            state.best_epoch, state.stall = state.epoch, 0
            state.best = net.module_.state_of(self.config.saved_parts)
        else:
            state.stall += 1
        save_run(self.config.checkpoint, net, state, self.config.saved_parts)
        stop = self.progress.update(_shown(row, self.config.task), self.config.reconstruction)
        if net.share_.processes.any(stop):
            raise _StopStage

    def is_over(self) -> bool:
        """Return whether the stage has ended; a resumed fit decides the same."""
        patience = self.config.patience if self.config.valid is not None else None
        stalled = patience is not None and self.state.stall >= patience
        return stalled or self.state.epoch >= self.config.max_epochs


def _shown(row: dict[str, Any], task: Task) -> dict[str, Any]:
    metric = f"valid_{task.metric_name}"
    names = {"loss": "train_loss", "valid_loss": "valid_loss", metric: metric}
    shown = {name: row[key] for name, key in names.items() if key in row}
    rates = row["lr"].values()
    return {**shown, "lr": (max(rates), min(rates))}


def save_run(path: Path | None, net: NeuralNet, state: TrainingState, parts: Sequence[str]) -> None:
    """Save everything needed to resume a fit."""
    if path is None:
        return
    content = {
        **vars(state),
        "weights": net.module_.state_of(parts),
        "optimizer": net.optimizer_.state_dict(),
        "history": plain(list(net.history_)),
    }
    save_checkpoint(path, content)


def resume_run(
    path: Path | None, net: NeuralNet, processes: Processes = ALONE
) -> TrainingState | None:
    """Restore a net from its checkpoint; return None if there is none.

    The main process reads it; the others have no path.
    """
    content = processes.from_main(lambda: load_checkpoint(path) if path is not None else None)
    if content is None:
        return None
    net.module_.restore(content.pop("weights"))
    net.optimizer_.load_state_dict(content.pop("optimizer"))
    restore_history(net, content.pop("history"))
    return TrainingState(**content)


def restore_history(net: NeuralNet, history: list[dict[str, Any]]) -> None:
    """Set the history of a net."""
    net.history_ = History(history)


def derive_seed(*parts: int) -> int:
    """Derive one seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
