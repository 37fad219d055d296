"""The plan of a fit: stages, boundaries, views, and which activations are cached.

The fit and `estimate_cost` read the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sktransfer.finetuning.schedule import Stage, resolve_stages, train_all
from sktransfer.transforms.augmentation import Augmentation, resolve_n_views

# Images of which a tenth can be spared for validation, with early_stopping="auto".
MIN_IMAGES_TO_HOLD_OUT = 2000


@dataclass(frozen=True)
class FitPlan:
    """What a fit does, as far as it follows from the parameters.

    Parameters
    ----------
    stages : tuple of Stage
    n_blocks : int
        Number of blocks of the backbone.
    n_views : int
        Augmented views of each training image that are cached, in addition to the image itself.
    fresh : bool
        Whether each epoch draws new views instead.
    adversarial : bool
        Whether unlabeled target images are trained on too, against an adversary.
    cached : bool
        Whether the activations of all views are computed once and kept. A boundary of 0 has none.
    """

    stages: tuple[Stage, ...]
    n_blocks: int
    n_views: int
    fresh: bool
    adversarial: bool
    cached: bool

    @property
    def first_boundary(self) -> int:
        """The earliest boundary whose activations can be cached; 0 if there is none."""
        return _first_boundary(self.stages)

    @property
    def trained_stages(self) -> tuple[Stage, ...]:
        """The stages that train blocks."""
        return tuple(stage for stage in self.stages if stage.blocks)

    @property
    def trains_all(self) -> bool:
        """Whether a stage trains all blocks, so it reads images in every epoch."""
        return train_all(self.stages)

    @property
    def gathering_boundary(self) -> int:
        """The first boundary if activations are cached; else the last one, for the head fit."""
        return self.first_boundary if self.cached else self.n_blocks

    def count_cached_views(self, n_train: int, n_target: int) -> int:
        """Count the views whose activations are kept, if any are."""
        return (n_train + (n_target if self.adversarial else 0)) * (1 + self.n_views)

    def is_cached(self, stage: Stage) -> bool:
        """Return whether a stage trains on cached activations."""
        return self.cached and stage.boundary > 0

    def without_cache(self) -> FitPlan:
        """Return the plan of the same fit if the disk has no room for the activations."""
        return replace(self, cached=False)


def make_plan(
    estimator: Any, block_names: Sequence[str], augmentation: Augmentation | None
) -> FitPlan:
    """Build the plan of a fine-tuned estimator's fit, whose parameters are decided.

    Raises
    ------
    ValueError
        If `unfreeze` names no valid stages.
    """
    n_views = resolve_n_views(augmentation, estimator.n_views)
    stages = resolve_stages(estimator.unfreeze, block_names)
    fresh = n_views is None
    return FitPlan(
        stages,
        len(block_names),
        n_views or 0,
        fresh,
        estimator.domain_adversarial > 0,
        cached=not fresh and _first_boundary(stages) > 0,
    )


def _first_boundary(stages: Sequence[Stage]) -> int:
    return min((stage.boundary for stage in stages if stage.boundary > 0), default=0)


def held_out_fraction(estimator: Any, n_images: int) -> float:
    """Return the share of `n_images` labeled images that a fit holds out if no `X_val` is given."""
    if estimator.early_stopping != "auto" and estimator.early_stopping:
        return estimator.validation_fraction
    # Validation images of the source cannot tell which epoch is best for the target.
    enough = n_images >= MIN_IMAGES_TO_HOLD_OUT and not estimator.domain_adversarial
    return estimator.validation_fraction if estimator.early_stopping and enough else 0.0
