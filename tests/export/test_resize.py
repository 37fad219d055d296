"""The pixels of the ONNX graph are those of torch on a CPU, to the bit."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_helpers import PREPROCESSINGS, RESIZED_SIZES
from helpers import images, smooth_image

from sktransfer.export.resize import crop_graph
from sktransfer.transforms import modules
from sktransfer.transforms.modules import ResizeAndCrop
from sktransfer.transforms.preprocessing import Preprocessing


def session(preprocessing):
    graph = crop_graph(preprocessing)
    onnx.checker.check_model(graph, full_check=True)
    return onnxruntime.InferenceSession(graph.SerializeToString())


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_crops_are_those_of_the_module(preprocessing, monkeypatch):
    # As on all CPUs but old ones.
    monkeypatch.setattr(modules, "_resizes_integers", lambda *arguments: True)
    crop, module = session(preprocessing), ResizeAndCrop(preprocessing)
    for seed, (height, width) in enumerate(RESIZED_SIZES):
        noise = images(1, max(height, width), seed)[:, :height, :width]
        smooth = smooth_image(height, width, seed).permute(1, 2, 0)[None].numpy()
        for batch in (noise, smooth):
            (found,) = crop.run(None, {"images": np.ascontiguousarray(batch)})
            expected = module(torch.from_numpy(batch.copy()).permute(0, 3, 1, 2)).numpy()
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, expected, err_msg=f"{height} x {width}")


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_large_photographs_are_exact(name):
    """A resized pixel is the mean of many, so weights are small, and sums are large."""
    preprocessing = Preprocessing(24, (20, 20), name)
    bright = 255 - images(1, 1000)[:, :800] // 8
    (found,) = session(preprocessing).run(None, {"images": bright})
    expected = preprocessing.prepare(bright[0]).numpy()
    np.testing.assert_array_equal(found[0], expected)


def test_images_of_a_batch_are_cropped_alike():
    batch, crop = images(3, 90)[:, :70], session(PREPROCESSINGS["odd crop"])
    (together,) = crop.run(None, {"images": np.ascontiguousarray(batch)})
    apart = [crop.run(None, {"images": image[None]})[0] for image in batch]
    np.testing.assert_array_equal(together, np.concatenate(apart))
