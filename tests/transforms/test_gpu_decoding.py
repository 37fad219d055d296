import numpy as np
import pytest
import torch
import torchvision
from helpers import cosine
from PIL import Image
from sklearn.datasets import load_sample_image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.data.images import as_images
from sktransfer.transforms import gpu_decoding as device_decoding
from sktransfer.transforms.gpu_decoding import decodes_on, prepare_jpegs
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError

CPU = torch.device("cpu")  # decodes batches as well
PREPROCESSING = Preprocessing(resize=120, crop=(96, 96))

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture
def jpegs(tmp_path):
    """Write one image in every format that is decoded in its own way."""
    image = Image.fromarray(load_sample_image("china.jpg")[:240, :300])
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "progressive.jpg", progressive=True)
    image.convert("L").save(tmp_path / "gray.jpg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "image.png")
    image.resize((1200, 900)).save(tmp_path / "large.jpg")
    image.resize((900, 60)).save(tmp_path / "strip.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=turned)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "plain.jpg").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("no image")
    return tmp_path


def views(jpegs, *names, **options):
    return Views(as_images([str(jpegs / name) for name in names]), PREPROCESSING, **options)


def test_prepare_on_equals_the_default_decoder(jpegs):
    chosen = views(jpegs, "plain.jpg", "gray.jpg", "progressive.jpg", "strip.jpg")
    decoded = chosen.prepare_on(CPU, range(4))
    assert list(decoded) == [0, 1, 2, 3]
    for item, pixels in decoded.items():
        expected = chosen.prepare(item)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, expected.shape)
        assert (pixels.short() - expected.short()).abs().max() <= 2


def test_prepare_on_skips_special_files(jpegs):
    names = ["turned.jpg", "cmyk.jpg", "image.png", "large.jpg", "text.jpg", "nowhere.jpg"]
    assert views(jpegs, *names).prepare_on(CPU, range(6)) == {}
    assert views(jpegs, "plain.jpg", augmentation=object()).prepare_on(CPU, [0]) == {}
    array = Views(as_images(np.zeros((2, 8, 8, 3), np.uint8)), PREPROCESSING)
    assert array.prepare_on(CPU, range(2)) == {}


def test_prepare_on_decodes_encoded_bytes(jpegs):
    encoded = [(jpegs / "plain.jpg").read_bytes()] * 2
    assert len(Views(as_images(encoded), PREPROCESSING).prepare_on(CPU, range(2))) == 2


def test_broken_image_is_named_and_the_others_are_decoded(jpegs):
    chosen = views(jpegs, "plain.jpg", "broken.jpg", "gray.jpg", "turned.jpg")
    with pytest.raises(ImageError, match=r"row 1 .*broken\.jpg"):
        list(ImageReader(chosen, 2, ImageErrors("raise"), CPU).map(torch.Tensor.numpy, [range(4)]))
    image_errors = ImageErrors("nan")
    ((rows, pixels),) = ImageReader(chosen, 2, image_errors, CPU).map(
        torch.Tensor.numpy, [range(4)]
    )
    assert rows == [0, 2, 3]
    assert [error.row for error in image_errors.sorted()] == [1]
    for row, prepared in zip(rows, pixels, strict=True):
        np.testing.assert_allclose(prepared, chosen.prepare(row), atol=2)


def test_prepare_on_skips_the_batch_of_a_broken_image(jpegs, monkeypatch):
    monkeypatch.setattr(device_decoding, "_IMAGES_PER_BATCH", 2)
    chosen = views(jpegs, "plain.jpg", "broken.jpg", "gray.jpg", "progressive.jpg", "plain.jpg")
    assert list(chosen.prepare_on(CPU, range(5))) == [2, 3, 4]


@pytest.mark.parametrize(
    "error", [RuntimeError("no nvJPEG"), torch.OutOfMemoryError(), NotImplementedError()]
)
def test_prepare_on_returns_nothing_if_the_device_cannot_decode(jpegs, error, monkeypatch):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(torchvision.io, "decode_jpeg", fails)
    assert views(jpegs, "plain.jpg").prepare_on(CPU, [0]) == {}
    monkeypatch.delattr(torchvision.io, "decode_jpeg")  # as in a later torchvision
    encoded = {7: (jpegs / "plain.jpg").read_bytes()}
    assert prepare_jpegs(encoded, lambda pixels: pixels, CPU) == {}


def test_gpu_decoding_is_off_by_default(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert not decodes_on(cuda)
    monkeypatch.setenv("SKTRANSFER_DEVICE_JPEG", "1")
    assert decodes_on(cuda)
    assert not decodes_on(CPU)


@pytest.mark.gpu
def test_gpu_decoding_gives_the_same_embeddings(jpegs, monkeypatch):
    paths = [str(jpegs / name) for name in ("plain.jpg", "gray.jpg", "turned.jpg", "large.jpg")]
    extractor = PretrainedFeatureExtractor(device="cuda", cache=None).fit(paths * 40)
    expected = extractor.transform(paths * 40)
    monkeypatch.setenv("SKTRANSFER_DEVICE_JPEG", "1")
    cuda = torch.device("cuda")
    chosen = Views(as_images(paths), PREPROCESSING)
    assert set(chosen.prepare_on(cuda, range(4))) == {0, 1}
    assert cosine(extractor.transform(paths * 40), expected).min() >= 0.999
