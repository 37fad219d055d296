import csv
import io
import json
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from cli_helpers import paths_below, run, save_broken, save_classes, write_csv
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import sktransfer
from sktransfer import PretrainedFeatureExtractor
from sktransfer.utils import errors


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_are_printed_as_csv(model, photos):
    result = run("predict", model, photos / "cat", photos / "dog" / "01.png")
    rows = rows_of(result.stdout)
    assert list(rows[0]) == ["path", "label", "probability"]
    assert [row["path"] for row in rows] == [
        *paths_below(photos / "cat"),
        str(photos / "dog" / "01.png"),
    ]
    assert [row["label"] for row in rows] == ["cat"] * 8 + ["dog"]
    assert "Predicting 9 images ...\n" in result.stderr
    assert "Predicted 9 images in" in result.stderr


def test_images_at_urls_have_the_predictions_of_files(model, photos, tmp_path):
    filesystem, paths = fsspec.filesystem("memory"), paths_below(photos)
    for path in paths:
        filesystem.pipe_file(path, Path(path).read_bytes())
    urls = [f"memory:/{path}" for path in paths]
    of_files, of_urls = (rows_of(run("predict", model, *X).stdout) for X in (paths, urls))
    assert [row["path"] for row in of_urls] == urls
    assert [row | {"path": ""} for row in of_urls] == [row | {"path": ""} for row in of_files]
    labels = [Path(path).parent.name for path in paths]
    table = write_csv(tmp_path / "urls.csv", "path,label", zip(urls, labels, strict=True))
    assert json.loads(run("evaluate", model, table, "--json").stdout)["images"] == len(urls)
    filesystem.rm(str(photos), recursive=True)


def test_probabilities_have_a_column_for_each_class(model, photos):
    result = run("predict", model, photos / "owl", "--probabilities", "--json", "--quiet")
    assert result.stderr == ""
    for row in json.loads(result.stdout):
        probabilities = {name: row[f"probability_{name}"] for name in ("cat", "dog", "owl")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert max(probabilities, key=probabilities.get) == row["label"] == "owl"
        assert row["probability"] == max(probabilities.values())


@pytest.mark.parametrize(
    ("suffix", "read"),
    [(".csv", pd.read_csv), (".json", pd.read_json), (".parquet", pd.read_parquet)],
)
def test_files_hold_the_same_table(suffix, read, model, photos, tmp_path):
    printed = pd.read_csv(io.StringIO(run("predict", model, photos).stdout))
    output = tmp_path / f"out{suffix}"
    result = run("predict", model, photos, "-o", output)
    assert result.stdout == ""
    assert f"Wrote {output}" in result.stderr
    pd.testing.assert_frame_equal(read(output), printed, check_dtype=False)


def test_parquet_without_pyarrow_names_the_command_that_installs_it(
    model, photos, tmp_path, monkeypatch
):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    result = run("predict", model, photos, "-o", tmp_path / "out.parquet", code=1)
    assert "pip install 'sktransfer[parquet]'" in result.stderr
    assert "Predicting" not in result.stderr


def test_files_that_are_not_images_are_named(model, photos, tmp_path):
    folder = save_classes(tmp_path / "new", n=1)
    (folder / "notes.txt").write_text("notes")
    result = run("predict", model, folder)
    assert len(rows_of(result.stdout)) == 3
    assert f"the extension of an image: {folder / 'notes.txt'}" in result.stderr
    result = run("predict", model, folder / "notes.txt", code=1)
    assert result.stderr.splitlines()[-1].startswith(
        f"sktransfer: 1 image cannot be read (see --skip-broken): {folder / 'notes.txt'}: "
    )


def test_broken_images_are_left_out_on_request(model, tmp_path):
    folder = save_classes(tmp_path / "new", n=2)
    broken = [save_broken(folder / name / "broken.png") for name in ("cat", "owl")]
    result = run("predict", model, folder, code=1)
    assert "sktransfer: 2 images cannot be read (see --skip-broken):\n" in result.stderr
    assert result.stdout == ""
    result = run("predict", model, folder, "--skip-broken")
    paths = [row["path"] for row in rows_of(result.stdout)]
    assert paths == [path for path in paths_below(folder) if Path(path).name != "broken.png"]
    assert "2 images cannot be read, left out:\n" in result.stderr
    assert f"Predicted {len(paths)} images in" in result.stderr
    assert all(str(path) in result.stderr for path in broken)
    assert (
        "no image can be read" in run("predict", model, broken[0], "--skip-broken", code=1).stderr
    )


def test_missing_files_are_named_before_the_model_is_loaded(model, photos):
    paths = [photos / f"{number}.png" for number in range(12)]
    result = run("predict", model, photos / "cat" / "00.png", *paths, code=1)
    lines = result.stderr.splitlines()
    assert lines[0] == "sktransfer: 12 paths not found; the first 10:"
    assert lines[1:] == [f"  {path}" for path in paths[:10]]


def test_folder_without_images_is_a_one_line_error(model, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("predict", model, tmp_path / "empty", code=1)
    assert result.stderr == f"sktransfer: no images in {tmp_path / 'empty'}\n"


def test_missing_model_is_a_one_line_error(photos, tmp_path):
    result = run("predict", tmp_path / "m.skt", photos, code=1)
    assert result.stderr == f"sktransfer: there is no model '{tmp_path / 'm.skt'}'\n"
    result = run("predict", tmp_path, photos, code=1)
    assert "expected a model, but" in result.stderr


def test_files_without_a_classifier_are_a_one_line_error(photos, tmp_path):
    path = tmp_path / "model.skt"
    path.write_bytes(b"no model")
    result = run("predict", path, photos, code=1)
    assert result.stderr.startswith(f"sktransfer: Got '{path}', but ")
    assert result.stderr.count("\n") == 1
    sktransfer.save(PretrainedFeatureExtractor(image_size=32).fit(paths_below(photos)), path)
    result = run("predict", path, photos, code=1)
    message = f"expected a classifier, but '{path}' is a PretrainedFeatureExtractor"
    assert result.stderr == f"sktransfer: {message}\n"


def test_pipeline_of_python_predicts(photos, tmp_path):
    images = paths_below(photos)
    pipeline = make_pipeline(PretrainedFeatureExtractor(image_size=32), LogisticRegression())
    pipeline.fit(images, [path.split("/")[-2] for path in images])
    sktransfer.save(pipeline, tmp_path / "pipeline.skt")
    rows = rows_of(run("predict", tmp_path / "pipeline.skt", photos / "owl").stdout)
    assert {row["label"] for row in rows} == {"owl"}


def test_an_image_given_twice_is_predicted_once(model, photos):
    path = photos / "cat" / "00.png"
    assert len(rows_of(run("predict", model, path, path, photos / "cat").stdout)) == 8


@pytest.mark.parametrize("name", ["out.txt", "missing/out.csv", "folder.csv"])
def test_bad_output_is_found_before_the_work(name, model, photos, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    result = run("predict", model, photos, "-o", tmp_path / name, code=2)
    assert "Invalid value for '-o'" in result.stderr
    assert "Predicting" not in result.stderr


def test_names_that_are_not_utf8_survive(model, tmp_path):
    folder = save_classes(tmp_path / "new", n=1)
    source = folder / "cat" / "00.png"
    name = bytes(folder / "cat") + b"/caf\xe9.png"
    try:
        source.rename(name.decode(errors="surrogateescape"))
    except OSError:
        pytest.skip("file names must be UTF-8 here")
    result = run("predict", model, folder / "cat")
    assert name in result.stdout_bytes
