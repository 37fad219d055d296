"""embed_to writes the embeddings of transform, with the memory of a block."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    BROKEN_ROWS,
    Items,
    Tiny,
    X,
    images,
    make_classifier,
    paths_with_broken,
    save_images,
)
from sklearn.exceptions import NotFittedError

from sktransfer import PretrainedFeatureExtractor
from sktransfer.embedding import output
from sktransfer.utils.errors import ImageError


def fitted(X, **parameters):
    return PretrainedFeatureExtractor(Tiny, **{"cache": None, **parameters}).fit(X)


def read_embeddings(path):
    return np.array(pd.read_parquet(path)["embedding"].tolist(), dtype=np.float32)


@pytest.mark.parametrize("block_size", [16, 32, 60, 4096])
@pytest.mark.parametrize("cache", [None, "store"])
def test_file_has_the_bits_of_transform(block_size, cache, folder):
    """The blocks hold whole batches, of 16 images."""
    extractor = fitted(X, cache=cache)
    expected = extractor.transform(X)
    embeddings = extractor.embed_to(X, "embeddings.npy", block_size=block_size)
    assert isinstance(embeddings, np.memmap)
    assert not embeddings.flags.writeable
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, expected)
    np.save("expected.npy", expected)
    assert Path("embeddings.npy").read_bytes() == Path("expected.npy").read_bytes()
    path = extractor.embed_to(X, "embeddings.parquet", block_size=block_size)
    assert path == Path("embeddings.parquet")
    np.testing.assert_array_equal(read_embeddings(path), expected)
    assert pq.read_metadata(path).num_row_groups == -(-len(X) // block_size)
    assert {name for name in os.listdir() if "embeddings" in name} == {
        "embeddings.npy",
        "embeddings.parquet",
    }


def test_blocks_of_any_size_have_the_same_engine(tmp_path, monkeypatch):
    extractor, n_images = fitted(X), []
    monkeypatch.setattr(
        "sktransfer.embedding.embed.engine_name",
        lambda recipe, compute, count: n_images.append(count) or "torch",
    )
    embeddings = extractor.embed_to(X, tmp_path / "x.npy", block_size=25)
    assert n_images == [60, 60, 60]
    np.testing.assert_allclose(embeddings, extractor.transform(X), rtol=1e-5)


def test_key_is_the_path_or_the_row(tmp_path):
    paths = save_images(X[:5], tmp_path / "photos")
    extractor = fitted(paths)
    dicts = [{"path": path, "bytes": Path(path).read_bytes()} for path in paths]
    for container in (paths, [Path(path) for path in paths], pd.Series(paths), dicts):
        table = pd.read_parquet(extractor.embed_to(container, tmp_path / "x.parquet", block_size=2))
        assert list(table) == ["path", "embedding"]
        assert table["path"].tolist() == paths
    contents = [Path(path).read_bytes() for path in paths]
    for container in (X[:5], list(X[:5]), Items(list(X[:5])), contents):
        table = pd.read_parquet(extractor.embed_to(container, tmp_path / "x.parquet", block_size=2))
        assert list(table) == ["row", "embedding"]
        assert table["row"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cache", [None, "store"])
def test_broken_images_are_nan_or_null_with_a_reason(cache, folder):
    paths, _ = paths_with_broken(folder / "photos")
    extractor = fitted(paths, cache=cache, on_error="nan")
    expected = extractor.transform(paths)
    errors = list(map(str, extractor.errors_))
    embeddings = extractor.embed_to(paths, "x.npy", block_size=4)
    np.testing.assert_array_equal(np.isnan(embeddings).all(axis=1), np.isnan(expected).all(axis=1))
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5)
    table = pd.read_parquet(extractor.embed_to(paths, "x.parquet", block_size=4))
    assert table["path"].tolist() == paths
    assert np.flatnonzero(table["embedding"].isna()).tolist() == BROKEN_ROWS
    assert np.flatnonzero(table["error"].notna()).tolist() == BROKEN_ROWS
    readable = np.setdiff1d(np.arange(12), BROKEN_ROWS)
    np.testing.assert_array_equal(np.stack(table["embedding"][readable]), embeddings[readable])
    assert list(map(str, extractor.errors_)) == errors
    assert table["error"][1] == extractor.errors_[0].reason


@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
def test_broken_image_leaves_the_old_file(name, folder):
    paths, _ = paths_with_broken(folder / "photos")
    Path(name).write_text("old")
    with pytest.raises(ImageError, match=r"row 1 .*\n.*row 4 ") as raised:
        fitted(paths).embed_to(paths, name, block_size=5)
    assert [error.row for error in raised.value.errors] == [1, 4]  # of the first block
    assert Path(name).read_text() == "old"
    assert sorted(os.listdir()) == ["photos", name]


@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
def test_memory_is_that_of_a_block(name, tmp_path):
    """All embeddings take 12 MB, those of a block 0.3 MB."""
    data = np.broadcast_to(images(1, side=16), (1500, 16, 16, 3))
    extractor = fitted(data[:2], layer="0", pooling=None, image_size=32)
    extractor.embed_to(data[:64], tmp_path / name, block_size=32)  # imports
    pool, old = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        extractor.embed_to(data, tmp_path / name, block_size=32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(old)
    if name == "x.npy":
        assert np.load(tmp_path / name, mmap_mode="r").shape == (1500, 2048)
    else:
        assert pq.read_metadata(tmp_path / name).num_rows == 1500
    assert peak + pool.max_memory() < 3e6


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("x.csv", {}, ValueError, "Got path='x.csv', but expected the path of a file that ends in"),
        (
            3,
            {},
            TypeError,
            "Got path=3, but expected the path of a file that ends in .npy or .parq",
        ),
        ("x.npy", {"block_size": 0}, ValueError, "Got block_size=0, but expected an integer from"),
        ("x.npy", {"block_size": 2**31}, ValueError, "expected an integer from 1 to 1.78957e"),
    ],
)
def test_invalid_arguments_are_refused(path, options, error, message, folder):
    with pytest.raises(error) as raised:
        fitted(X).embed_to(X, path, **options)
    assert message in str(raised.value)
    assert os.listdir() == []
    with pytest.raises(NotFittedError):
        PretrainedFeatureExtractor(Tiny).embed_to(X, "x.npy")
    Path("folder.npy").mkdir()
    with pytest.raises(IsADirectoryError, match=r"Got path='folder.npy', a folder, but expected"):
        fitted(X).embed_to(X, "folder.npy")


def test_full_disk_leaves_the_old_file(folder, monkeypatch):
    extractor = fitted(X)
    extractor.embed_to(X[:2], "x.npy")
    before, append = Path("x.npy").read_bytes(), output.NpyFile.append

    def fail_after_16(file, embeddings):
        if file._n_rows:
            raise OSError(28, "No space left on device")
        append(file, embeddings)

    monkeypatch.setattr(output.NpyFile, "append", fail_after_16)
    with pytest.raises(OSError, match="No space left on device"):
        extractor.embed_to(X, "x.npy", block_size=16)
    assert Path("x.npy").read_bytes() == before
    assert os.listdir() == ["x.npy"]


def test_progress_is_one_bar_of_all_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    data = np.concatenate([X, X])
    fitted(data, verbose=1).embed_to(data, tmp_path / "x.npy", block_size=30)
    lines = capsys.readouterr().err.split("\r")
    assert "120/120" in lines[-1]
    assert all(line.startswith("Embedding with tiny: ") for line in lines if line.strip())
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_classifier_writes_its_embeddings(suffix, folder):
    paths, y = paths_with_broken(folder / "photos", n=24)
    classifier = make_classifier(max_epochs=1, on_error="skip", early_stopping=False)
    with pytest.warns(UserWarning, match="cannot be read"):
        classifier.fit(paths, y)
    with pytest.warns(UserWarning, match="cannot be read"):
        expected = classifier.transform(paths)
    if suffix == ".npy":
        with pytest.warns(UserWarning, match="Got 4 of 24 images that cannot be read") as caught:
            embeddings = classifier.embed_to(paths, "x.npy", block_size=7)
        assert caught[0].filename == __file__
        np.testing.assert_allclose(embeddings, expected, rtol=1e-5)
    else:
        table = pd.read_parquet(classifier.embed_to(paths, "x.parquet", block_size=7))
        assert np.flatnonzero(table["error"].notna()).tolist() == BROKEN_ROWS
        readable = table["error"].isna()
        embeddings = np.stack(table["embedding"][readable])
        np.testing.assert_allclose(embeddings, expected[readable], rtol=1e-5)
    classifier.set_params(on_error="raise")
    with pytest.raises(ImageError, match="row 1 "):
        classifier.embed_to(paths, "y.npy", block_size=7)
