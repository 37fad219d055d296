"""Columns of images to columns of results, in one process."""

import pickle
import threading

import numpy as np
import pytest
import torch
from cluster_helpers import LogsLoads, files, loads, make_extractor, make_pipeline_for
from helpers import (
    BOTH,
    DOMAIN,
    NAMES,
    CountingTiny,
    Tiny,
    X,
    Y,
    counted,
    domain_labels,
    encoded,
    images,
    make_classifier,
)
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from sktransfer import (
    FineTunedImageClassifier,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    save,
)
from sktransfer.integrations.rows import remote_model
from sktransfer.utils.errors import ImageError

arrow = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def classifier():
    return make_classifier().fit(X, Y)


@pytest.fixture(scope="module")
def table_and_broken(tmp_path_factory):
    return files(tmp_path_factory.mktemp("images"), n=12)


def embeddings(column):
    return np.array(column.drop_null().to_pylist(), np.float32)


def test_embeddings_equal_the_extractor_and_broken_images_have_errors(table_and_broken):
    table, broken = table_and_broken
    extractor = make_extractor()
    result = remote_model(extractor, "embed").run(list(table["path"]))
    assert result.column_names == ["embedding", "error"]
    assert result["embedding"].type == arrow.list_(arrow.float32())
    expected = extractor.transform(list(table["path"][~broken]))
    np.testing.assert_array_equal(embeddings(result["embedding"]), expected)
    np.testing.assert_array_equal(result["embedding"].is_null(), broken)
    np.testing.assert_array_equal(result["error"].is_valid(), broken)
    errors = result["error"].to_pylist()
    assert errors[1] == "Pillow cannot identify this as an image."
    assert errors[9].startswith("There is no such file.")


def test_encoded_images_and_missing_ones_can_be_mixed():
    extractor = make_extractor()
    content = [encoded(Image.fromarray(image)) for image in images(2)]
    result = remote_model(extractor, "embed").run([None, *content, b""])
    np.testing.assert_array_equal(embeddings(result["embedding"]), extractor.transform(content))
    assert [error is None for error in result["error"].to_pylist()] == [False, True, True, False]


def test_predictions_of_a_tuned_classifier_are_equal(classifier, table_and_broken):
    table, broken = table_and_broken
    readable = list(table["path"][~broken])
    result = remote_model(classifier, "predict", probability=True).run(list(table["path"]))
    assert result["prediction"].drop_null().to_pylist() == list(classifier.predict(readable))
    expected = classifier.predict_proba(readable)
    np.testing.assert_array_equal(embeddings(result["probability"]), expected)
    for column in ("prediction", "probability", "error"):
        np.testing.assert_array_equal(result[column].is_null(), broken != (column == "error"))


def test_tuned_embeddings_are_those_of_transform(classifier, table_and_broken):
    readable = list(table_and_broken[0]["path"][~table_and_broken[1]])
    result = remote_model(classifier, "embed").run(readable)
    np.testing.assert_array_equal(embeddings(result["embedding"]), classifier.transform(readable))


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        (Y, arrow.string()),
        (np.arange(60) % 3, arrow.int64()),
        (np.arange(60) % 2 == 0, arrow.bool_()),
        (np.array(NAMES[np.arange(60) % 3], dtype=object), arrow.string()),
    ],
)
def test_predictions_have_the_type_of_the_labels(y, kind, table_and_broken):
    table, broken = table_and_broken
    model = make_pipeline_for(y)
    remote = remote_model(model, "predict")
    result = remote.run(list(table["path"]))
    assert result["prediction"].type == remote.run([])["prediction"].type == kind
    predicted = model.predict(list(table["path"][~broken]))
    assert result["prediction"].drop_null().to_pylist() == predicted.tolist()


def test_probabilities_of_a_pipeline_run_the_network_once(log):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=None)
    model = make_pipeline(extractor, StandardScaler(), LogisticRegression(max_iter=1000)).fit(X, Y)
    before = counted(log)
    result = remote_model(model, "predict", probability=True).run(png(X[:9]))
    assert counted(log) == before + 9
    assert result["prediction"].to_pylist() == list(model.predict(X[:9]))
    np.testing.assert_allclose(
        embeddings(result["probability"]), model.predict_proba(X[:9]), rtol=1e-6
    )


