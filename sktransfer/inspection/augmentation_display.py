"""AugmentationDisplay, in scikit-learn's style: `from_images` computes, `plot` draws.

Shapes: N images, V augmented views of each, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from sktransfer.backbones.loading import load_backbone
from sktransfer.data.images import as_images, learn_pixel_range
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.preprocessing import check_image_size
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError, check_choice, check_number
from sktransfer.utils.plotting import import_figure

# Width of an image in the figure, in inches.
_INCHES_PER_IMAGE = 1.5
# Maximum number of images, and of views of each.
_MAX_SHOWN = 1000


class AugmentationDisplay:
    """Images as a network sees them, each in a row with its augmented views.

    Use `from_images` to create one.

    Parameters
    ----------
    views : ndarray of shape (N, 1 + V, H, W, 3)
        uint8, 0-255, RGB; each image is followed by its augmented views.
    name : str
        Name of the augmentation.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Not registered with pyplot, so it need not be closed; None before `plot`.
    axes_ : ndarray of shape (N, 1 + V) of matplotlib Axes
        None before `plot`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> digits = load_digits().data
    >>> display = AugmentationDisplay.from_images(
    ...     digits, augment="light", n_images=2, n_views=3, image_shape=(8, 8)
    ... )
    >>> display.views.shape, display.axes_.shape
    ((2, 4, 96, 96, 3), (2, 4))
    """

    def __init__(self, views: np.ndarray, name: str = "") -> None:
        self.views, self.name = views, name
        self.figure_: Any = None
        self.axes_: Any = None

    @classmethod
    def from_images(
        cls,
        X: Any,
        *,
        augment: Any = "standard",
        n_images: int = 4,
        n_views: int = 5,
        backbone: Any = "efficientnet_lite0",
        weights: Any = "default",
        image_size: int | tuple[int, int] | str | None = "auto",
        image_shape: Sequence[int] | None = None,
        pixel_range: Any = "auto",
        background: Any = "white",
        fig: Any = None,
    ) -> AugmentationDisplay:
        """Compute and draw augmented views of the first images of `X`.

        The views are those of training: they depend on the content of the image, on `augment` and
        on the number of the view, not on the rest of `X`.

        Parameters
        ----------
        X : list, array, Series, one-column DataFrame, tensor or dataset
            Images in any container that `PretrainedFeatureExtractor` takes.
        augment : str, callable or None
            As in `resolve_augmentation`.
        n_images, n_views : int
            Maximum number of images, 1 to 1,000, and number of views of each, 0 to 1,000.
        backbone, weights, image_size, image_shape, pixel_range, background
            As in `FineTunedImageClassifier`.
        fig : matplotlib Figure, SubFigure or None
            Figure to draw on; None creates one.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If a parameter is invalid.
        ImageError
            If some of the shown images cannot be read; names all of them.
        """
        import_figure("AugmentationDisplay")
        check_number("n_images", n_images, Integral, 1, _MAX_SHOWN)
        check_number("n_views", n_views, Integral, 0, _MAX_SHOWN)
        check_image_size(image_size, options=("auto",))
        _check_figure(fig)
        if isinstance(augment, str) and augment == "auto":
            raise ValueError(
                "Got augment='auto', but only fit of a classifier decides it; pass what it has "
                "decided, classifier.decision_.parameters['augment'], or a policy such as "
                "'standard'"
            )
        augmentation = resolve_augmentation(augment)
        network = load_backbone(backbone, weights)
        if isinstance(pixel_range, str):
            check_choice("pixel_range", pixel_range, ["auto"])
            pixel_range = learn_pixel_range(X, image_shape=image_shape)
        images = as_images(
            X, image_shape=image_shape, pixel_range=pixel_range, background=background
        )
        size = network.image_size_for(image_size, images)
        preprocessing = network.preprocessing.with_image_size(size)
        images = images[:n_images]
        views = Views(images, preprocessing, augmentation, n_views)
        pixels = list[np.ndarray]()
        broken = list[ImageError]()
        for item in range(len(views)):
            try:
                pixels.append(views.prepare(item).permute(1, 2, 0).numpy())
            except ImageError as error:
                broken.append(error)
        if broken:
            raise ImageError.of(broken)
        grid = np.stack(pixels).reshape(len(images), 1 + n_views, *pixels[0].shape)
        return cls(grid, "no augmentation" if augmentation is None else augmentation.name).plot(fig)

    def plot(self, fig: Any = None) -> AugmentationDisplay:
        """Draw the views in a grid, one row per image.

        Parameters
        ----------
        fig : matplotlib Figure, SubFigure or None
            Figure to draw on; None creates one, not registered with pyplot.

        Returns
        -------
        AugmentationDisplay
            The display itself, with `figure_` and `axes_`.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        _check_figure(fig)
        figure_class = import_figure("AugmentationDisplay")
        rows, columns, height, width = self.views.shape[:4]
        if fig is None:
            row_inches = _INCHES_PER_IMAGE * height / width
            size = (columns * _INCHES_PER_IMAGE, rows * row_inches + 0.6)
            fig = figure_class(figsize=size, layout="constrained")
            fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
        self.figure_ = fig
        fig.suptitle(self.name)
        self.axes_ = fig.subplots(rows, columns, squeeze=False)
        for (row, column), axes in np.ndenumerate(self.axes_):
            axes.imshow(self.views[row, column])
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="0.8", linewidth=0.5)
            if row == 0:
                axes.set_title(f"view {column}" if column else "original", fontsize=9)
        return self

    def _repr_png_(self) -> bytes | None:
        """Return the figure as PNG, for a notebook."""
        file = io.BytesIO()
        save = getattr(self.figure_, "savefig", None)  # a SubFigure has none
        if save is None:
            return None
        save(file, format="png")
        return file.getvalue()


def _check_figure(fig: Any) -> None:
    if fig is not None and not hasattr(fig, "subplots"):
        raise TypeError(f"Got fig={fig!r}, but expected a Figure, a SubFigure or None")
