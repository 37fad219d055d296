"""Each image is embedded once, as counted by the backbone, independently of the store."""

import os
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers import CountingTiny, counted, images, make_search, workers
from sklearn.base import clone
from sklearn.model_selection import ShuffleSplit, cross_val_score

from sktransfer import PretrainedFeatureExtractor

N = 60
X = images(N)
y = np.arange(N) % 3


@pytest.mark.parametrize("cache", ["auto", "kept"])
def test_searches_embed_each_image_once(log, tmp_path, cache):
    cache = tmp_path / "kept" if cache == "kept" else cache
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=cache)
    fitted = make_search(extractor).fit(X, y)
    assert counted(log) == N
    make_search(clone(extractor), seed=1).fit(X, y)
    shuffled = np.random.RandomState(0).permutation(N)
    make_search(clone(extractor)).fit(X[shuffled], y[shuffled])
    cross_val_score(fitted.best_estimator_, X, y, cv=ShuffleSplit(3, random_state=0))
    assert counted(log) == N
    fitted.predict(images(5, seed=1))
    assert counted(log) == N + 5


def test_search_without_a_store_embeds_each_image_31_times(log):
    """Without a store, a search embeds 30 x (4/5 + 1/5) N images, and N for the refit."""
    make_search(PretrainedFeatureExtractor(CountingTiny(log), cache=None)).fit(X, y)
    assert counted(log) == 31 * N


@pytest.mark.parametrize("cache", ["auto", "kept"])
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_parallel_search_embeds_each_image_about_once(log, tmp_path, backend, cache):
    import joblib

    cache = tmp_path / "kept" if cache == "kept" else cache
    backbone = CountingTiny(log, n_workers=2)
    extractor = PretrainedFeatureExtractor(backbone, cache=cache, batch_size=4)
    with joblib.parallel_backend(backend):
        make_search(extractor, n_jobs=2).fit(X, y)
    assert N <= counted(log) <= 1.05 * N
    assert len(workers(log)) == 2


def test_cache_directory_serves_a_second_process(log, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from helpers import CountingTiny, make_search, images\n"
        "from sktransfer import PretrainedFeatureExtractor\n"
        "X, y = images(60), [row % 3 for row in range(60)]\n"
        "log, cache = sys.argv[1:]\n"
        "make_search(PretrainedFeatureExtractor(CountingTiny(log), cache=cache)).fit(X, y)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(helpers.__file__).parent)}
    for _ in range(2):
        subprocess.run(
            [sys.executable, script, log, tmp_path / "kept"], check=True, env=environment
        )
        assert counted(log) == N


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "0"},
        {"pooling": "max"},
        {"image_size": 24},
        {"precision": "bfloat16"},
        {"batch_norm": "adapt"},
    ],
)
def test_parameters_that_change_the_embedding_change_the_key(log, store, change):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    extractor.fit_transform(X)
    before = counted(log)
    extractor.set_params(**change).fit(X)
    fitted = counted(log)  # adapting runs the images through the network once more
    extractor.transform(X)
    assert counted(log) == fitted + N >= before + N


@pytest.mark.parametrize("change", [{"batch_size": 7}, {"n_jobs": 3}, {"device": "cpu"}])
def test_parameters_that_keep_the_embedding_keep_the_key(log, store, change):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    extractor.fit_transform(X)
    extractor.set_params(**change).fit_transform(X)
    assert counted(log) == N


def test_repeated_image_is_embedded_once(log, store):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    embedded = extractor.fit_transform(np.concatenate([X, X[::-1]]))
    assert counted(log) == N
    np.testing.assert_array_equal(embedded[:N], embedded[N:][::-1])


def test_changed_file_is_embedded_again(log, store, tmp_path):
    from PIL import Image

    path = tmp_path / "image.png"
    Image.fromarray(X[0]).save(path)
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    before = extractor.fit_transform([path])
    Image.fromarray(X[1]).save(path)
    after = extractor.transform([path])
    assert counted(log) == 2
    assert not np.allclose(before, after)
