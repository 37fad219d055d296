import numpy as np
import pandas as pd
import pytest
from cli_helpers import paths_below, run, save_broken, save_classes

from sktransfer import PretrainedFeatureExtractor

SMALL = ("--image-size", "32")


@pytest.fixture(scope="module")
def expected(photos):
    extractor = PretrainedFeatureExtractor(image_size=32)
    return extractor.fit_transform(paths_below(photos))


def test_array_has_a_row_for_each_image(photos, tmp_path, expected):
    result = run("embed", photos, "-o", tmp_path / "x.npy", *SMALL)
    embeddings = np.load(tmp_path / "x.npy")
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert result.stdout == ""
    assert "Embedding 24 images with efficientnet_lite0 ...\n" in result.stderr


def test_table_has_the_paths_and_a_column_for_each_value(photos, tmp_path, expected):
    run("embed", photos / "cat", photos / "dog", "-o", tmp_path / "x.parquet", *SMALL)
    table = pd.read_parquet(tmp_path / "x.parquet")
    assert table.pop("path").tolist() == paths_below(photos)[:16]
    assert table.columns[0] == "efficientnet_lite0_0"
    np.testing.assert_allclose(table.to_numpy(), expected[:16], atol=1e-5)


def test_embed_uses_the_requested_backbone(photos, tmp_path):
    run("embed", photos, "-o", tmp_path / "x.npy", "--backbone", "efficientnet_lite1", *SMALL)
    other = np.load(tmp_path / "x.npy")
    run("embed", photos, "-o", tmp_path / "x.npy", *SMALL)
    assert not np.allclose(np.load(tmp_path / "x.npy"), other)
    result = run("embed", photos, "-o", tmp_path / "x.npy", "--backbone", "lite0", code=1)
    assert "sktransfer: Got backbone='lite0'" in result.stderr


def test_broken_images_fail_or_are_left_out(tmp_path):
    folder = save_classes(tmp_path / "photos", n=2)
    broken = save_broken(folder / "cat" / "broken.png")
    result = run("embed", folder, "-o", tmp_path / "x.npy", *SMALL, code=1)
    assert f"sktransfer: 1 image cannot be read (see --skip-broken): {broken}: " in result.stderr
    assert not (tmp_path / "x.npy").exists()
    result = run("embed", folder, "-o", tmp_path / "x.npy", *SMALL, "--skip-broken")
    assert np.isfinite(np.load(tmp_path / "x.npy")).all()
    assert len(np.load(tmp_path / "x.npy")) == 6
    assert f"1 image cannot be read, left out: {broken}: " in result.stderr
    arguments = [broken, "-o", tmp_path / "x.npy", *SMALL, "--skip-broken"]
    assert "no image can be read: " in run("embed", *arguments, code=1).stderr


def test_embeddings_are_kept_in_the_cache(photos, tmp_path, monkeypatch):
    run("embed", photos, "-o", tmp_path / "x.npy", *SMALL, "--cache", tmp_path / "cache")
    assert "computed 24, read 0" in run("cache", "info", "--cache", tmp_path / "cache").stdout
    monkeypatch.setenv("SKTRANSFER_CACHE", str(tmp_path / "cache"))
    run("embed", photos, "-o", tmp_path / "x.npy", *SMALL)
    assert "computed 24, read 24" in run("cache", "info").stdout


def test_output_must_be_named_and_have_a_known_suffix(photos, tmp_path):
    assert "Missing option '-o'" in run("embed", photos, code=2).stderr
    result = run("embed", photos, "-o", tmp_path / "x.csv", code=2)
    assert "expected a file that ends in .parquet or .npy" in result.stderr
