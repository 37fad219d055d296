"""A fitted classifier is the backbone of another estimator."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from helpers import SIZE, X_TEST, Y_TEST, Tiny, X, Y, cosine, images, make_classifier
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor
from sktransfer.backbones.loading import load_backbone


@pytest.fixture(scope="module")
def source():
    return make_classifier(Tiny, averaging=1.0, early_stopping=False).fit(X, Y)


def extractor(backbone, **parameters):
    return PretrainedFeatureExtractor(backbone, **{"cache": None, **parameters})


def test_extractor_of_a_classifier_returns_the_tuned_embedding(source):
    embedding = extractor(source).fit_transform(X_TEST)
    np.testing.assert_array_equal(embedding, source.transform(X_TEST))
    assert abs(embedding - extractor(Tiny).fit_transform(X_TEST)).max() > 1e-3


def test_extractor_logits_equal_those_of_the_classifier(source):
    logits = extractor(source, layer="logits").fit(X)
    expected = np.log(source.predict_proba(X_TEST))
    log_probabilities = logits.transform(X_TEST)
    log_probabilities = log_probabilities - np.log(
        np.exp(log_probabilities).sum(axis=1, keepdims=True)
    )
    np.testing.assert_allclose(log_probabilities, expected, atol=1e-5)
    names = logits.get_feature_names_out().tolist()
    assert names == [f"tiny_tuned_logits_{name}" for name in ("cat", "dog", "owl")]


def test_classifier_is_fine_tuned_again_on_other_classes(source):
    before = {name: tensor.clone() for name, tensor in source.net_.module_.state_dict().items()}
    target = make_classifier(source, unfreeze=(0, 1)).fit(
        X[::-1], np.where(Y == "owl", "bird", "beast")[::-1]
    )
    assert target.score(X_TEST, np.where(Y_TEST == "owl", "bird", "beast")) >= 0.9
    assert target.classes_.tolist() == ["beast", "bird"]
    first = load_backbone(target).block_list.blocks[0][1].state_dict()
    tuned = load_backbone(source).block_list.blocks[0][1].state_dict()
    pretrained = load_backbone(Tiny).block_list.blocks[0][1].state_dict()
    assert all((first[name] == tuned[name]).all() for name in first)  # frozen in the second fit
    assert any((first[name] != pretrained[name]).any() for name in first)
    after = source.net_.module_.state_dict()
    assert all((before[name] == after[name]).all() for name in before)


def test_pickle_of_a_twice_tuned_classifier_predicts_the_same(source):
    target = make_classifier(source, unfreeze=(0, 1)).fit(X, Y)
    loaded = pickle.loads(pickle.dumps(target))
    np.testing.assert_array_equal(loaded.predict_proba(X_TEST), target.predict_proba(X_TEST))


@pytest.mark.parametrize("times", [1, 2])
def test_saved_weights_give_the_tuned_embedding(source, tmp_path, times):
    last = source if times == 1 else make_classifier(source, unfreeze=(0, 2)).fit(X[:40], Y[:40])
    last.save_weights(tmp_path / "folder" / "tuned.safetensors")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tuned.safetensors"]
    embedding = extractor(Tiny, weights=tmp_path / "folder" / "tuned.safetensors").fit_transform(
        X_TEST
    )
    np.testing.assert_array_equal(embedding, last.transform(X_TEST))
    Tiny().load_state_dict(load_file(tmp_path / "folder" / "tuned.safetensors"))


@pytest.mark.slow
def test_saved_weights_give_the_same_embedding_in_another_process(source, tmp_path):
    source.save_weights(tmp_path / "tuned.safetensors")
    np.save(tmp_path / "X.npy", X_TEST)
    script = (
        "import numpy as np; from helpers import Tiny; from sktransfer import *\n"
        "extractor = PretrainedFeatureExtractor(Tiny, weights='tuned.safetensors', cache=None)\n"
        "np.save('found.npy', extractor.fit_transform(np.load('X.npy')))\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), source.transform(X_TEST))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "shufflenet_v2_x0_5"])
def test_saved_weights_of_known_networks_give_the_tuned_embedding(name, tmp_path):
    weights = "default" if name == "efficientnet_lite0" else None
    options = {"unfreeze": (0, 1), "lr": 3e-3, "augment": None, "random_state": 0}
    options["image_size"] = None  # as the extractor below
    photos = images(12, side=40)
    source = FineTunedImageClassifier(name, weights=weights, **options, cache=None)
    source.fit(photos, np.arange(12) % 2)
    source.save_weights(tmp_path / "tuned.safetensors")
    reloaded = extractor(name, weights=tmp_path / "tuned.safetensors").fit(photos)
    assert cosine(reloaded.transform(photos), source.transform(photos)).min() >= 0.9999
    untuned = extractor(name, weights=weights).fit_transform(photos)
    assert cosine(untuned, source.transform(photos)).max() < 0.9999


def test_saved_weights_hold_adapted_batch_norm(tmp_path):
    source = make_classifier(Tiny, batch_norm="adapt").fit(X // 4, Y)
    np.testing.assert_array_equal(extractor(source).fit_transform(X), source.transform(X))
    source.save_weights(tmp_path / "tuned.safetensors")
    embedding = extractor(Tiny, weights=tmp_path / "tuned.safetensors").fit_transform(X)
    np.testing.assert_array_equal(embedding, source.transform(X))


def test_extractor_of_a_classifier_keeps_size_and_preprocessing():
    source = make_classifier(Tiny, image_size=(2 * SIZE, SIZE)).fit(X, Y)
    assert extractor(source).fit(X).preprocessing_ == source.preprocessing_
    resized = extractor(source, image_size=SIZE).fit(X)
    assert resized.preprocessing_ == Tiny.preprocessing.with_image_size(SIZE)


def test_extractors_of_two_fits_share_no_embeddings(source, tmp_path):
    second = make_classifier(Tiny, random_state=1).fit(X, Y)
    for classifier in (source, second):
        embedding = extractor(classifier, cache=tmp_path).fit_transform(X_TEST)
        np.testing.assert_array_equal(embedding, classifier.transform(X_TEST))


def test_clone_keeps_a_classifier_in_a_frozen_estimator(source):
    embedding = clone(extractor(FrozenEstimator(source))).fit_transform(X_TEST)
    np.testing.assert_array_equal(embedding, source.transform(X_TEST))
    probe = make_pipeline(extractor(FrozenEstimator(source)), LogisticRegression(max_iter=1000))
    assert cross_val_score(probe, X, Y, cv=2, error_score="raise").mean() > 0.9


def test_clone_of_a_bare_classifier_raises_not_fitted(source):
    message = (
        "Got a FineTunedImageClassifier as backbone that is not fitted. Call fit first; if "
        "scikit-learn clones the estimator around it, as searches do, wrap it in a "
        "sklearn.frozen.FrozenEstimator"
    )
    with pytest.raises(NotFittedError, match=f"^{message}$"):
        clone(extractor(source)).fit(X)


def test_fitted_classifier_as_backbone_rejects_other_weights(source):
    message = (
        "Got weights=None with a fitted classifier as backbone, which has its own weights; "
        "leave weights at 'default'"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        extractor(source, weights=None).fit(X)


def test_save_weights_rejects_other_file_endings(source, tmp_path):
    message = f"Got the path '{tmp_path}/tuned.pth', but expected one that ends in .safetensors"
    with pytest.raises(ValueError, match=f"^{message}$"):
        source.save_weights(tmp_path / "tuned.pth")


@pytest.mark.parametrize("path", [None, 0, True, [], ("a.safetensors",)])
def test_save_weights_rejects_non_paths(source, path):
    with pytest.raises(
        TypeError, match=r"^Got path=.* but expected the path of a \.safetensors file"
    ):
        source.save_weights(path)


def test_interrupted_save_weights_keeps_the_old_file(source, tmp_path, monkeypatch):
    path = tmp_path / "tuned.safetensors"
    source.save_weights(path)
    content = path.read_bytes()

    def break_off(state, unfinished):
        unfinished.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("sktransfer.backbones.weights.save_file", break_off)
    with pytest.raises(OSError, match="No space"):
        source.save_weights(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
