import numpy as np
import pytest
from helpers import Tiny, images

from sktransfer import PretrainedFeatureExtractor
from sktransfer.diagnostics.extraction import read_images, resolve_extractor


def test_resolve_extractor_returns_an_unfitted_copy():
    extractor = PretrainedFeatureExtractor(Tiny, cache=None, image_size=24).fit(images(2))
    resolved = resolve_extractor(extractor, image_size=48)
    assert resolved is not extractor
    assert resolved.get_params() == extractor.get_params()
    assert not hasattr(resolved, "digest_")
    assert hasattr(extractor, "digest_")


def test_resolve_extractor_applies_defaults_only_to_a_new_extractor():
    resolved = resolve_extractor(None, image_size=48, cache=None)
    expected = PretrainedFeatureExtractor(image_size=48, cache=None)
    assert resolved.get_params() == expected.get_params()


@pytest.mark.parametrize("extractor", ["resnet18", Tiny, PretrainedFeatureExtractor])
def test_resolve_extractor_rejects_other_types(extractor):
    with pytest.raises(TypeError, match=r"^Got extractor=.*, but expected a Pretrained.* or None"):
        resolve_extractor(extractor)


def test_read_images_applies_the_shape_and_range_of_the_extractor():
    rows = np.linspace(0, 16, 128).reshape(2, 64)
    extractor = PretrainedFeatureExtractor(Tiny, image_shape=(8, 8), cache=None).fit(rows)
    read = read_images(extractor, rows[:1] / 16)
    assert read[0].shape == (8, 8, 3)
    assert read[0].max() <= 8, "the range was learned again"
