import inspect
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SIZE, images
from PIL import Image

from sktransfer.data.images import Images, as_images
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError

PREPROCESSING = Preprocessing(resize=20, crop=(SIZE, SIZE))


@dataclass
class RecordingAugmentation:
    """An augmentation that adds a number and records its seeds."""

    added: int = 1
    seeds: list = field(default_factory=list)

    @property
    def digest(self):
        return bytes([self.added])

    def __call__(self, image, seed, size=None):
        self.seeds.append(seed)
        return image + self.added


class Counted(Images):
    """Images that count how often each row is decoded."""

    def __init__(self, X):
        super().__init__(as_images(X).source)
        self.decoded = [0] * len(X)

    def decode_with_digest(self, row, side=None):
        self.decoded[row] += 1
        return super().decode_with_digest(row, side)


def views_of(X, augmentation=None, n_views=0, **options):
    return Views(as_images(X), PREPROCESSING, augmentation, n_views, **options)


def all_of(views):
    return [views.prepare(item) for item in range(len(views))]


def test_items_list_the_views_image_by_image():
    X = images(3)
    views = views_of(X, RecordingAugmentation(), 2)
    assert len(views) == 9
    assert [list(views.items_of(image)) for image in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for item in range(9):
        row, number = divmod(item, 3)
        plain = PREPROCESSING.prepare(X[row])
        assert torch.equal(views.prepare(item), plain + (number > 0))


def test_view_0_is_the_original_image():
    X, augmentation = images(2, side=37), resolve_augmentation("aggressive")
    for views, step in ((views_of(X, augmentation, 3), 4), (views_of(X, augmentation, only=0), 1)):
        for row in range(2):
            assert torch.equal(views.prepare(step * row), PREPROCESSING.prepare(X[row]))
            assert views.fingerprint(step * row) == as_images(X).fingerprint(row)


def test_views_without_augmentation_are_the_image():
    X = images(2)
    for views in (views_of(X, None, 2), views_of(X, None, 2, salt=b"other")):
        for item in range(6):
            assert torch.equal(views.prepare(item), PREPROCESSING.prepare(X[item // 3]))
            assert views.fingerprint(item) == as_images(X).fingerprint(item // 3)


def test_only_selects_one_view_of_each_image():
    X, augmentation = images(3), resolve_augmentation("standard")
    every = views_of(X, augmentation, 4)
    for number in range(5):
        selected = views_of(X, augmentation, only=number)
        assert len(selected) == 3
        for row in range(3):
            assert torch.equal(selected.prepare(row), every.prepare(5 * row + number))
            assert selected.fingerprint(row) == every.fingerprint(5 * row + number)


def test_fingerprint_covers_everything_that_determines_a_view():
    """Fail if a parameter of `Views` is neither in the fingerprint nor known not to matter."""
    X, changed = images(1), images(1)
    changed[0, 0, 0, 0] ^= 1
    usual = {"augmentation": RecordingAugmentation(1), "n_views": 3}
    base = views_of(X, **usual)
    variants = {
        "images": views_of(changed, **usual),
        "augmentation": views_of(X, RecordingAugmentation(2), 3),
        "salt": views_of(X, **usual, salt=b"s"),
        "only": views_of(X, **usual, only=2),
        "the image alone": views_of(X),
    }
    prints = {name: views.fingerprint(min(1, len(views) - 1)) for name, views in variants.items()}
    numbers = [base.fingerprint(item) for item in range(4)]
    assert len({*numbers, *prints.values()}) == 4 + len(variants) - 2
    assert prints["only"] == numbers[2]
    assert prints["the image alone"] == numbers[0]
    assert all(len(fingerprint) == 16 for fingerprint in numbers)
    # A view does not depend on the number of views. The preprocessing is in the recipe's key.
    assert views_of(X, RecordingAugmentation(1), 99).fingerprint(1) == numbers[1]
    known = {*variants, "n_views", "preprocessing", "self"} - {"the image alone"}
    assert set(inspect.signature(Views.__init__).parameters) == known


def test_seeds_depend_only_on_content_view_number_and_salt(tmp_path):
    """The content of an encoded image is its bytes, and that of any other its pixels."""
    X = images(2)
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for path in paths:
        Image.fromarray(X[0]).save(path)
    first, second = RecordingAugmentation(), RecordingAugmentation(2)
    all_of(views_of([X[1], paths[0], paths[1]], first, 2))
    all_of(views_of([Path(paths[0]).read_bytes()], second, 3))
    of_other, of_path = first.seeds[:2], first.seeds[2:4]
    assert first.seeds[4:] == of_path == second.seeds[:2]
    assert len({*of_other, *of_path}) == 4
    salted = RecordingAugmentation()
    all_of(views_of(paths[:1], salted, 3, salt=b"s"))
    assert len({*second.seeds, *salted.seeds}) == 6


def test_file_under_two_names_has_the_same_views(tmp_path):
    Image.fromarray(images(1)[0]).save(tmp_path / "one.png")
    shutil.copy(tmp_path / "one.png", tmp_path / "two.png")
    augmentation = resolve_augmentation("aggressive")
    views = views_of([tmp_path / "one.png", tmp_path / "two.png"], augmentation, 3)
    copies = all_of(views)
    assert all(torch.equal(copies[i], copies[4 + i]) for i in range(4))
    assert len({copy.numpy().tobytes() for copy in copies}) == 4, "copies are alike"


def test_views_do_not_depend_on_global_random_numbers():
    views = [views_of(images(2), resolve_augmentation("standard"), 2) for _ in range(2)]
    forward = all_of(views[0])
    torch.rand(5)
    np.random.rand(5)
    backward = {item: views[1].prepare(item) for item in reversed(range(6))}
    assert all(torch.equal(forward[item], backward[item]) for item in range(6))


def test_views_read_in_order_decode_each_image_once():
    counted = Counted(images(30))
    views = Views(counted, PREPROCESSING, RecordingAugmentation(), 3)
    for _ in ImageReader(views, 1, ImageErrors("raise")).batches(range(len(views)), 7):
        pass
    assert counted.decoded == [1] * 30


def test_image_is_decoded_once_for_several_threads():
    both = threading.Semaphore(0)

    class Slow(Counted):
        def decode_with_digest(self, row, side=None):
            assert both.acquire(timeout=30), "the other thread never came"
            return super().decode_with_digest(row, side)

    class SignalingViews(Views):
        def prepare(self, item):
            if item == 1:
                both.release(2)
            return super().prepare(item)

    counted = Slow(images(1, side=400))
    views = SignalingViews(counted, PREPROCESSING, RecordingAugmentation(), 1)
    with ThreadPoolExecutor(2) as pool:
        original, augmented = pool.map(views.prepare, range(2))
    assert torch.equal(original + 1, augmented)
    assert counted.decoded == [1]


def test_views_keep_few_images_in_memory():
    views = views_of(images(100), RecordingAugmentation(), 1)
    all_of(views)
    assert len(views._resized) <= 64
    alone = views_of(images(30), RecordingAugmentation(), only=1)
    all_of(alone)
    assert not alone._resized


def test_in_place_transform_leaves_the_kept_image_unchanged():
    def blacken(image):
        return image.fill_(0)

    X = images(1)
    views = views_of(X, resolve_augmentation(blacken), 1)
    assert views.prepare(1).sum() == 0
    assert torch.equal(views.prepare(0), PREPROCESSING.prepare(X[0]))


@pytest.mark.parametrize("method", ["prepare", "fingerprint"])
def test_broken_image_names_the_row_of_x(method, tmp_path):
    chosen = as_images([*images(2), str(tmp_path / "missing.png")]).take([2, 0])
    views = Views(chosen, PREPROCESSING, RecordingAugmentation(), 2)
    with pytest.raises(ImageError) as caught:
        getattr(views, method)(1)
    assert caught.value.row == 2
    getattr(views, method)(3)
