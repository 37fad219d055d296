"""The torch module of a fitted model computes what the model computes."""

import re

import numpy as np
import pytest
import torch
from export_helpers import EXAMPLES, TWO, batch_of, extractor, largest_difference
from helpers import (
    BOTH,
    DOMAIN,
    X_TARGET,
    Bfloat16Tiny,
    Tiny,
    X,
    Y,
    domain_labels,
    make_classifier,
    make_search,
)
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from sktransfer import PretrainedFeatureExtractor, SelfTrainedImageClassifier, to_module


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"layer": "0", "pooling": "max"},
        {"layer": ["0", "1"], "pooling": "avgmax"},
        {"layer": "0", "pooling": None},
        {"layer": "logits"},
        {"image_size": 37},
        {"image_size": (24, 31)},
        {"batch_norm": "adapt"},
        {"backbone": Bfloat16Tiny},
    ],
    ids=str,
)
def test_embeddings_are_those_of_the_extractor(parameters):
    fitted = PretrainedFeatureExtractor(**{"backbone": Tiny, "cache": None, **parameters})
    fitted.fit(X_TARGET)
    module = to_module(fitted)
    scale = abs(fitted.transform(EXAMPLES)).max()
    assert largest_difference(module, fitted.transform) <= 1e-5 * scale
    assert module.classes is None


@pytest.mark.slow_cases("two classes")
@pytest.mark.parametrize(
    "parameters",
    [
        {},  # staged, the last stage trains all blocks
        {"unfreeze": (0, 1)},
        {"unfreeze": (0, 1), "averaging": "auto", "early_stopping": False},
        {"unfreeze": "all"},
        {"unfreeze": (0, 1), "image_size": 33},
        {"image_size": (20, 31)},
        {"backbone": Bfloat16Tiny},
    ],
    ids=str,
)
@pytest.mark.parametrize("y", [Y, TWO], ids=["three classes", "two classes"])
def test_probabilities_are_those_of_the_classifier(parameters, y):
    fitted = make_classifier(**parameters).fit(X, y)
    module = to_module(fitted)
    assert largest_difference(module, fitted.predict_proba) <= 1e-5
    assert module.classes.tolist() == fitted.classes_.tolist()


def test_head_of_a_frozen_network_and_its_logits():
    fitted = make_classifier(unfreeze=0).fit(X, Y)
    # The rounding error of the embeddings, which the head multiplies by its weights.
    rounding = abs(fitted.transform(EXAMPLES)).max() * np.finfo(np.float32).eps
    tolerance = rounding * float(fitted.net_.module_.head.weight.abs().sum(1).max())
    assert tolerance < 1e-3
    logits = fitted.to_module("logits")
    assert largest_difference(logits, fitted.decision_function) <= tolerance
    assert largest_difference(to_module(fitted), fitted.predict_proba) <= tolerance
    assert logits.classes.tolist() == fitted.classes_.tolist()


def test_embeddings_are_those_of_the_tuned_network():
    fitted = make_classifier(unfreeze=(0, 1)).fit(X, Y)
    scale = abs(fitted.transform(EXAMPLES)).max()
    module = fitted.to_module("embeddings")
    assert largest_difference(module, fitted.transform) <= 1e-5 * scale
    assert module.classes is None


def test_classifier_with_adapted_batch_norm():
    fitted = make_classifier(batch_norm="adapt", unfreeze=(0, 1))
    fitted.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)
    assert largest_difference(to_module(fitted), fitted.predict_proba) <= 1e-5
    plain = make_classifier(unfreeze=(0, 1)).fit(X, Y)
    assert largest_difference(to_module(fitted), plain.predict_proba) > 1e-3


def test_module_of_self_training_averages_its_classifiers():
    fitted = SelfTrainedImageClassifier(make_classifier(unfreeze=(0, 1)), shares=[0.5])
    fitted.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)
    module = to_module(fitted).train()
    assert largest_difference(module, fitted.predict_proba) <= 1e-5
    assert largest_difference(module, fitted.estimators_[0].predict_proba) > 1e-4
    assert module.classes.tolist() == fitted.classes_.tolist()
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("y", [Y, TWO, Y == "dog"], ids=["three", "two", "boolean"])
@pytest.mark.parametrize(
    "steps",
    [
        [],
        [StandardScaler()],
        [StandardScaler(with_mean=False), "passthrough"],
        [StandardScaler(with_std=False), Normalizer("l1")],
        [Normalizer("max")],
        [StandardScaler(), Normalizer()],
    ],
    ids=str,
)
def test_pipelines_are_translated(steps, y):
    fitted = make_pipeline(extractor(), *steps, LogisticRegression(max_iter=1000)).fit(X, y)
    module = to_module(fitted)
    assert largest_difference(module, fitted.predict_proba) <= 1e-5
    assert module.classes.tolist() == fitted.classes_.tolist()


