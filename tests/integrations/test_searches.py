"""Searches of scikit-learn on clusters: equal scores, and each image is embedded once."""

import os
import re
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from cluster_helpers import dask_client, ray_runtime
from helpers import (
    CountingTiny,
    Tiny,
    X,
    Y,
    colored_images,
    counted,
    make_classifier,
    save_images,
    workers,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline

from sktransfer import EmbeddingStore, PretrainedFeatureExtractor

CV = StratifiedKFold(3, shuffle=True, random_state=0)
GRID = {"classify__C": [1e-3, 1.0], "embed__pooling": ["avg", "max"]}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def dask_cluster():
    """Start two worker processes of Dask with one thread each."""
    with dask_client(threads=1) as client:
        yield client


@pytest.fixture(scope="module")
def ray_cluster():
    """Start Ray with two cores."""
    register = pytest.importorskip("ray.util.joblib").register_ray
    with ray_runtime(cores=2):
        register()
        yield


@pytest.fixture(params=["dask", "ray"])
def backend(request):
    request.getfixturevalue(f"{request.param}_cluster")
    return request.param


@pytest.fixture
def paths(tmp_path):
    images, _ = colored_images(len(X))
    return np.array(save_images(images, tmp_path / "images"))


def make_pipeline(backbone, cache):
    extractor = PretrainedFeatureExtractor(backbone, cache=cache)
    return Pipeline([("embed", extractor), ("classify", LogisticRegression(max_iter=1000))])


def test_search_scores_as_it_does_locally_and_embeds_each_image_once(backend, paths, log, tmp_path):
    local = GridSearchCV(make_pipeline(Tiny(), tmp_path / "local"), GRID, cv=CV).fit(paths, Y)
    backbone, cache = CountingTiny(log, n_workers=2), tmp_path / "shared"
    search = GridSearchCV(make_pipeline(backbone, cache), GRID, cv=CV, n_jobs=2)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        search.fit(paths, Y)
        scores = cross_val_score(make_pipeline(backbone, cache), paths, Y, cv=CV, n_jobs=2)
    assert counted(log) == 2 * len(paths)  # once for each pooling
    processes = {worker.partition("-")[0] for worker in workers(log)}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes
    for name in ("split0_test_score", "split1_test_score", "split2_test_score"):
        np.testing.assert_array_equal(search.cv_results_[name], local.cv_results_[name])
    assert search.best_params_ == local.best_params_
    assert search.best_score_ > 0.9
    assert (search.predict(paths) == local.predict(paths)).all()
    expected = cross_val_score(make_pipeline(Tiny(), tmp_path / "local"), paths, Y, cv=CV)
    np.testing.assert_array_equal(scores, expected)


def test_search_over_a_tuned_classifier_scores_as_it_does_locally(dask_cluster, log, tmp_path):
    grid = {"unfreeze": [(0,), (0, 1)], "dropout": [0.0, 0.2]}
    settings = {"max_epochs": 2, "early_stopping": False}
    local = GridSearchCV(make_classifier(Tiny(), cache=tmp_path / "local", **settings), grid, cv=CV)
    local.fit(X, Y)
    estimator = make_classifier(CountingTiny(log), cache=tmp_path / "shared", **settings)
    with joblib.parallel_config(backend="dask"):
        search = GridSearchCV(estimator, grid, cv=CV).fit(X, Y)
    np.testing.assert_allclose(
        search.cv_results_["mean_test_score"], local.cv_results_["mean_test_score"], atol=1e-9
    )
    assert search.best_score_ > 0.9
    views, boundaries = 3 * len(X), 2
    assert views * boundaries <= counted(log) <= 1.05 * views * boundaries


def test_code_in_the_documentation_runs(dask_cluster, ray_cluster, paths, tmp_path):
    page = Path(__file__).parents[2].joinpath("docs", "clusters.md").read_text()
    section = page.partition("\n## Searches\n")[2].partition("\n## ")[0]
    dask, ray, carry = re.findall(r"^```text\n(.*?)^```$", section, re.M | re.S)
    stores = {
        "tcp://scheduler:8786": dask_cluster.scheduler.address,
        "/var/tmp/": f"{tmp_path}/",
        "/shared/": f"{tmp_path}/shared/",
    }
    namespace = {"readable": pd.DataFrame({"path": paths[:12], "photograph": Y[:12]})}

    def run(code):
        for old, new in stores.items():
            code = code.replace(old, new)
        exec(code, namespace)

    run(dask)
    scores = namespace["search"].cv_results_["mean_test_score"].tolist()
    store = EmbeddingStore(tmp_path / "embeddings")
    assert store.info().computed == 12
    run(ray)
    assert namespace["search"].cv_results_["mean_test_score"].tolist() == scores
    assert store.info().computed == 12
    run(carry)
    assert store.info().computed == 12
    store.clear()
    assert sorted(dask_cluster.run(namespace["absorb"]).values()) == [0, 12]
    assert store.info().computed == 0
    store.close()
    namespace["client"].close()
