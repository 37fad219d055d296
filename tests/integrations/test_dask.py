"""Columns of images in Dask: partitions, indices, workers that die."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cluster_helpers import (
    LogsLoads,
    SlowTiny,
    check_photographs,
    dask_client,
    files,
    kill_worker,
    loads,
    make_extractor,
    make_pipeline_for,
    photographs,
)
from helpers import Tiny, X, Y, make_classifier
from sklearn.pipeline import make_pipeline

from sktransfer import save
from sktransfer.integrations.dask import embed, predict

frames = pytest.importorskip("dask.dataframe")
pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def files_and_broken(tmp_path):
    table, broken = files(tmp_path / "images", n=12)
    return table.set_index(np.arange(12) * 10), broken


def vectors(column):
    return np.array(column.dropna().tolist(), np.float32)


def check(result, extractor, table, broken):
    """Check the embeddings of all images, in their order, and the errors."""
    assert list(result.index) == list(table.index)
    expected = extractor.transform(list(table["path"][~broken]))
    # The last bit of an embedding depends on the size of its batch.
    np.testing.assert_allclose(vectors(result["embedding"]), expected, rtol=1e-6)
    np.testing.assert_array_equal(result["embedding"].isna(), broken)
    np.testing.assert_array_equal(result["error"].notna(), broken)


def test_embeddings_keep_index_divisions_and_keys(files_and_broken):
    table, broken = files_and_broken
    extractor, frame = make_extractor(), frames.from_pandas(table, npartitions=4)
    lazy = embed(extractor, frame, "path", keys=["number"])
    assert lazy.divisions == frame.divisions == (0, 30, 60, 90, 110)
    result = lazy.compute(scheduler="threads", num_workers=3)
    assert list(result.columns) == ["number", "embedding", "error"]
    assert list(result["number"]) == list(table["number"])
    check(result, extractor, table, broken)


def test_series_of_paths_or_bytes_is_embedded(files_and_broken):
    table, _ = files_and_broken
    extractor, readable = make_extractor(), table["path"].iloc[3:9]
    content = [Path(path).read_bytes() for path in readable]
    content = pd.Series(content, readable.index, pd.ArrowDtype(pyarrow.binary()))
    expected = extractor.transform(list(readable))
    for column in (readable, content):
        result = embed(extractor, frames.from_pandas(column, npartitions=2)).compute()
        np.testing.assert_array_equal(vectors(result["embedding"]), expected)
        assert list(result.columns) == ["embedding", "error"]
        assert result["error"].isna().all()


def test_predictions_of_a_tuned_classifier_are_equal(files_and_broken):
    table, broken = files_and_broken
    classifier, frame = make_classifier().fit(X, Y), frames.from_pandas(table, npartitions=3)
    result = predict(classifier, frame, "path", probability=True).compute()
    readable = list(table["path"][~broken])
    assert list(result["prediction"].dropna()) == list(classifier.predict(readable))
    np.testing.assert_array_equal(
        vectors(result["probability"]), classifier.predict_proba(readable)
    )
    np.testing.assert_array_equal(result["error"].notna(), broken)


def test_file_and_estimator_give_the_same(files_and_broken, tmp_path):
    extractor = make_extractor("efficientnet_lite0", image_size=32)
    save(extractor, tmp_path / "model.skt")
    frame = frames.from_pandas(files_and_broken[0].iloc[:4], npartitions=2)
    pd.testing.assert_frame_equal(
        embed(tmp_path / "model.skt", frame, "path").compute(),
        embed(extractor, frame, "path").compute(),
    )


def test_empty_partitions_have_the_types_that_dask_expects(files_and_broken):
    table, _ = files_and_broken
    frame = frames.from_pandas(table, npartitions=4)
    some = frame[frame["number"] < 103]  # in the first partition only
    lazy = predict(make_pipeline_for(Y), some, "path", keys=["number"], probability=True)
    parts = [part.compute() for part in lazy.partitions]
    assert [len(part) for part in parts] == [3, 0, 0, 0]
    for part in parts:
        pd.testing.assert_series_equal(part.dtypes, lazy.dtypes)


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_results_are_written_to_parquet_also_if_nothing_can_be_read(files_and_broken, tmp_path):
    table, broken = files_and_broken
    order = [1, 2, 0, 3]  # the first partition has broken images only
    frame = frames.from_pandas(table.iloc[order], npartitions=2, sort=False)
    extractor = make_extractor()
    embed(extractor, frame, "path", keys=["path"]).to_parquet(tmp_path / "embeddings")
    result = pd.read_parquet(tmp_path / "embeddings", dtype_backend="pyarrow")
    assert list(result["path"]) == list(table["path"].iloc[order])
    expected = extractor.transform(list(table["path"].iloc[[0, 3]]))
    np.testing.assert_array_equal(vectors(result["embedding"]), expected)
    np.testing.assert_array_equal(result["error"].notna(), broken[order])


def test_invalid_arguments_are_rejected(files_and_broken):
    table, _ = files_and_broken
    extractor, frame = make_extractor(), frames.from_pandas(table, npartitions=2)
    with pytest.raises(TypeError, match="Got a DataFrame, but expected a dask DataFrame or Series"):
        embed(extractor, table, "path")
    with pytest.raises(ValueError, match=r"Got column=None, but expected one of .*'path'"):
        embed(extractor, frame)
    with pytest.raises(ValueError, match="Got keys='id', but expected one of the columns"):
        embed(extractor, frame, "path", keys=["id"])
    with pytest.raises(TypeError, match="Got keys='number', but expected a list of columns"):
        embed(extractor, frame, "path", keys="number")
    with pytest.raises(ValueError, match="Got the key 'path' twice, but expected each column once"):
        embed(extractor, frame, "path", keys=["path", "path"])
    clash = frame.rename(columns={"number": "embedding"})
    with pytest.raises(ValueError, match=r"Got the key 'embedding', .* rename the key first"):
        embed(extractor, clash, "path", keys=["embedding"])
    labels = predict(make_pipeline_for(Y), clash, "path", keys=["embedding"])  # not among these
    assert list(labels.columns) == ["embedding", "prediction", "error"]
    with pytest.raises(ValueError, match=r"Got column='path' and keys=\(\) with a Series"):
        embed(extractor, frame["path"], "path")


def test_dask_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.dataframe", None)
    with pytest.raises(ImportError, match=r"pip install 'sktransfer\[dask\]'"):
        embed(make_extractor(), None, "path")


# Clusters


@pytest.fixture
def cluster():
    """Start two worker processes with two threads each."""
    with dask_client(threads=2) as client:
        yield client


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cluster_loads_the_model_once_in_each_process_and_uses_its_threads(cluster, tmp_path):
    table, broken = files(tmp_path / "images")
    frame = frames.from_pandas(table, npartitions=12)
    log = tmp_path / "loads.log"
    extractor = make_extractor()
    model = make_pipeline(extractor, LogsLoads(log))
    for _ in range(2):
        check(embed(model, frame, "path").compute(), extractor, table, broken)
    assert list(loads(log).values()) == [1, 1]
    settings = cluster.run(_settings_of_models)
    assert set(loads(log)) == {process for process, *_ in settings.values()}
    assert {tuple(rest) for _, *rest in settings.values()} == {(2, 2)}


def _settings_of_models():
    """Return the process, the threads of the one loaded model, and its `n_jobs`."""
    import gc
    import os

    from sktransfer.integrations.rows import LoadedModel

    (loaded,) = [value for value in gc.get_objects() if type(value) is LoadedModel]
    return os.getpid(), loaded.threads, loaded.model[0].n_jobs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_photographs_are_embedded_and_predicted_as_here(cluster, tmp_path):
    table = photographs(tmp_path)
    frame = frames.from_pandas(table, npartitions=5)

    def collect(results):
        return pyarrow.Table.from_pandas(results.compute())

    check_photographs(
        table,
        lambda model: collect(embed(model, frame, "path", keys=["number"])),
        lambda model: collect(predict(model, frame, "path", keys=["number"], probability=True)),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_worker_that_is_killed_costs_no_rows(cluster, tmp_path):
    table, broken = files(tmp_path / "images")
    frame = frames.from_pandas(table, npartitions=24)
    log = tmp_path / "images.log"
    extractor = make_extractor(SlowTiny(log))
    job = cluster.compute(embed(extractor, frame, "path"))
    kill_worker(log)
    assert job.status == "pending"
    check(job.result(timeout=200), make_extractor(Tiny), table, broken)
