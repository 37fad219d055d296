import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from sktransfer.diagnostics.logme import logme


def test_logme_equals_the_maximum_log_evidence():
    """Compute the evidence by its definition, and search for the best precisions."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 40)
    embeddings = np.eye(3)[codes] @ rng.normal(size=(3, 6)) + rng.normal(size=(40, 6))

    def evidence(target):
        def negative(logs):
            prior, noise = np.exp(logs)
            covariance = embeddings @ embeddings.T / prior + np.eye(40) / noise
            return -multivariate_normal(np.zeros(40), covariance).logpdf(target)

        return -minimize(negative, [0.0, 0.0], method="Nelder-Mead", tol=1e-8).fun / 40

    expected = np.mean([evidence(target) for target in np.eye(3)[codes].T])
    assert logme(embeddings, codes) == pytest.approx(expected, abs=1e-4)


def test_logme_is_finite_with_more_features_than_images():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 10)
    noise = rng.normal(size=(20, 200))
    separable = noise + 3 * codes[:, None] * (np.arange(200) < 20)
    assert np.isfinite(logme(noise, codes))
    assert logme(separable, codes) > logme(noise, codes)
    assert logme(np.column_stack([separable, np.zeros(20)]), codes) == pytest.approx(
        logme(separable, codes)
    )
