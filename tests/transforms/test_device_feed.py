"""The device reads images as the CPU does: the same pixels, errors and order, without races."""

import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import torchvision
from emulated_cuda import CUDA, OnCuda, emulated_cuda
from emulated_cuda import decode_jpeg as emulated_decoder
from helpers import SIZE, Tiny, cosine, make_classifier
from PIL import Image
from sklearn.datasets import load_sample_image

from sktransfer import ImageError, PretrainedFeatureExtractor
from sktransfer.data.images import as_images
from sktransfer.engines.torch_engine import TorchEngine
from sktransfer.transforms import device_feed, device_views
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.device_feed import DeviceFeed, image_reader
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views

PREPROCESSING = Preprocessing(resize=40, crop=(32, 32))
PHOTOGRAPH = load_sample_image("china.jpg").copy()
GOOD = ["plain", "gray", "progressive", "cmyk", "turned", "png", "large", "strip", "small"]
BROKEN = ["truncated", "text", "empty", "missing"]


def part(number):
    """Cut out a part of the photograph, each of another size."""
    return PHOTOGRAPH[200 + number : 290 + 2 * number, 2 * number : 2 * number + 120]


@pytest.fixture
def files(tmp_path):
    """Write images that the device decodes, that it does not decode, and that are broken."""
    image = Image.fromarray(part(0))
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "plain.jpg")
    image.convert("L").save(tmp_path / "gray.jpg")
    image.save(tmp_path / "progressive.jpg", progressive=True)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "turned.jpg", exif=turned)
    image.save(tmp_path / "png.png")
    image.resize((900, 700)).save(tmp_path / "large.jpg")
    image.resize((300, 20)).save(tmp_path / "strip.jpg")
    image.resize((11, 9)).save(tmp_path / "small.jpg")
    data = (tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for number in range(20):
        Image.fromarray(part(number)).save(tmp_path / f"{number}.jpg")
    return tmp_path


def paths(files, names):
    found = [next(files.glob(f"{name}.*"), files / f"{name}.jpg") for name in names]
    return [str(path) for path in found]


def views_of(X, **options):
    return Views(as_images(X), PREPROCESSING, **options)


def read(views, batch_size=4, image_errors=None, threads=2):
    """Read all pixels with a feed of the emulated device: an array per row."""
    feed = DeviceFeed(views, threads, image_errors or ImageErrors("raise"), CUDA)
    starts = range(0, len(views), batch_size)
    batches = [range(start, min(start + batch_size, len(views))) for start in starts]
    found = {}
    for rows, values in feed.map(lambda pixels, exact: pixels.flatten(1).float(), batches):
        found |= dict(zip(rows, values, strict=True))
    return {row: values.reshape(3, *PREPROCESSING.crop) for row, values in found.items()}


def assert_as_on_the_cpu(found, views, tolerance=2):
    assert sorted(found) == list(range(len(views)))
    for row, pixels in found.items():
        np.testing.assert_allclose(pixels, views.prepare(row).numpy(), atol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("form", ["paths", "bytes"])
def test_files_have_the_pixels_of_the_cpu(files, batch_size, form):
    X = paths(files, [*GOOD, *range(20)] * 2)
    X = X if form == "paths" else [Path(path).read_bytes() for path in X]
    with emulated_cuda() as device:
        found = read(views_of(X), batch_size)
        assert device.races == []
        assert device.waits["decode_jpeg"] >= 1
    # The emulated device decodes as the CPU, which decodes a far larger JPEG at a reduced size.
    assert_as_on_the_cpu(found, views_of(X))


def test_urls_have_the_pixels_of_files_and_are_read_once(files, monkeypatch):
    # A strip and a small JPEG are read before it is known that the device cannot resize them.
    names = [name for name in [*GOOD, *range(20)] if name not in ("strip", "small")]
    filesystem, fetched = fsspec.filesystem("memory"), list[str]()
    for path in paths(files, names):
        filesystem.pipe_file(path, Path(path).read_bytes())
    cat_file = type(filesystem).cat_file

    def counted(self, path, **options):
        fetched.append(path)
        return cat_file(self, path, **options)

    monkeypatch.setattr(type(filesystem), "cat_file", counted)
    with emulated_cuda():
        found = read(views_of([f"memory:/{path}" for path in paths(files, names)]))
    assert sorted(fetched) == sorted(paths(files, names))
    assert_as_on_the_cpu(found, views_of(paths(files, names)))
    filesystem.rm(str(files), recursive=True)


def test_host_waits_once_for_a_batch(files):
    X, n_batches = paths(files, [*range(20)] * 4), 10
    with emulated_cuda() as device:
        read(views_of(X[:8]))  # constants are copied once
        device.waits.clear()
        read(views_of(X), batch_size=8)
        decoded = device.waits.pop("decode_jpeg")
        assert decoded == n_batches
        # Two streams are waited for before their first batch, too.
        assert dict(device.waits) == {"stream": n_batches + 2}


@pytest.mark.parametrize("form", ["array", "channels first", "tensor", "tensor on the device"])
def test_stacks_are_copied_in_batches_and_have_the_pixels_of_the_cpu(form, monkeypatch):
    stack = np.stack([PHOTOGRAPH[i : i + 60, i : i + 70] for i in range(11)])
    first = np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
    monkeypatch.setattr(DeviceFeed, "_read", None)  # no image is read by itself
    with emulated_cuda() as device:
        X = {
            "array": stack,
            "channels first": first,
            "tensor": torch.from_numpy(first),
            "tensor on the device": torch.from_numpy(first).to(CUDA),
        }[form]
        read(views_of(X))
        device.waits.clear()
        found = read(views_of(X))
        assert device.waits["stream"] == sum(device.waits.values()) <= 6
        assert device.races == []
    assert_as_on_the_cpu(found, views_of(stack))


@pytest.mark.parametrize(
    "X",
    [
        np.stack([PHOTOGRAPH[i : i + 50, :60, 0] for i in range(5)]),
        np.stack([PHOTOGRAPH[i : i + 50, :60] for i in range(5)]) / 255,
        np.stack([np.dstack([PHOTOGRAPH[i : i + 50, :60]] * 2)[:, :, :4] for i in range(5)]),
        [PHOTOGRAPH[i : i + 50, : 60 + i] for i in range(5)],
        [Image.fromarray(PHOTOGRAPH[i : i + 50, : 60 + i]) for i in range(5)],
        [PHOTOGRAPH[:8, : 60 + i] for i in range(5)],
        np.stack([PHOTOGRAPH[i : i + 8, :60] for i in range(5)]),
        [torch.from_numpy(PHOTOGRAPH[i : i + 50, :60]).permute(2, 0, 1) for i in range(5)],
    ],
    ids=["gray", "float", "alpha", "list", "PIL", "strips", "stack of strips", "tensors"],
)
def test_other_containers_have_the_pixels_of_the_cpu(X):
    with emulated_cuda() as device:
        found = read(views_of(X), batch_size=2)
        assert device.races == []
    assert_as_on_the_cpu(found, views_of(X))


def invert(image):
    return 255 - image


@pytest.mark.parametrize("augment", ["light", "standard", "aggressive", "industrial", invert])
def test_views_are_those_of_the_cpu(files, augment):
    options = {"augmentation": resolve_augmentation(augment), "n_views": 3}
    X = paths(files, [*GOOD, *range(6)])
    with emulated_cuda() as device:
        found = read(views_of(X, **options), batch_size=8)
        assert device.races == []
        # The device computes the views of all policies, and the CPU those of other functions.
        assert (device.waits["decode_jpeg"] > 0) == (augment is not invert)
    views = views_of(X, **options)
    assert_as_on_the_cpu(found, views, tolerance=6)  # three roundings, with contrast
    differences = [np.abs(found[row] - views.prepare(row).numpy()).mean() for row in found]
    assert max(differences) < 0.2


def test_views_without_the_image_itself_are_those_of_the_cpu(files):
    options = {"augmentation": resolve_augmentation("standard"), "only": 2, "salt": b"s"}
    X = paths(files, [*range(20)] * 2)
    with emulated_cuda() as device:
        found = read(views_of(X, **options), batch_size=9)
        assert device.races == []
    assert_as_on_the_cpu(found, views_of(X, **options), tolerance=6)


def test_broken_images_of_views_have_the_errors_of_the_cpu(files):
    options = {"augmentation": resolve_augmentation("standard"), "n_views": 1}
    X = paths(files, [0, "text", 1, "missing", "truncated"])
    (files / "1.jpg").write_bytes((files / "1.jpg").read_bytes()[:-90] + b"\xff\xd9")
    with emulated_cuda(), pytest.raises(ImageError) as caught:
        read(views_of(X, **options), batch_size=4)
    assert {1, 3, 4} <= {error.row for error in caught.value.errors}


def test_groups_of_views_within_the_memory_limit_give_the_same(files, monkeypatch):
    options = {"augmentation": resolve_augmentation("standard"), "n_views": 3}
    X = paths(files, range(6))
    with emulated_cuda():
        expected = read(views_of(X, **options), batch_size=24)
        monkeypatch.setattr(device_views, "_MAX_BYTES", 12 * 60 * 60 * 5)
        found = read(views_of(X, **options), batch_size=24)
    for row, pixels in expected.items():
        np.testing.assert_allclose(found[row], pixels, atol=1)


def test_selected_rows_of_a_stack_are_read(files):
    stack = np.stack([PHOTOGRAPH[i : i + 60, i : i + 70] for i in range(11)])
    images = as_images(stack).take([7, 2, 2, 9])
    with emulated_cuda():
        found = read(Views(images, PREPROCESSING), batch_size=3)
    assert_as_on_the_cpu(found, Views(images, PREPROCESSING))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_broken_images_have_the_errors_of_the_cpu(files, batch_size):
    X = paths(files, ["plain", "truncated", "png", "text", "empty", 3, "missing", "truncated", 4])
    on_cpu = ImageErrors("nan")
    rows = [
        row for rows, _ in ImageReader(views_of(X), 2, on_cpu).batches(range(9), 3) for row in rows
    ]
    assert rows == [0, 2, 5, 8]
    with emulated_cuda():
        kept = ImageErrors("nan")
        assert sorted(read(views_of(X), batch_size, kept)) == rows
        with pytest.raises(ImageError) as caught:
            read(views_of(X), batch_size)
    assert [str(error) for error in kept.sorted()] == [str(error) for error in on_cpu.sorted()]
    assert [error.row for error in caught.value.errors] == [1, 3, 4, 6, 7]


def test_image_that_breaks_the_decoder_does_not_take_others_with_it(files, monkeypatch):
    X = paths(files, range(16))
    data = (files / "plain.jpg").read_bytes()
    (files / "5.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    calls, decode = [], emulated_decoder

    def strict(encoded, mode, device):
        calls.append(len(encoded))
        if any(len(each) == len(data) // 2 + 2 for each in encoded):
            raise RuntimeError("nvjpeg error")
        return decode(encoded, mode, device)

    with emulated_cuda() as device:
        with monkeypatch.context() as patch:
            patch.setattr(torchvision.io, "decode_jpeg", strict)
            kept = ImageErrors("nan")
            found = read(views_of(X), 16, kept)
        assert device.races == []
    assert max(calls) == 16
    assert len(calls) <= 2 + 2 * 4  # halved until the broken one is alone
    assert len(found) + len(kept.sorted()) == 16
    assert set(range(16)) - set(found) <= {5}


def test_device_without_a_decoder_leaves_decoding_to_the_cpu(files, monkeypatch):
    X = paths(files, [*GOOD, *range(8)])
    calls = []

    def fails(encoded, mode, device):
        calls.append(len(encoded))
        raise RuntimeError("torchvision was built without nvJPEG")

    with emulated_cuda(), monkeypatch.context() as patch:
        patch.setattr(torchvision.io, "decode_jpeg", fails)
        found = read(views_of(X))
    assert calls == [1]  # tried once
    assert_as_on_the_cpu(found, views_of(X))


def test_device_that_decodes_few_of_the_files_is_not_asked_for_long(files, monkeypatch):
    X = paths(files, [*range(20)] * 10)
    calls = []

    def fails(encoded, mode, device):
        calls.append(len(encoded))
        if len(calls) == 1:
            return emulated_decoder(encoded, mode, device)
        raise RuntimeError("nvjpeg: unsupported sampling")

    with emulated_cuda() as device, monkeypatch.context() as patch:
        patch.setattr(torchvision.io, "decode_jpeg", fails)
        found = read(views_of(X), 8)
        assert device.races == []
    assert sum(calls) <= 1 + 8 * 4  # the first batch only, halved to single images
    assert_as_on_the_cpu(found, views_of(X))


def test_several_threads_read_only_if_the_storage_is_slow(monkeypatch):
    monkeypatch.setattr(device_feed, "_SLOW_STORAGE", 50)  # on a loaded machine, too

    def compute():
        start = time.thread_time()
        while time.thread_time() < start + 0.002:
            pass
        return threading.get_ident()

    def wait():
        time.sleep(0.01)
        return threading.get_ident()

    for task, is_slow in ((compute, False), (wait, True)):
        with device_feed._Readers() as readers:
            threads = [readers.submit(task).result() for _ in range(40)]
        assert (len({*threads}) > 4) == is_slow


def test_variable_leaves_decoding_to_the_cpu(files, monkeypatch):
    monkeypatch.setenv("SKTRANSFER_DEVICE_JPEG", "0")
    X = paths(files, range(8))
    with emulated_cuda() as device:
        found = read(views_of(X))
        assert device.waits["decode_jpeg"] == 0
    assert_as_on_the_cpu(found, views_of(X), tolerance=2)


def test_groups_of_decoded_pixels_do_not_race(files, monkeypatch):
    monkeypatch.setattr(device_feed, "_MAX_DECODED_BYTES", 3 * 120 * 120 * 3)
    X = paths(files, range(20))
    with emulated_cuda() as device:
        found = read(views_of(X), 20)
        assert device.races == []
        assert device.waits["decode_jpeg"] > 4
    assert_as_on_the_cpu(found, views_of(X))


def test_reading_for_another_stream_waits_for_the_pixels(files):
    X = paths(files, [*GOOD, *range(6)])
    views, batches = views_of(X), [range(5), range(5, 15)]
    with emulated_cuda() as device:
        found = {}
        reader = image_reader(views, 2, ImageErrors("raise"), CUDA, decodes=True)
        for rows, pixels in reader.read(batches):
            assert isinstance(pixels, OnCuda)
            found |= dict(zip(rows, (pixels + 0).cpu().numpy(), strict=True))
        assert device.races == []
    assert_as_on_the_cpu(found, views)
    assert isinstance(
        image_reader(views, 2, ImageErrors("raise"), torch.device("cpu"), decodes=True), ImageReader
    )


# Networks


def extractor(**options):
    return PretrainedFeatureExtractor(Tiny, engine="torch", cache=None, **options)


@pytest.fixture(name="X")
def many_files(files):
    return paths(files, [*GOOD, *range(20)] * 3)


@pytest.mark.parametrize(
    ("precision", "decodes"), [("auto", True), ("float32", False), ("bfloat16", True)]
)
@pytest.mark.parametrize("options", [{}, {"batch_size": 7}, {"n_jobs": 1}, {"n_jobs": 9}])
def test_embeddings_equal_those_of_the_cpu(X, precision, decodes, options):
    expected = extractor(device="cpu").fit_transform(X)
    mean = expected.mean(0)
    with emulated_cuda() as device:
        found = extractor(device="cuda", precision=precision, **options).fit_transform(X)
        assert device.races == []
        # In float32, CPU and device share embeddings in the store.
        assert (device.waits["decode_jpeg"] > 0) == decodes
    assert cosine(found - mean, expected - mean).min() > 0.99


def test_out_of_memory_halves_the_batch_for_all_that_follow(X, monkeypatch):
    expected = extractor(device="cpu").fit_transform(X)
    normalized, sizes = TorchEngine._normalized, []

    def scarce(self, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 10:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return normalized(self, pixels)

    monkeypatch.setattr(TorchEngine, "_normalized", scarce)
    with emulated_cuda():
        found = extractor(device="cuda", batch_size=30).fit_transform(X)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    failed = [size for size in sizes if size > 10]
    assert failed == [30, 15]


def test_overflow_of_float16_is_computed_again_in_float32(X, monkeypatch):
    expected = extractor(device="cpu").fit_transform(X)
    forward, exactly = TorchEngine.forward, []

    def overflowing(self, pixels, exact=False):
        embeddings = forward(self, pixels, exact)
        exactly.append(exact)
        return embeddings if exact else embeddings / 0

    monkeypatch.setattr(TorchEngine, "forward", overflowing)
    with emulated_cuda() as device:
        found = extractor(device="cuda", batch_size=50).fit_transform(X)
        assert device.races == []
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    assert exactly.count(True) == exactly.count(False) == 2


@pytest.mark.parametrize("on_error", ["nan", "raise"])
def test_broken_files_of_an_extractor_are_named_together(files, X, on_error, tmp_path):
    broken = X[:10] + paths(files, BROKEN) + X[10:]
    for cache in (None, tmp_path / "store"):
        model = PretrainedFeatureExtractor(
            Tiny, engine="torch", device="cuda", cache=cache, on_error=on_error
        )
        with emulated_cuda():
            if on_error == "raise":
                with pytest.raises(ImageError) as caught:
                    model.fit_transform(broken)
                errors = caught.value.errors
            else:
                embeddings = model.fit_transform(broken)
                assert np.isnan(embeddings).any(1).nonzero()[0].tolist() == [10, 11, 12, 13]
                errors = model.errors_
        assert [error.row for error in errors] == [10, 11, 12, 13]


LABELS = np.arange(24) % 3
IMAGES = np.random.default_rng(0).integers(0, 120, (24, SIZE, SIZE, 3)).astype(np.uint8)
for _row, _label in enumerate(LABELS):
    IMAGES[_row, :, :, _label] += 100


@pytest.mark.parametrize(
    "options",
    [
        {"unfreeze": 0},
        {"unfreeze": (0, 1)},
        {"unfreeze": "all", "augment": None},
        {"unfreeze": (0, 1), "n_views": None},
        {"unfreeze": (0, 1), "augment": "standard"},
        {"unfreeze": (0, 1), "batch_norm": "adapt"},
        {"unfreeze": (0, 1), "batch_norm": "train", "mixup": 0.2},
    ],
)
def test_classifier_on_the_device_predicts_as_on_the_cpu(options):
    settings = {"max_epochs": 2, "random_state": 0, "cache": None, **options}
    on_cpu = make_classifier(device="cpu", engine="torch", **settings).fit(IMAGES, LABELS)
    with emulated_cuda() as device:
        classifier = make_classifier(device="cuda", **settings).fit(IMAGES, LABELS)
        found = classifier.predict_proba(IMAGES)
        embeddings = classifier.transform(IMAGES)
        assert device.races == []
    np.testing.assert_allclose(found, on_cpu.predict_proba(IMAGES), atol=0.02)
    assert cosine(embeddings, on_cpu.transform(IMAGES)).min() > 0.999


def test_adversarial_fit_runs_on_the_device():
    domain = np.where(np.arange(24) < 12, 1, -1)
    settings = {"unfreeze": (0, 1), "domain_adversarial": 1.0, "max_epochs": 2, "cache": None}
    with emulated_cuda() as device:
        classifier = make_classifier(device="cuda", random_state=0, **settings)
        classifier.fit(IMAGES, LABELS, sample_domain=domain)
        assert device.races == []
        assert classifier.predict(IMAGES).shape == (24,)


def test_training_waits_three_times_a_step():
    settings = {"unfreeze": 1, "early_stopping": False, "batch_size": 4}
    with emulated_cuda() as device:
        counts = []
        for max_epochs in (2, 4):
            device.waits.clear()
            settings["max_epochs"] = max_epochs
            make_classifier(device="cuda", augment=None, cache=None, **settings).fit(IMAGES, LABELS)
            counts.append(sum(device.waits.values()))
    # The losses, the metric, and skorch's own loss; and a few for each epoch.
    assert counts[1] - counts[0] <= 2 * (3 * 6 + 6)
