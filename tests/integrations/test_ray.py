"""Columns of images in Ray Data: keys, types, actors that die."""

import sys

import numpy as np
import pytest
from cluster_helpers import (
    LogsLoads,
    SlowTiny,
    check_code_of_page,
    check_loads,
    check_photographs,
    check_table,
    collect_while_a_worker_dies,
    files,
    make_extractor,
    photographs,
    ray_runtime,
)
from helpers import Tiny, X, Y, make_classifier
from sklearn.pipeline import make_pipeline

from sktransfer import save
from sktransfer.integrations.ray import _Actor, embed, predict
from sktransfer.integrations.rows import remote_model

arrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def ray():
    """Start Ray with cores for two actors, and for the tasks that give images to them."""
    pytest.importorskip("ray.data")
    with ray_runtime(cores=4) as ray:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray


def collect(dataset):
    return arrow.concat_tables(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def test_actor_returns_keys_and_results(tmp_path):
    table, broken = files(tmp_path / "images", n=12)
    extractor = make_extractor()
    actor = _Actor(remote_model(extractor, "embed"), "path", ["number"])
    result = actor(arrow.Table.from_pandas(table))
    assert result.column_names == ["number", "embedding", "error"]
    check_table(result, extractor, table, broken)
    assert actor(arrow.Table.from_pandas(table[:0])).schema == result.schema


def test_ray_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'sktransfer\[ray\]'"):
        embed(make_extractor(), None, "path", keys=[])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_invalid_arguments_are_rejected(ray, tmp_path):
    table, _ = files(tmp_path / "images", n=4)
    extractor, dataset = make_extractor(), ray.data.from_pandas(table)
    with pytest.raises(TypeError, match=r"Got a DataFrame, but expected a ray\.data\.Dataset"):
        embed(extractor, table, "path", keys=["number"])
    with pytest.raises(TypeError, match="Got keys='number', but expected a list of columns"):
        embed(extractor, dataset, "path", keys="number")
    with pytest.raises(ValueError, match="Got column='file', but expected one of the columns"):
        embed(extractor, dataset, "file", keys=["number"])
    with pytest.raises(ValueError, match="Got the key 'error', but the results have a column of"):
        embed(extractor, dataset.rename_columns({"number": "error"}), "path", keys=["error"])
    with pytest.raises(ValueError, match="Got workers=0, but expected None or an integer"):
        embed(extractor, dataset, "path", keys=["number"], workers=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_actors_load_the_model_once_and_embed_as_it_does(ray, tmp_path):
    table, broken = files(tmp_path / "images")
    dataset = ray.data.from_pandas(table).repartition(12)
    log = tmp_path / "loads.log"
    extractor = make_extractor()
    model = make_pipeline(extractor, LogsLoads(log))
    result = embed(model, dataset, "path", keys=["number"], workers=2, batch_size=4)
    check_table(collect(result), extractor, table, broken)
    check_loads(log)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_predictions_of_a_tuned_classifier_are_equal(ray, tmp_path):
    table, broken = files(tmp_path / "images", n=12)
    classifier, dataset = make_classifier().fit(X, Y), ray.data.from_pandas(table)
    result = collect(
        predict(classifier, dataset, "path", keys=["number"], probability=True, workers=1)
    ).sort_by("number")
    readable = list(table["path"][~broken])
    assert result["prediction"].drop_null().to_pylist() == list(classifier.predict(readable))
    probabilities = np.array(result["probability"].drop_null().to_pylist(), np.float32)
    np.testing.assert_array_equal(probabilities, classifier.predict_proba(readable))
    np.testing.assert_array_equal(result["error"].is_valid(), broken)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_file_is_read_by_the_actors(ray, tmp_path):
    table, broken = files(tmp_path / "images", n=8)
    extractor = make_extractor("efficientnet_lite0", image_size=32)
    save(extractor, tmp_path / "model.skt")
    dataset = ray.data.from_pandas(table)
    result = embed(tmp_path / "model.skt", dataset, "path", keys=["number"], workers=1)
    check_table(collect(result), extractor, table, broken)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_photographs_are_embedded_and_predicted_as_here(ray, tmp_path):
    table = photographs(tmp_path)
    dataset, options = ray.data.from_pandas(table).repartition(5), {"workers": 2, "batch_size": 5}
    keys = ["number"]
    check_photographs(
        table,
        lambda model: collect(embed(model, dataset, "path", keys=keys, **options)),
        lambda model: collect(
            predict(model, dataset, "path", keys=keys, probability=True, **options)
        ),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_actor_that_is_killed_costs_no_rows(ray, tmp_path):
    table, broken = files(tmp_path / "images")
    dataset = ray.data.from_pandas(table).repartition(24)
    log = tmp_path / "images.log"
    extractor = make_extractor(SlowTiny(log))
    result = embed(extractor, dataset, "path", keys=["number"], workers=2, batch_size=2)
    collected = collect_while_a_worker_dies(lambda: collect(result), log)
    check_table(collected, make_extractor(Tiny), table, broken)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_code_in_the_documentation_runs(ray, tmp_path):
    check_code_of_page("import ray\n", tmp_path)
