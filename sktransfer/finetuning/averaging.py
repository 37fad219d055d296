"""Average the weights before and after tuning, and calibrate the outputs, on held-out images.

Source of the average: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR
2022.

Shapes: N images, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from sktransfer.finetuning.batches import EpochBatches
from sktransfer.finetuning.decision import MANY_IMAGES
from sktransfer.finetuning.plan import MIN_IMAGES_TO_HOLD_OUT, FitPlan
from sktransfer.finetuning.schedule import HEAD
from sktransfer.finetuning.suffix import TrainedSuffix
from sktransfer.finetuning.task import Task
from sktransfer.finetuning.training_set import TrainingSet

State = Mapping[str, torch.Tensor]

# Shares of the tuned weights that are compared on held-out images.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Minimum number of held-out images.
_MIN_HELD_OUT = 10
# With more images and a stage that trains all blocks, another training would take too long.
_MAX_IMAGES_OF_ALL = 300


class Averaging(NamedTuple):
    """How weights are averaged, and the factor on the outputs.

    Parameters
    ----------
    share : float
        Share of the tuned weights, 0 to 1; the others are those before tuning.
    factor : float
        The inverse of a temperature.
    """

    share: float
    factor: float

    def describe(self) -> str:
        """Return the share and the temperature.

        Examples
        --------
        >>> Averaging(0.75, 0.8).describe()
        '75% of the tuned weights, 25% of those before tuning; temperature 1.25'
        """
        before = f", {1 - self.share:.0%} of those before tuning" if self.share < 1 else ""
        return f"{self.share:.0%} of the tuned weights{before}; temperature {1 / self.factor:.2f}"


# The tuned weights as they are.
TUNED = Averaging(1.0, 1.0)
# The averaging of a fit that can hold out no images.
USUAL = Averaging(0.75, 1.0)


class Tuned(NamedTuple):
    """A network that was tuned, and the states of its trained parts before and after.

    Parameters
    ----------
    suffix : TrainedSuffix
    before, after : State
    """

    suffix: TrainedSuffix
    before: State
    after: State

    def restore(self, averaging: Averaging) -> None:
        """Set the weights to the average, and scale the head."""
        self.suffix.restore(_average(self.before, self.after, averaging))

    @torch.no_grad()
    def outputs(self, batches: EpochBatches) -> np.ndarray:
        """Compute the outputs (N, K) for batches in their order."""
        self.suffix.train(False)
        outputs = [self.suffix(x).cpu().numpy() for x, _ in batches]
        parts = batches.processes.gather(outputs)  # of each process, its share of each batch
        return np.concatenate([part for batch in zip(*parts, strict=True) for part in batch])


def averages(averaging: Any, plan: FitPlan) -> bool:
    """Return whether a fit averages: it fits the head first, and then trains blocks.

    Parameters
    ----------
    averaging : float or "auto"
        The parameter of the estimator.
    plan : FitPlan
    """
    has_both = plan.stages[0].head_only and plan.trained_stages
    return bool(has_both and averaging != 1 and not plan.adversarial)


def held_out_to_choose(plan: FitPlan, task: Task, targets: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows of the training images on which a fit chooses the average.

    It trains once more on the others. The result is empty if that would take too long, or if there
    would be too few rows.

    Parameters
    ----------
    plan : FitPlan
    task : Task
    targets : ndarray of shape (N,)
        Of the training images.
    seed : int
    """
    n_images = len(targets)
    share = 0.5 if n_images >= MANY_IMAGES else 0.25
    rows, _ = task.validation_rows(targets, share, seed)
    limit = _MAX_IMAGES_OF_ALL if plan.trains_all else MIN_IMAGES_TO_HOLD_OUT - 1
    return rows if n_images <= limit and len(rows) >= _MIN_HELD_OUT else rows[:0]


def choose_averaging(
    tuned: Tuned, batches: EpochBatches, held_out: TrainingSet, task: Task
) -> Averaging:
    """Choose the share and the factor that have the lowest loss on held-out images.

    It is the largest share whose loss is within a standard error of the lowest one: few held-out
    images do not show small differences, and tuned weights are mostly more accurate. The weights of
    the network change.

    Parameters
    ----------
    tuned : Tuned
        A network that was not trained on the held-out images.
    batches : EpochBatches
        Of the held-out images, in their order.
    held_out : TrainingSet
    task : Task
    """
    losses: dict[Averaging, np.ndarray] = {}
    for share in _SHARES:
        tuned.restore(Averaging(share, 1.0))
        factor, values = task.calibrate(tuned.outputs(batches), held_out.y, held_out.weights)
        losses[Averaging(share, factor)] = values
    best = min(losses.values(), key=np.mean)
    return max(name for name, values in losses.items() if _is_within_error(values - best))


def _is_within_error(differences: np.ndarray) -> bool:
    """Return whether a mean difference is at most its standard error."""
    return bool(differences.mean() <= differences.std() / np.sqrt(len(differences)))


def _average(before: State, after: State, averaging: Averaging) -> dict[str, Any]:
    state = {
        name: torch.lerp(before[name], tensor, averaging.share)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in after.items()
    }
    for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
        state[name] = state[name] * averaging.factor
    return state
