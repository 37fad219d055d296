"""The summary of a saved model."""

import json
import subprocess
import sys

import pytest
from helpers import X, Y, make_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import (
    FineTunedImageClassifier,
    ModelFileError,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    save,
)
from sktransfer.export.show import read_summary

SETTINGS = {"image_size": 32, "cache": None}


def test_summary_of_a_classifier(tmp_path):
    model = FineTunedImageClassifier(max_epochs=1, random_state=0, **SETTINGS).fit(X, Y)
    save(model, tmp_path / "model.skt")
    summary = read_summary(tmp_path / "model.skt")
    assert summary["model"] == "FineTunedImageClassifier"
    assert summary["classes"] == ["cat", "dog", "owl"]
    assert summary["standalone"] is True
    assert summary["bytes"] == (tmp_path / "model.skt").stat().st_size
    assert {"sktransfer", "python", "torch", "scikit-learn"} <= summary["versions"].keys()
    assert [*summary["sha256"]] == ["weights.safetensors"]
    (network,) = summary["networks"]
    assert network["backbone"] == "efficientnet_lite0"
    assert network["preprocessing"]["crop"] == (32, 32)
    assert network["decided"] == dict(model.decision_.parameters)
    assert network["strategy"] == model.decision_.strategy
    assert network["temperature"] == model.temperature_
    assert network["class_counts"] == (20, 20, 20)
    assert network["mean_interclass_cosine"] == model.decision_.mean_interclass_cosine
    assert (network["pixel_range"], network["interrupted"]) == (None, False)
    assert (network["parameters"]["max_epochs"], network["parameters"]["lr"]) == (1, "auto")
    assert [stage["stage"] for stage in network["stages"]] == [s["stage"] for s in model.stages_]
    json.dumps(summary)


def test_summary_of_a_pipeline_names_its_steps(tmp_path):
    first = PretrainedFeatureExtractor(layer=["block1", None], pooling="max", **SETTINGS)
    save(make_pipeline(first, LogisticRegression()).fit(X, Y), tmp_path / "model.skt")
    summary = read_summary(tmp_path / "model.skt")
    assert summary["model"] == "Pipeline(PretrainedFeatureExtractor, LogisticRegression)"
    assert summary["classes"] == ["cat", "dog", "owl"]
    (network,) = summary["networks"]
    assert (network["layers"], network["pooling"]) == (["block1", None], "max")


def test_summary_lists_all_networks(tmp_path):
    classifier = FineTunedImageClassifier(unfreeze=0, augment=None, **SETTINGS)
    save(SelfTrainedImageClassifier(classifier).fit(X, Y), tmp_path / "a.skt", standalone=False)
    summary = read_summary(tmp_path / "a.skt")
    assert summary["model"] == "SelfTrainedImageClassifier(FineTunedImageClassifier)"
    assert summary["standalone"] is False
    assert len(summary["networks"]) == 1
    tuned = PretrainedFeatureExtractor(classifier.fit(X, Y), cache=None).fit(X)
    save(tuned, tmp_path / "b.skt", standalone=False)
    (network,) = read_summary(tmp_path / "b.skt")["networks"]
    assert network["backbone"] == "tuned FineTunedImageClassifier"
    assert read_summary(tmp_path / "b.skt")["classes"] is None


def test_summary_names_a_users_own_network(tmp_path):
    classifier = make_classifier(unfreeze=0).fit(X, Y)
    for model in (classifier, PretrainedFeatureExtractor(classifier, cache=None).fit(X)):
        with pytest.warns(UserWarning, match="is not saved"):
            save(model, tmp_path / "model.skt", standalone=False)
        (network,) = read_summary(tmp_path / "model.skt")["networks"]
        assert network["own_code"] == "helpers.Tiny"


def test_damaged_file_has_no_summary(tmp_path):
    (tmp_path / "model.skt").write_bytes(b"nothing")
    with pytest.raises(ModelFileError, match="another kind of file"):
        read_summary(tmp_path / "model.skt")


def test_summary_needs_no_torch(tmp_path):
    classifier = FineTunedImageClassifier(unfreeze=0, augment=None, **SETTINGS)
    save(classifier.fit(X, Y), tmp_path / "model.skt", standalone=False)
    code = (
        "import sys; from sktransfer.export.show import read_summary; "
        f"read_summary({str(tmp_path / 'model.skt')!r}); "
        "assert not {'torch', 'sklearn', 'PIL'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
