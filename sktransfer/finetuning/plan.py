"""The plan of a fit: what follows from the parameters alone, before anything is computed.

The fit and `estimate_cost` read the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sktransfer.finetuning.schedule import Stage, resolve_stages
from sktransfer.transforms.augmentation import Augmentation, count_views

# Images of which a tenth can be spared for validation, with early_stopping="auto".
MIN_IMAGES_TO_HOLD_OUT = 2000


@dataclass(frozen=True)
class FitPlan:
    """What a fit does.

    Parameters
    ----------
    stages : tuple of Stage
    n_blocks : int
        Of the backbone: the boundary behind all of them.
    n_views : int
        Augmented views that are cached for each training image, besides the image itself.
    fresh : bool
        Whether every epoch makes new views instead.
    adversarial : bool
        Whether images of the target train along, against an adversary.
    """

    stages: tuple[Stage, ...]
    n_blocks: int
    n_views: int
    fresh: bool
    adversarial: bool

    @property
    def first_boundary(self) -> int:
        """The earliest boundary whose activations can be cached; 0 if there is none."""
        return min((stage.boundary for stage in self.stages if stage.boundary > 0), default=0)

    @property
    def trained_stages(self) -> tuple[Stage, ...]:
        """The stages that train blocks."""
        return self.stages[self.stages[0].head_only :]

    def count_views(self, n_train: int, n_target: int) -> int:
        """Count the views whose activations are cached."""
        return (n_train + (n_target if self.adversarial else 0)) * (1 + self.n_views)

    def gathering_boundary(self, fits: bool) -> int:
        """Return the boundary at which training views are gathered, if their activations fit."""
        return self.first_boundary if fits and not self.fresh else self.n_blocks

    def is_cached(self, stage: Stage, fits: bool) -> bool:
        """Return whether a stage trains on cached activations, if they fit."""
        return stage.boundary > 0 and not self.fresh and fits


def make_plan(
    estimator: Any, block_names: Sequence[str], augmentation: Augmentation | None
) -> FitPlan:
    """Build the plan of a fine-tuned estimator's fit.

    Raises
    ------
    ValueError
        If `unfreeze` names no valid stages.
    """
    n_views = count_views(augmentation, estimator.n_views)
    return FitPlan(
        resolve_stages(estimator.unfreeze, block_names),
        len(block_names),
        n_views or 0,
        n_views is None,
        estimator.domain_adversarial > 0,
    )


def held_out_fraction(estimator: Any, n_images: int) -> float:
    """Return the share of `n_images` labeled images that a fit holds out if no `X_val` is given."""
    if estimator.early_stopping is True:
        return estimator.validation_fraction
    # Validation images of the source cannot tell which epoch is best for the target.
    enough = n_images >= MIN_IMAGES_TO_HOLD_OUT and not estimator.domain_adversarial
    return estimator.validation_fraction if estimator.early_stopping and enough else 0.0