def test_self_trained_and_frozen_models_predict_as_they_do_themselves():
    model = SelfTrainedImageClassifier(make_classifier(unfreeze=0), shares=(0.5,))
    model.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    for fitted in (model, FrozenEstimator(model.estimators_[0])):
        result = remote_model(fitted, "predict", probability=True).run([*png(X[:3]), b""])
        assert result["prediction"].to_pylist() == [*fitted.predict(X[:3]), None]
        expected = fitted.predict_proba(X[:3])
        np.testing.assert_allclose(embeddings(result["probability"]), expected, rtol=1e-6)


def test_regressor_predicts_numbers():
    model = make_pipeline(PretrainedFeatureExtractor(Tiny, cache=None), Ridge())
    model.fit(X, np.arange(60.0))
    result = remote_model(model, "predict").run(png(X[:3]))
    np.testing.assert_allclose(result["prediction"], model.predict(X[:3]), rtol=1e-6)


def test_embeddings_of_a_pipeline_are_those_before_its_classifier():
    model = make_pipeline(PretrainedFeatureExtractor(Tiny, cache=None), StandardScaler(), Ridge())
    model.fit(X, np.arange(60.0))
    result = remote_model(model, "embed").run(png(X[:3]))
    expected = model[:-1].transform(X[:3])
    np.testing.assert_allclose(embeddings(result["embedding"]), expected, rtol=1e-6)


@pytest.mark.parametrize("n_broken", [0, 2])
def test_nothing_to_compute_gives_columns_of_the_same_types(n_broken, classifier):
    for remote in (
        remote_model(make_extractor(), "embed"),
        remote_model(classifier, "predict", probability=True),
    ):
        result = remote.run([b"no image"] * n_broken)
        assert result.schema == remote.schema
        assert len(result) == n_broken
        assert result["error"].null_count == 0


@pytest.mark.parametrize("on_error", ["nan", "raise"])
def test_on_error_of_the_model_has_no_effect(on_error, table_and_broken):
    table, broken = table_and_broken
    model = make_pipeline_for(Y, on_error=on_error)
    result = remote_model(model, "predict").run(list(table["path"]))
    np.testing.assert_array_equal(result["prediction"].is_null(), broken)
    assert model.steps[0][1].on_error == on_error


def test_classifier_that_skips_broken_images_gives_errors_and_no_warning(table_and_broken):
    table, broken = table_and_broken
    model = make_classifier(on_error="skip").fit(X, Y)
    result = remote_model(model, "predict", probability=True).run(list(table["path"]))
    np.testing.assert_array_equal(result["probability"].is_null(), broken)
    np.testing.assert_array_equal(result["error"].is_valid(), broken)


def test_error_without_a_row_is_raised(monkeypatch):
    def transform(self, X):
        raise ImageError("Gone.")

    monkeypatch.setattr(PretrainedFeatureExtractor, "transform", transform)
    with pytest.raises(ImageError, match=r"Gone\."):
        remote_model(make_extractor(), "embed").run([b""])


# One load in a process