@pytest.mark.parametrize("steps", [[StandardScaler()], ["passthrough"]], ids=str)
def test_pipeline_without_a_classifier_returns_embeddings(steps):
    fitted = make_pipeline(extractor(), *steps).fit(X)
    module = to_module(fitted)
    scale = abs(fitted.transform(EXAMPLES)).max()
    assert largest_difference(module, fitted.transform) <= 1e-5 * scale
    assert module.classes is None


def test_fitted_classifier_as_the_first_step_embeds():
    tuned = FrozenEstimator(make_classifier(unfreeze=(0, 1)).fit(X, Y))
    fitted = make_pipeline(tuned, StandardScaler(), LogisticRegression(max_iter=1000)).fit(X, TWO)
    assert largest_difference(to_module(fitted), fitted.predict_proba) <= 1e-5


def test_fitted_classifier_as_the_only_step_classifies():
    fitted = make_pipeline(make_classifier(unfreeze=(0, 1))).fit(X, Y)
    module = to_module(fitted)
    assert largest_difference(module, fitted.predict_proba) <= 1e-5
    assert module.classes.tolist() == fitted.classes_.tolist()


def test_module_shares_nothing_with_the_model():
    fitted = make_classifier(unfreeze=(0, 1)).fit(X, Y)
    expected = fitted.predict_proba(EXAMPLES)
    module = to_module(fitted)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert (
        (module(batch_of(EXAMPLES[0])) == 1 / 3)
        .logical_or(module(batch_of(EXAMPLES[0])).isnan())
        .all()
    )
    np.testing.assert_array_equal(fitted.predict_proba(EXAMPLES), expected)
    assert largest_difference(to_module(fitted), fitted.predict_proba) <= 1e-5


def test_exported_program_takes_all_sizes():
    module = to_module(make_classifier(unfreeze=(0, 1)).fit(X, Y))
    dynamic = torch.export.Dim.DYNAMIC
    example = torch.zeros(2, 3, 50, 70, dtype=torch.uint8)
    program = torch.export.export(
        module, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    ).module()
    for image in EXAMPLES:
        torch.testing.assert_close(program(batch_of(image)), module(batch_of(image)))


def test_step_without_a_translation_is_named():
    fitted = make_pipeline(extractor(), PCA(4), LogisticRegression(max_iter=1000)).fit(X, Y)
    message = re.escape(
        "Got a Pipeline with the step 'pca', PCA(n_components=4), which is not translated to torch"
    )
    with pytest.raises(TypeError, match=message + r".*sktransfer\.export_onnx"):
        to_module(fitted)


def test_subclass_of_a_known_step_is_not_translated():
    class Scaler(StandardScaler):
        pass

    with pytest.raises(TypeError, match="step 'scaler'"):
        to_module(make_pipeline(extractor(), Scaler(), LogisticRegression(max_iter=1000)).fit(X, Y))


def test_other_models_raise_an_error():
    with pytest.raises(TypeError, match="Got LogisticRegression, but expected a fitted Pretr"):
        to_module(LogisticRegression())
    with pytest.raises(TypeError, match="begins with 'standardscaler', a StandardScaler"):
        to_module(make_pipeline(StandardScaler()).fit([[1.0], [2.0]]))
    search = make_search(extractor()).fit(X[:30], Y[:30])
    with pytest.raises(TypeError, match="pass its best_estimator_"):
        to_module(search)


@pytest.mark.parametrize(
    "model",
    [
        extractor(),
        make_classifier(),
        make_pipeline(extractor(), LogisticRegression(max_iter=1000)),
        SelfTrainedImageClassifier(make_classifier()),
    ],
    ids=lambda model: type(model).__name__,
)
def test_model_must_be_fitted(model):
    with pytest.raises(NotFittedError):
        to_module(model)


def test_unknown_output_raises_an_error():
    fitted = make_classifier(unfreeze=0).fit(X, Y)
    with pytest.raises(ValueError, match="expected one of 'probabilities', 'logits', 'embeddings'"):
        fitted.to_module("labels")
