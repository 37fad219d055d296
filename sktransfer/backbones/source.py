"""The reference of a fitted estimator to its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sktransfer.backbones.batch_norm import BatchNormState, with_batch_norm
from sktransfer.backbones.loading import Backbone, load_backbone
from sktransfer.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class BackboneSource:
    """Reference of a fitted estimator to its backbone, small enough for a pickle.

    Parameters
    ----------
    backbone, weights
        See `load_backbone`.
    image_size : int, (int, int) or None
    batch_norm : BatchNormState or None
        The statistics that replace those of the weights.
    digest : bytes
        Digest of the weights that `fit` used.
    """

    backbone: Any
    weights: Any
    image_size: Any
    batch_norm: BatchNormState | None
    digest: bytes

    def load(self) -> Backbone:
        """Load the backbone, or return the same one if this process has loaded it before.

        For a user's module, this hashes all weights, so callers load once and pass the result on.

        Raises
        ------
        ValueError
            If the weights are not those that `fit` used.
        """
        backbone = load_backbone(self.backbone, self.weights)
        if backbone.digest != self.digest:
            raise ValueError(
                f"Got weights of {backbone.name} with digest {backbone.digest.hex()}, but fit used "
                f"{self.digest.hex()}: they have changed since. Call fit again, or restore them"
            )
        return self.adapted(backbone)

    def adapted(self, backbone: Backbone) -> Backbone:
        """Return a loaded backbone with the adapted BatchNorm statistics, if any."""
        return with_batch_norm(backbone, self.batch_norm) if self.batch_norm else backbone

    def preprocessing_of(self, backbone: Backbone) -> Preprocessing:
        """Return the preprocessing for the loaded backbone."""
        return backbone.preprocessing.with_image_size(self.image_size)
