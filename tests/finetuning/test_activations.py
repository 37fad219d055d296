"""Activations at a boundary are gathered, advanced and kept in scratch arrays."""

import dataclasses
import errno
import gc
import math
import os
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from activation_helpers import FLOAT16_TOLERANCE, TINY, compute_config, run_in_torch, views_of
from helpers import CountingTiny, cosine, counted, images
from torch import nn

from sktransfer.backbones.loading import load_backbone
from sktransfer.embedding.recipe import recipe_at
from sktransfer.engines.batch_size import auto_batch_size
from sktransfer.engines.torch_engine import TorchEngine
from sktransfer.finetuning import activations
from sktransfer.finetuning.activations import disk_problem, gather, run_span, scratch_array
from sktransfer.store.store import EmbeddingStore
from sktransfer.utils.errors import ImageError

CPU = torch.device("cpu")


def gathered(views, boundary, backbone=TINY, store=None, precision=torch.float32):
    recipe = recipe_at(backbone, views.preprocessing, boundary, precision)
    return gather(views, recipe, boundary, compute_config(store))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("boundary", "dtype"), [(1, np.float16), (2, np.float32)])
def test_gathered_activations_equal_plain_torch(boundary, dtype, stored, store):
    views = views_of()
    activations = gathered(views, boundary, store=store if stored else None)
    expected = run_in_torch(views, boundary)
    assert activations.values.dtype == dtype
    assert activations.boundary == boundary
    assert activations.shape == tuple(expected.shape[1:])
    tolerance = FLOAT16_TOLERANCE if dtype == np.float16 else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(activations.values, expected.flatten(1), **tolerance)


def test_activations_of_lite0_equal_plain_torch_at_deep_boundaries():
    lite0 = load_backbone("efficientnet_lite0")
    views = views_of(images(2, side=90), 1, lite0, size=64)
    activations = gathered(views, 11, lite0)
    assert activations.values.dtype == np.float16
    expected = run_in_torch(views, 11, lite0)
    assert activations.shape == tuple(expected.shape[1:]) == (112, 4, 4)
    np.testing.assert_allclose(activations.values, expected.flatten(1), rtol=1e-3, atol=1e-3)
    for boundary in (12, 18):
        later = activations.advance(boundary, CPU)
        assert cosine(later.values, run_in_torch(views, boundary, lite0).flatten(1)).min() > 0.99999
        assert later.shape == tuple(run_in_torch(views, boundary, lite0).shape[1:])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_advance_equals_gathering_at_the_later_boundary(precision):
    views = views_of()
    early = gathered(views, 1, precision=precision)
    late = early.advance(2, CPU)
    expected = gathered(views, 2, precision=precision)
    assert late.boundary == 2
    assert late.recipe == expected.recipe
    assert late.values.dtype == expected.values.dtype
    if precision == torch.float32:
        np.testing.assert_allclose(late.values, expected.values, **FLOAT16_TOLERANCE)
    assert cosine(late.values, expected.values).min() > 0.9999


def test_advance_runs_the_blocks_on_the_stored_values():
    early = gathered(views_of(), 1)
    x = torch.from_numpy(early.values.astype(np.float32)).reshape(-1, *early.shape)
    expected = run_in_torch(None, 2, start=1, x=x)
    np.testing.assert_allclose(early.advance(2, CPU).values, expected, rtol=1e-5)


def test_advance_to_the_same_boundary_returns_the_same_object():
    activations = gathered(views_of(3), 1)
    assert activations.advance(1, CPU) is activations


@pytest.mark.parametrize("boundary", [1, 2])
def test_gathered_bits_do_not_depend_on_the_other_views(boundary, store):
    X = images(23)
    expected = gathered(views_of(X), boundary).values
    order = np.random.default_rng(0).permutation(23)
    shuffled = gathered(views_of(X[order]), boundary).values.reshape(23, 2, -1)
    np.testing.assert_array_equal(shuffled, expected.reshape(23, 2, -1)[order])
    for row in (0, 22):
        alone = gathered(views_of(X[row : row + 1]), boundary).values
        np.testing.assert_array_equal(alone, expected[2 * row : 2 * row + 2])
    gathered(views_of(X[7:12]), boundary, store=store)  # stores the rows in the middle
    for _ in range(2):
        np.testing.assert_array_equal(gathered(views_of(X), boundary, store=store).values, expected)


def test_gather_pads_every_batch(monkeypatch):
    forward, sizes = TorchEngine._run, []

    def noted(self, batch):
        sizes.append(len(batch))
        return forward(self, batch)

    monkeypatch.setattr(TorchEngine, "_run", noted)
    gathered(views_of(20), 1)  # 40 views
    gathered(views_of(1), 1)
    size = auto_batch_size(CPU, TINY.preprocessing.crop)
    assert sizes == [size] * (math.ceil(40 / size) + 1)


