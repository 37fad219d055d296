import io
import sys

import numpy as np
import pytest
import torch
from helpers import SIZE, Tiny, images, paths_with_broken
from torchvision.transforms import v2

from sktransfer.backbones.loading import load_backbone
from sktransfer.data.images import as_images
from sktransfer.inspection.augmentation_display import AugmentationDisplay
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError

X = images(6)
TINY = Tiny()


def show(X=X, **parameters):
    return AugmentationDisplay.from_images(X, backbone=TINY, **parameters)


def test_display_shows_the_original_and_then_the_views_of_training():
    display = show(augment="aggressive", n_images=3, n_views=4)
    assert display.views.shape == (3, 5, SIZE, SIZE, 3)
    assert display.views.dtype == np.uint8
    preprocessing = load_backbone(TINY).preprocessing
    prepared = preprocessing.prepare(X[1]).permute(1, 2, 0)
    np.testing.assert_array_equal(display.views[1, 0], prepared)
    views = Views(as_images(X), preprocessing, resolve_augmentation("aggressive"), 7)
    for row, view in [(0, 1), (2, 4)]:
        expected = views.prepare(row * 8 + view).permute(1, 2, 0)
        np.testing.assert_array_equal(display.views[row, view], expected)


def test_display_titles_its_axes_and_draws_the_views():
    display = show(n_images=2, n_views=3)
    assert display.axes_.shape == (2, 4)
    titles = [axes.get_title() for axes in display.axes_[0]]
    assert titles == ["original", "view 1", "view 2", "view 3"]
    assert display.figure_.get_suptitle() == "standard"
    assert all(not axes.get_title() for axes in display.axes_[1])
    drawn = display.axes_[1, 2].images[0].get_array()
    np.testing.assert_array_equal(drawn, display.views[1, 2])
    file = io.BytesIO()
    display.figure_.savefig(file)
    assert display._repr_png_()[:4] == file.getvalue()[:4] == b"\x89PNG"


def test_display_does_not_import_pyplot():
    before = set(sys.modules)
    show()
    assert "matplotlib.pyplot" not in set(sys.modules) - before


@pytest.mark.parametrize("fig", [0, 2.5, True, "auto", [], object()])
def test_plot_on_something_else_than_a_figure_is_rejected(fig):
    display = show(n_images=1, n_views=1)
    with pytest.raises(TypeError, match=r"^Got fig=.* but expected a Figure, a SubFigure or None"):
        display.plot(fig)


def test_display_draws_into_a_given_figure():
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subfigures(1, 2)
    display = show(n_images=1, n_views=1, fig=left)
    assert display.figure_ is left
    assert display._repr_png_() is None
    redrawn = display.plot(right)
    assert redrawn is display
    assert len(figure.axes) == 4


def test_display_accepts_fewer_images_than_n_images_and_no_views():
    assert show(X[:2], n_views=0).views.shape == (2, 1, SIZE, SIZE, 3)


def test_display_accepts_no_augmentation_and_custom_transforms():
    plain = show(augment=None, n_views=2)
    assert plain.figure_.get_suptitle() == "no augmentation"
    np.testing.assert_array_equal(plain.views[:, 1], plain.views[:, 0])
    flipped = show(augment=v2.RandomHorizontalFlip(1.0), n_views=1)
    np.testing.assert_array_equal(flipped.views[:, 1], flipped.views[:, 0, :, ::-1])
    assert flipped.name == "RandomHorizontalFlip"


def test_display_learns_the_pixel_range_from_all_rows():
    """The range is learned from all of X, as in `fit`, not only from the images shown."""
    rows = np.zeros((8, 64))
    rows[0], rows[7] = 1.0, 16.0
    shown = show(rows, image_shape=(8, 8), n_images=1, n_views=0)
    assert shown.views.max() == 16  # 1 of 16, scaled to 255
    fixed = show(rows, image_shape=(8, 8), pixel_range=(0, 2), n_images=1, n_views=0)
    assert fixed.views.max() == 128


def test_display_applies_image_size():
    assert show(image_size=(24, 40), n_views=1, n_images=1).views.shape == (1, 2, 24, 40, 3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"augment": "auto"}, "Got augment='auto', but only fit of a classifier decides it"),
        ({"augment": "strong"}, "Got augment='strong', but expected one of None, 'light', "),
        ({"n_images": 0}, "Got n_images=0, but expected an integer from 1 to 1,000"),
        ({"n_views": -1}, "Got n_views=-1, but expected an integer from 0 to 1,000"),
        ({"n_views": 2.0}, "Got n_views=2.0, but expected an integer from 0 to 1,000"),
        ({"pixel_range": "full"}, "Got pixel_range='full', but expected one of 'auto'"),
        ({"image_size": 0}, "Got image_size=0, but expected a side in pixels"),
    ],
)
def test_display_rejects_invalid_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        show(**parameters)


def test_display_without_matplotlib_names_the_extra(monkeypatch):
    display = AugmentationDisplay(np.zeros((1, 1, 4, 4, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (show, display.plot):
        with pytest.raises(ImportError) as caught:
            draw()
        assert str(caught.value) == (
            "AugmentationDisplay needs 'matplotlib', which is not installed. "
            "Install it with: pip install 'sktransfer[plot]'"
        )


def test_display_leaves_the_global_random_state_unchanged():
    state = torch.get_rng_state()
    show(augment=v2.ColorJitter(0.5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_images", value) for value in (0, True, 1.5, "3", None, 10**9)),
        *(("n_views", value) for value in (-1, True, 1.5, 10**9)),
        *(("augment", value) for value in ("x", 3, True)),
        *(("image_size", value) for value in ("big", 0, True, (1, 2, 3))),
        *(("backbone", value) for value in ("x", 3)),
        ("weights", 3),
        ("image_shape", 3),
        ("pixel_range", (1, 0)),
        ("fig", "x"),
    ],
)
def test_display_checks_its_parameters(name, value):
    with pytest.raises((ValueError, TypeError), match=r"^Got "):
        AugmentationDisplay.from_images(images(2), **{"backbone": Tiny, name: value})


def test_display_names_all_broken_images_that_it_would_show(tmp_path):
    paths, _ = paths_with_broken(tmp_path)
    with pytest.raises(ImageError) as caught:
        AugmentationDisplay.from_images(paths, backbone=Tiny, n_images=6)
    assert [error.row for error in caught.value.errors] == [1, 4, 5]
