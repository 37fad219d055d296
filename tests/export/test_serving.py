"""A loaded model that serves predictions: from many threads, in forks, with constant memory."""

import multiprocessing
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import X, Y, images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor, load, save

N_THREADS, N_REQUESTS = 16, 96
TEST = images(N_REQUESTS, seed=3)


def fit(kind):
    if kind == "pipeline":
        first = PretrainedFeatureExtractor(image_size=32)
        return make_pipeline(first, LogisticRegression()).fit(X, Y)
    settings = {"image_size": 32, "max_epochs": 1, "augment": None, "random_state": 0}
    return FineTunedImageClassifier(unfreeze=(0, 1), averaging=0.5, **settings).fit(X, Y)


@pytest.fixture(scope="module", params=["classifier", "pipeline"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "model.skt"
    save(fit(request.param), path)
    return path


def test_many_threads_get_the_right_answers(file):
    expected = load(file).predict_proba(TEST)
    model = load(file)  # whose first requests come all at once
    with ThreadPoolExecutor(N_THREADS) as threads:
        results = list(threads.map(lambda row: model.predict_proba(TEST[row : row + 1]), range(96)))
    np.testing.assert_allclose(np.concatenate(results), expected, atol=2e-3)


def answer(model, queue):
    queue.put(model.predict_proba(TEST[:4]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_answers(file):
    model = load(file)
    expected = model.predict_proba(TEST[:4])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=answer, args=(model, queue))
    process.start()
    result = queue.get(timeout=60)
    process.join()
    np.testing.assert_allclose(result, expected, atol=2e-3)


def test_loaded_model_writes_nothing(file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    load(file).predict(TEST[:4])
    assert not [*tmp_path.iterdir()]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_memory_is_constant_over_many_requests(file):
    model = load(file)
    for step in [model, *getattr(model, "named_steps", {}).values()]:
        if hasattr(step, "cache"):
            step.cache = None
    peaks = []
    for start in range(4000):
        model.predict(TEST[start % N_REQUESTS : start % N_REQUESTS + 1] ^ np.uint8(start % 251))
        if start in (1000, 3999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 30_000  # kB