def test_model_is_loaded_once_in_a_process(tmp_path):
    log = tmp_path / "loads.log"
    model = make_pipeline(make_extractor(), LogsLoads(log))
    remote = remote_model(model, "embed")
    threads = [threading.Thread(target=remote.run, args=(png(X[:4]),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pickle.loads(pickle.dumps(remote)).run(png(X[:2]))
    assert list(loads(log).values()) == [1]


def test_file_and_estimator_give_the_same(tmp_path):
    extractor = PretrainedFeatureExtractor(image_size=32, cache=None).fit(X[:2])
    model = make_pipeline(extractor, LogisticRegression(max_iter=1000)).fit(X, Y)
    save(model, tmp_path / "model.skt")
    items = png(X[:5])
    for method in ("embed", "predict"):
        local = remote_model(model, method)
        loaded = remote_model(tmp_path / "model.skt", method)
        assert loaded.content is None
        assert loaded.run(items).equals(local.run(items))


def test_replaced_file_is_loaded_again(tmp_path):
    path = tmp_path / "model.skt"
    extractor = PretrainedFeatureExtractor(image_size=32, cache=None).fit(X[:2])
    save(extractor, path)
    remote = remote_model(path, "embed")
    first = remote.run(png(X[:2]))
    save(PretrainedFeatureExtractor(image_size=64, cache=None).fit(X[:2]), path)
    assert not remote.run(png(X[:2])).equals(first)


def test_remote_model_leaves_its_model_unchanged(log):
    extractor = make_extractor(CountingTiny(log), cache="auto", n_jobs=1, verbose=0)
    parameters = extractor.get_params()
    remote_model(extractor, "embed", threads=2).run(png(X[:3]))
    assert extractor.get_params() == parameters


def test_threads_and_device_are_chosen_in_the_worker(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    remote = remote_model(make_pipeline_for(Y, device="cpu").set_params(), "predict")
    assert remote.load(threads=3, worker=6).model[0].n_jobs == 3
    extractor = make_extractor(device="cpu").set_params(device="auto")
    remote = remote_model(extractor, "embed", threads=2)
    loaded = remote.load(threads=3, worker=6)
    assert (loaded.model.device, loaded.model.n_jobs, loaded.threads) == ("cuda:2", 2, 2)


def test_torch_uses_the_worker_threads_and_is_restored(monkeypatch):
    before, seen = torch.get_num_threads(), []
    transform = PretrainedFeatureExtractor.transform

    def spy(self, X):
        seen.append(torch.get_num_threads())
        return transform(self, X)

    remote = remote_model(make_extractor(), "embed")
    monkeypatch.setattr(PretrainedFeatureExtractor, "transform", spy)
    remote.run(png(X[:2]), threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_cache_is_a_directory_or_off(log, tmp_path):
    items = png(X[:6])
    extractor = make_extractor(CountingTiny(log), cache="auto")
    before = counted(log)
    remote = remote_model(extractor, "embed")
    first = [remote.run(items) for _ in range(2)][-1]
    assert counted(log) == before + 12
    remote = remote_model(extractor, "embed", cache=tmp_path / "cache")
    results = [remote.run(items) for _ in range(2)]
    assert counted(log) == before + 18
    assert all(result.equals(first) for result in results)


# Errors


def test_model_that_is_not_fitted_is_rejected():
    with pytest.raises(NotFittedError):
        remote_model(FineTunedImageClassifier(Tiny), "predict")


def test_model_without_the_results_is_rejected():
    extractor = make_extractor()
    with pytest.raises(TypeError, match="Got a LogisticRegression, which computes no embeddings"):
        remote_model(LogisticRegression().fit([[0], [1]], [0, 1]), "embed")
    with pytest.raises(TypeError, match="Got a PretrainedFeatureExtractor, but expected a fitted"):
        remote_model(extractor, "predict")
    with pytest.raises(TypeError, match="Got a Pipeline, but expected a fitted classifier"):
        remote_model(make_pipeline(extractor, KMeans(2, n_init=1)).fit(X), "predict")
    model = make_pipeline(extractor, LinearSVC()).fit(X, Y)
    with pytest.raises(TypeError, match="Got probability=True, but the Pipeline has no predict_pr"):
        remote_model(model, "predict", probability=True)


def test_invalid_parameters_are_rejected(tmp_path):
    extractor = make_extractor()
    with pytest.raises(ValueError, match="Got threads=0, but expected None or an integer of at"):
        remote_model(extractor, "embed", threads=0)
    with pytest.raises(ValueError, match="Got the string cache='none', but expected a directory"):
        remote_model(extractor, "embed", cache="none")
    with pytest.raises(FileNotFoundError):
        remote_model(tmp_path / "missing.skt", "embed")


def png(X):
    return [encoded(Image.fromarray(image)) for image in X]
