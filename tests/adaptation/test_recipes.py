"""The recipe of docs/domains.md runs with skada, an optional dependency."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

PAGE = Path(__file__).parent.parent.parent / "docs" / "domains.md"


@pytest.mark.slow
def test_skada_recipe_of_the_docs_runs():
    # Importing skada warns, and changes the configuration of scikit-learn.
    with warnings.catch_warnings(), sklearn.config_context():
        warnings.simplefilter("ignore")
        pytest.importorskip("skada")
        digits = load_digits()
        images, y = digits.images[:300], digits.target[:300]
        namespace = {
            "X": np.concatenate([images[:100], 16 - 0.7 * images[100:200]]),
            "y": np.concatenate([y[:100], np.full(100, -1)]),
            "X_test": 16 - 0.7 * images[200:],
            "sample_domain": np.repeat([1, -2], [100, 100]),
            "PretrainedFeatureExtractor": PretrainedFeatureExtractor,
            "StandardScaler": StandardScaler,
            "LogisticRegression": LogisticRegression,
        }
        (recipe,) = re.findall(r"^```text\n(from skada .*?)^```", PAGE.read_text(), re.M | re.S)
        exec(recipe, namespace)
        predicted = namespace["aligned"].predict(namespace["X_test"])
    assert predicted.shape == (100,)
    assert (predicted == y[200:]).mean() > 0.2
