"""The extractor with which diagnostic functions embed images.

Shapes: N images.
"""

from __future__ import annotations

from typing import Any

from sklearn.base import clone

from sktransfer.data.images import Images, as_images
from sktransfer.extractor import PretrainedFeatureExtractor


def resolve_extractor(
    extractor: PretrainedFeatureExtractor | None, **defaults: Any
) -> PretrainedFeatureExtractor:
    """Return an unfitted copy of an extractor, or a new extractor for None.

    Parameters
    ----------
    extractor : PretrainedFeatureExtractor or None
    **defaults
        Parameters of a new extractor.

    Raises
    ------
    TypeError
        If `extractor` is neither a PretrainedFeatureExtractor nor None.
    """
    if extractor is None:
        return PretrainedFeatureExtractor(**defaults)
    if not isinstance(extractor, PretrainedFeatureExtractor):
        raise TypeError(
            f"Got extractor={extractor!r}, but expected a PretrainedFeatureExtractor or None; "
            "for a backbone, pass PretrainedFeatureExtractor(backbone)"
        )
    return clone(extractor)


def read_images(extractor: PretrainedFeatureExtractor, X: Any) -> Images:
    """Return images as a fitted extractor reads them: its shape, pixel range and background."""
    return as_images(
        X,
        image_shape=extractor.image_shape,
        pixel_range=extractor.pixel_range_,
        background=extractor.background,
    )
