"""What a fitted estimator remembers of its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sktransfer.backbones.batch_norm import BatchNormState, with_batch_norm
from sktransfer.backbones.loading import Backbone, load_backbone
from sktransfer.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class BackboneSource:
    """What a fitted estimator remembers of its backbone, which is looked up again when needed.

    Parameters
    ----------
    backbone, weights
        As `load_backbone` takes them.
    image_size : int, (int, int) or None
    batch_norm : BatchNormState or None
        The statistics that replace those of the weights.
    digest : bytes
        Of the weights that `fit` saw.
    """

    backbone: Any
    weights: Any
    image_size: Any
    batch_norm: BatchNormState | None
    digest: bytes

    def load(self) -> Backbone:
        """Load the backbone, or find it where this process has loaded it before.

        Raises
        ------
        ValueError
            Where the weights are others than those that `fit` saw.
        """
        backbone = load_backbone(self.backbone, self.weights)
        if backbone.digest != self.digest:
            raise ValueError(
                f"Got weights of {backbone.name} with digest {backbone.digest.hex()}, but fit saw "
                f"{self.digest.hex()}: they changed since. Call fit again, or bring them back"
            )
        return with_batch_norm(backbone, self.batch_norm) if self.batch_norm else backbone

    def block_names(self) -> list[str]:
        """Name the blocks, from the image on."""
        return [name for name, _ in self.load().block_list.blocks]

    def preprocessing(self) -> Preprocessing:
        """Tell what is done to an image before it is seen."""
        return self.load().preprocessing.with_image_size(self.image_size)
