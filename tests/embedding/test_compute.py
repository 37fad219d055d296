import pytest
import torch
from helpers import Tiny, make_classifier

from sktransfer import PretrainedFeatureExtractor
from sktransfer.embedding.compute import ComputeConfig


def test_compute_config_resolves_the_parameters_of_an_estimator(store):
    parameters = {"device": "cpu", "precision": "bfloat16", "n_jobs": 3, "engine": "torch"}
    for estimator in (
        PretrainedFeatureExtractor(Tiny, cache=store, **parameters),
        make_classifier(cache=store, **parameters),
    ):
        assert ComputeConfig.of(estimator) == ComputeConfig(
            torch.device("cpu"), "torch", torch.bfloat16, 3, store
        )


def test_compute_config_resolves_auto_precision_and_no_cache():
    config = ComputeConfig.of(PretrainedFeatureExtractor(Tiny, device="cpu", cache=None))
    assert config.precision == torch.float32
    assert config.engine == "auto"
    assert config.store is None


def test_compute_config_rejects_an_unknown_precision():
    with pytest.raises(ValueError, match="Got precision='fp8', but expected one of 'auto'"):
        ComputeConfig.of(PretrainedFeatureExtractor(Tiny, device="cpu", precision="fp8"))
