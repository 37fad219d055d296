"""Models that log what worker processes do, and images for them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Counter, Tiny, X, cosine, images, save_images
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor

N_IMAGES = 48


@contextlib.contextmanager
def dask_client(threads):
    """Start two worker processes of Dask with some threads each."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=threads, dashboard_address=":0", memory_limit=0
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def ray_runtime(cores):
    """Start Ray on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=cores,
        num_gpus=0,
        object_store_memory=150 * 2**20,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        # pytest adds the folder of the helpers only here.
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    yield ray
    ray.shutdown()


class SlowTiny(Tiny):
    """Logs the process of each batch of images, and takes a while for it."""

    def __init__(self, log):
        super().__init__()
        self[0] = SlowCounter(self[0], log, n_workers=1)


class SlowCounter(Counter):
    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)


class LogsLoads(TransformerMixin, BaseEstimator):
    """A step that changes nothing, and logs each process that unpickles it."""

    def __init__(self, log):
        self.log = log

    def __setstate__(self, state):
        super().__setstate__(state)
        time.sleep(0.1)  # another thread may begin to load
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X

    def __sklearn_is_fitted__(self):
        return True


def make_extractor(backbone=Tiny, **parameters):
    return PretrainedFeatureExtractor(backbone, **{"cache": None, **parameters}).fit(X[:2])


def make_pipeline_for(y, **parameters):
    """Fit an extractor and a logistic regression on the images of `helpers`."""
    extractor = PretrainedFeatureExtractor(Tiny, cache=None, **parameters)
    return make_pipeline(extractor, LogisticRegression(max_iter=1000)).fit(X, y)


def files(folder, n=N_IMAGES):
    """Save images; return a table of their paths and numbers, in which three rows are broken."""
    paths = save_images(images(n, side=24), folder)
    broken = [1, 2, n - 3]
    for row in broken[:2]:
        with open(paths[row], "wb") as file:
            file.write(b"no image")
    os.unlink(paths[broken[2]])
    table = pd.DataFrame({"path": paths, "number": np.arange(n) + 100})
    return table, np.isin(np.arange(n), broken)


def check_table(result, extractor, table, broken):
    """Check that each row is there once, with its embedding or its error, in any order.

    `result` is a pyarrow Table with the key `number`.
    """
    result = result.sort_by("number")
    assert result["number"].to_pylist() == list(table["number"])
    expected = extractor.transform(list(table["path"][~broken]))
    embeddings = np.array(result["embedding"].drop_null().to_pylist(), np.float32)
    # The last bit of an embedding depends on the size of its batch.
    np.testing.assert_allclose(embeddings, expected, rtol=1e-6)
    np.testing.assert_array_equal(result["embedding"].is_null(), broken)
    np.testing.assert_array_equal(result["error"].is_valid(), broken)


def kill_worker(log, *, generation=0):
    """Kill a process that has computed images, as soon as two have; or its parent, and so on."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        processes = {line.split()[1].partition("-")[0] for line in _lines(log)}
        if len(processes) > 1:
            process = min(processes)
            for _ in range(generation):
                process = subprocess.check_output(["ps", "-o", "ppid=", "-p", process]).strip()
            os.kill(int(process), signal.SIGKILL)
            return
        time.sleep(0.02)
    raise TimeoutError("two workers have not computed any images")


def collect_while_a_worker_dies(collect, log, *, generation=0):
    """Kill a worker while `collect` gets the results, and return them."""
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_worker, log, generation=generation)
        collected = collect()
        assert killed.done()  # before the job has ended
        killed.result()
    return collected


def loads(log):
    """Return how often each process has loaded a model, by its id."""
    lines = _lines(log)
    return {int(process): lines.count(process) for process in lines}


def check_loads(log):
    """Check that one or two processes have loaded the model, each of them once."""
    assert list(loads(log).values()) in ([1], [1, 1])  # one may have done all before the other


def _lines(log):
    return log.read_text().splitlines() if log.exists() else []


def photographs(folder):
    """Save crops of two photographs; return a table of their paths, numbers and names."""
    rows = []
    for name, photograph in zip(["temple", "flower"], load_sample_images().images, strict=True):
        for left in range(0, 440, 40):
            path = os.path.join(folder, f"{name}-{left}.jpg")
            Image.fromarray(photograph[100:300, left : left + 200]).save(path)
            rows.append({"path": path, "number": len(rows), "name": name})
    return pd.DataFrame(rows)


def check_photographs(table, embed, predict):
    """Check that real networks compute in workers what they compute here.

    `embed(model)` and `predict(model)` return pyarrow Tables of all rows of `table`, with the key
    `number`.
    """
    paths, names = list(table["path"]), list(table["name"])
    settings = {"image_size": 112, "cache": None}
    # With this engine, the other images of a batch do not change an embedding.
    extractor = PretrainedFeatureExtractor(engine="openvino", **settings).fit(paths)
    result = embed(extractor).sort_by("number")
    assert result["number"].to_pylist() == list(table["number"])
    embeddings = np.array(result["embedding"].to_pylist(), np.float32)
    np.testing.assert_array_equal(embeddings, extractor.transform(paths))

    classifier = FineTunedImageClassifier(
        unfreeze=(0, 1), max_epochs=1, augment=None, random_state=0, **settings
    ).fit(paths[::2], names[::2])
    embeddings = np.array(embed(classifier).sort_by("number")["embedding"].to_pylist())
    assert cosine(embeddings, classifier.transform(paths)).min() >= 0.9999
    result = predict(classifier).sort_by("number")
    assert result["prediction"].to_pylist() == list(classifier.predict(paths))
    probabilities = np.array(result["probability"].to_pylist())
    np.testing.assert_allclose(probabilities, classifier.predict_proba(paths), rtol=1e-4, atol=1e-6)


def check_code_of_page(first_line, tmp_path):
    """Run the code of docs/clusters.md that begins so, and check the file that it writes."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table, broken = files(tmp_path / "images", n=8)
    page = Path(__file__).parents[1].joinpath("docs", "clusters.md").read_text()
    (code,) = re.findall(rf"^```text\n({first_line}.*?)^```$", page, re.M | re.S)
    code = code.replace("/shared/embeddings", str(tmp_path / "embeddings"))
    extractor = make_extractor()
    exec(code, {"extractor": extractor, "table": table.assign(photograph="flower")})
    written = parquet.read_table(tmp_path / "embeddings")
    numbers = [list(table["path"]).index(path) for path in written["path"].to_pylist()]
    numbered = written.append_column("number", [np.array(numbers) + 100])
    check_table(numbered, extractor, table, broken)