def test_advanced_bits_do_not_depend_on_the_other_views():
    X = images(23)
    order = np.random.default_rng(0).permutation(23)
    expected = gathered(views_of(X), 1).advance(2, CPU).values.reshape(23, 2, -1)
    shuffled = gathered(views_of(X[order]), 1).advance(2, CPU).values.reshape(23, 2, -1)
    np.testing.assert_array_equal(shuffled, expected[order])
    first_two = gathered(views_of(X[:2]), 1).advance(2, CPU).values.reshape(2, 2, -1)
    np.testing.assert_array_equal(first_two, expected[:2])


def test_gather_embeds_each_view_once(log, store):
    backbone = load_backbone(CountingTiny(log))
    for _ in range(2):
        gathered(views_of(20, 2, backbone), 1, backbone, store)
    assert counted(log) == 60
    gathered(views_of(20, 3, backbone), 1, backbone, store)
    assert counted(log) == 80, "views that are there were computed again"


def test_gather_names_the_row_of_a_broken_image(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    X = [*images(20), b"no image"]
    with pytest.raises(ImageError) as caught:
        gathered(views_of(X), 1)
    assert caught.value.row == 20
    del caught
    gc.collect()
    assert not list(tmp_path.glob("sktransfer-*"))


def test_scratch_file_is_removed_with_its_array(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = scratch_array((3, 5), "float16")
    array[:] = 7
    part = array.reshape(3, 5, 1)[1:]
    del array
    gc.collect()
    assert (part == 7).all()
    assert part.dtype == np.float16
    del part
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_scratch_file_that_stays_open_is_removed_with_its_array(tmp_path, monkeypatch):
    """Windows does not delete an open file."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    unlink, refused = Path.unlink, []

    def reluctant(path, missing_ok=False):
        if not refused:
            refused.append(path)
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", reluctant)
    array = scratch_array((3, 5), "float32")
    array[:] = 1
    assert list(tmp_path.iterdir()) == refused
    del array
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_scratch_array_leaves_no_file_if_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations.np, "memmap", full)
    with pytest.raises(OSError, match="No space left"):
        scratch_array((3, 5), "float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("free", "limit", "problem"),
    [
        (20_480, 10_240, None),
        (20_480, None, None),
        (20_478, None, "10,240 bytes, but half of the free disk space is only 10,239"),
        (20_478, 1, "10,240 bytes, but half of the free disk space is only 10,239"),
        (10**9, 10_239, "10,240 bytes, but the store is limited to 10,239"),
    ],
)
def test_fits_on_disk_returns_none_or_the_reason(free, limit, problem, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, free)
    paths = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: paths.append(path) or usage)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = None if limit is None else EmbeddingStore(tmp_path, max_bytes=limit)
    recipe = recipe_at(TINY, TINY.preprocessing, 1, torch.float32)  # 8 x 8 x 8 values of 2 bytes
    assert disk_problem(10, recipe, store) == problem
    assert paths == [str(tmp_path)]


def test_fits_on_disk_counts_twice_the_bytes_for_float32(monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    recipe = recipe_at(TINY, TINY.preprocessing, 1, torch.float32)
    wide = dataclasses.replace(recipe, dtype="float32")
    assert disk_problem(1, recipe, None).startswith("1,024 bytes")
    assert disk_problem(1, wide, None).startswith("2,048 bytes")


def test_scratch_array_on_a_full_disk_raises_before_writing(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(activations.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"Got 4,000 bytes .*No space left.*TMPDIR"):
        scratch_array((10, 100), "float32")
    assert list(tmp_path.iterdir()) == []


def test_scratch_array_allocates_its_space_at_once(monkeypatch, tmp_path):
    taken = []
    fallocate = os.posix_fallocate

    def noted(file, start, size):
        fallocate(file, start, size)
        taken.append((os.fstat(file).st_blocks * 512, size))

    monkeypatch.setattr(activations.os, "posix_fallocate", noted)
    scratch_array((100, 1000), "float16")
    ((blocks, size),) = taken
    assert blocks >= size == 200_000


def test_run_span_falls_back_to_float32_on_overflow():
    class Large(nn.Module):
        def forward(self, x):
            return (x @ torch.full((3, 3), 4e4, dtype=x.dtype)) / 4e4

    x = torch.full((2, 3), 2.0)
    low = run_span(Large(), x, CPU, torch.float16)
    np.testing.assert_allclose(low, run_span(Large(), x, CPU, torch.float32), rtol=1e-3)
    assert low.dtype == np.float32


def test_run_span_halves_the_batch_on_out_of_memory():
    class Scarce(nn.Module):
        def forward(self, x):
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 2 * x

    x = torch.arange(22.0).reshape(11, 2)
    assert (run_span(Scarce(), x, CPU, torch.float32) == 2 * x.numpy()).all()
