"""A loaded model that serves predictions: from many threads, in forks, with constant memory."""

import collections
import multiprocessing
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import BOTH, DOMAIN, X, Y, domain_labels, images
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sktransfer.embedding.embed as embedding
from sktransfer import (
    FineTunedImageClassifier,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    load,
    save,
    session_store,
)
from sktransfer.engines.torch_engine import TorchEngine
from sktransfer.transforms import loader
from sktransfer.utils.memory import MemoryCache

N_THREADS, N_REQUESTS = 16, 96
TEST = images(N_REQUESTS, seed=3)


def fit(kind):
    if kind == "pipeline":
        first = PretrainedFeatureExtractor(image_size=32)
        return make_pipeline(first, LogisticRegression()).fit(X, Y)
    settings = {"image_size": 32, "max_epochs": 1, "augment": None, "random_state": 0}
    classifier = FineTunedImageClassifier(unfreeze=(0, 1), averaging=0.5, **settings)
    if kind == "self-trained":
        return SelfTrainedImageClassifier(classifier, shares=[0.5]).fit(
            BOTH, domain_labels(Y[0]), sample_domain=DOMAIN
        )
    return classifier.fit(X, Y)


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


@pytest.fixture
def built(monkeypatch):
    """Count the engines that are built, with none in memory at first."""
    counts = collections.Counter()
    create = embedding.create_engine

    def counting(*arguments, engine, **options):
        counts[engine] += 1
        return create(*arguments, engine=engine, **options)

    monkeypatch.setattr(embedding, "create_engine", counting)
    monkeypatch.setattr(embedding, "_engines", MemoryCache(at_least=2))
    return counts


def test_warm_model_builds_its_engine_before_the_first_request(file, built):
    model = load(file, warm_up=True)
    assert built == {"torch": 1}
    expected = model.predict_proba(TEST[:1])
    assert built == {"torch": 1}
    np.testing.assert_array_equal(load(file).predict_proba(TEST[:1]), expected)


def test_model_builds_no_engine_when_it_is_loaded_without_warm_up(file, built):
    model = load(file)
    assert not built
    model.predict(TEST[:1])
    assert built == {"torch": 1}


def any_model(kind):
    if kind == "self-trained":
        return fit(kind)
    engine = kind if kind == "openvino" else "auto"
    extractor = PretrainedFeatureExtractor(image_size=32, engine=engine).fit(X)
    if kind == "frozen":
        linear = [StandardScaler(), LogisticRegression()]
        return make_pipeline(FrozenEstimator(extractor), *linear).fit(X, Y)
    return extractor


@pytest.mark.slow_cases("openvino")
@pytest.mark.parametrize("kind", ["self-trained", "extractor", "frozen", "openvino"])
def test_every_kind_of_model_is_warmed_up(kind, built, tmp_path):
    if kind == "openvino":
        pytest.importorskip("openvino")
    save(any_model(kind), tmp_path / "model.skt")
    embedding._engines.clear()
    built.clear()
    model = load(tmp_path / "model.skt", warm_up=True)
    warm = dict(built)
    assert [*warm] == ["openvino" if kind == "openvino" else "torch"]
    run = model.predict if hasattr(model, "predict") else model.transform
    run(TEST[:1])
    assert built == warm


def test_warm_up_is_true_or_false(file):
    with pytest.raises(ValueError, match=r"^Got warm_up=16, but expected True or False$"):
        load(file, warm_up=16)


def test_request_of_one_image_starts_no_thread_and_writes_no_embedding(file, monkeypatch):
    model = load(file)
    monkeypatch.setattr(loader, "ThreadPoolExecutor", None)
    monkeypatch.setattr(threading.Thread, "start", None)
    before = session_store().info().computed
    for row in range(3):
        model.predict_proba([TEST[row]])
    assert session_store().info().computed == before


def test_request_of_one_image_is_one_batch_of_one_image(file, monkeypatch):
    model, batches = load(file, warm_up=True), []
    run = TorchEngine.run

    def recording(engine, batch):
        batches.append(len(batch))
        return run(engine, batch)

    monkeypatch.setattr(TorchEngine, "run", recording)
    model.predict_proba([TEST[0]])
    assert batches == [1]


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
    model, peaks = load(file), []
    for start in range(4000):
        model.predict(TEST[start % N_REQUESTS : start % N_REQUESTS + 1] ^ np.uint8(start % 251))
        if start in (1000, 3999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 30_000  # kB
