"""pickle, joblib and cloudpickle files predict the same, bit for bit; so do copies in memory."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import helpers
import joblib
import numpy as np
import pytest
from helpers import BOTH, DOMAIN, Tiny, X, Y, all_outputs, domain_labels, images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import (
    FineTunedImageClassifier,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    save,
)

TEST = images(5, seed=3)


def extractor(backbone="efficientnet_lite0"):
    return PretrainedFeatureExtractor(backbone, image_size=32, cache=None)


def classifier(backbone="efficientnet_lite0", **parameters):
    defaults = {"image_size": 32, "unfreeze": (0, 1), "max_epochs": 1, "n_views": 1}
    return FineTunedImageClassifier(
        backbone, **{**defaults, "cache": None, "random_state": 0, **parameters}
    )


def self_trained():
    model = SelfTrainedImageClassifier(classifier(Tiny), shares=[0.5])
    return model.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)


MODELS = {
    "extractor": lambda: extractor().fit(X),
    "classifier": lambda: classifier().fit(X, Y),
    "self-trained": self_trained,
    "pipeline": lambda: make_pipeline(
        extractor(), StandardScaler(), LogisticRegression(max_iter=2000)
    ).fit(X, Y),
    "extractor with a module": lambda: extractor(Tiny()).fit(X),
    "classifier with a module": lambda: classifier(Tiny()).fit(X, Y),
}


def joblib_bytes(model):
    file = io.BytesIO()
    joblib.dump(model, file)
    return file.getvalue()


DUMPS = {"pickle": pickle.dumps, "joblib": joblib_bytes, "cloudpickle": cloudpickle.dumps}


@pytest.fixture(scope="module")
def fitted():
    """Fit all models once."""
    return {name: make() for name, make in MODELS.items()}


def assert_same(outputs, model):
    expected = all_outputs(model, TEST)
    assert set(outputs) == set(expected) != set()
    for name, values in expected.items():
        np.testing.assert_array_equal(outputs[name], values, name)


LOAD = """
import joblib, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from helpers import all_outputs
X = np.load("X.npy")
for number in range(int(sys.argv[2])):
    np.savez(f"{number}.npz", **all_outputs(joblib.load(f"{number}.pkl"), X))
"""


def test_models_predict_the_same_in_a_fresh_process(fitted, tmp_path):
    saved = [(name, dumps(model)) for name, model in fitted.items() for dumps in DUMPS.values()]
    np.save(tmp_path / "X.npy", TEST)
    for number, (_, content) in enumerate(saved):
        (tmp_path / f"{number}.pkl").write_bytes(content)
    arguments = [str(Path(helpers.__file__).parent), str(len(saved))]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=tmp_path)
    for number, (name, _) in enumerate(saved):
        with np.load(tmp_path / f"{number}.npz") as outputs:
            assert_same(outputs, fitted[name])


@pytest.mark.parametrize("method", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("name", MODELS)
def test_copy_predicts_the_same(fitted, name, method):
    assert_same(all_outputs(method(fitted[name]), TEST), fitted[name])


@pytest.mark.parametrize("method", [copy.copy, copy.deepcopy])
def test_copy_that_is_fitted_again_leaves_the_original_unchanged(fitted, method):
    before = all_outputs(fitted["classifier with a module"], TEST)
    copied = method(fitted["classifier with a module"])
    copied.set_params(lr=0.01, max_epochs=2).fit(X[::-1], Y)
    assert_same(before, fitted["classifier with a module"])
    assert not np.array_equal(copied.predict_proba(TEST), before["predict_proba"])


def test_copy_shares_the_arrays_and_deepcopy_does_not(fitted):
    model = fitted["classifier"]
    weights = model._tuned.weights["head.weight"]
    assert copy.copy(model)._tuned.weights["head.weight"] is weights
    assert not np.shares_memory(copy.deepcopy(model)._tuned.weights["head.weight"], weights)


@pytest.mark.parametrize("dumps", DUMPS.values(), ids=DUMPS)
def test_sizes_are_those_of_the_documentation(fitted, dumps):
    """An extractor needs about 1 kB, and a classifier its trained blocks and head."""
    assert 500 < len(dumps(fitted["extractor"])) < 2000
    trained = sum(array.nbytes for array in fitted["classifier"]._tuned.weights.values())
    assert 1.5e6 < trained < len(dumps(fitted["classifier"])) < trained + 20_000 < 2e6
    module = sum(tensor.nbytes for tensor in Tiny().state_dict().values())
    assert module < len(dumps(fitted["extractor with a module"])) < 3 * module + 20_000


def test_other_files_have_the_sizes_of_the_documentation(fitted, tmp_path):
    sio = pytest.importorskip("skops.io")
    assert len(sio.dumps(fitted["extractor"])) < 50_000
    pickled = len(pickle.dumps(fitted["classifier"]))
    assert pickled < len(sio.dumps(fitted["classifier"])) < pickled + 200_000
    save(fitted["classifier"], tmp_path / "all.skt")
    save(fitted["classifier"], tmp_path / "tuned.skt", standalone=False)
    assert 2.0e7 < (tmp_path / "all.skt").stat().st_size < 2.2e7
    assert pickled < (tmp_path / "tuned.skt").stat().st_size + 50_000 < 2e6


SCRIPT = """
import pickle, warnings
import cloudpickle
import numpy as np
import torch
from torch import nn
from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())

def build():
    torch.manual_seed(0)
    return Small()

X, y = np.load("X.npy"), np.load("y.npy")
models = [
    PretrainedFeatureExtractor(build, image_size=32, cache=None).fit(X),
    FineTunedImageClassifier(
        Small(), image_size=32, unfreeze=(0, 1), max_epochs=1, n_views=1, cache=None,
        augment=lambda image: image.flip(-1), random_state=0,
    ).fit(X, y),
]
outputs = [model.transform(X) for model in models]
with open("cloudpickle.pkl", "wb") as file:
    cloudpickle.dump((models, outputs), file)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with open("pickle.pkl", "wb") as file:
        pickle.dump(models[0], file)
(warning,) = caught
assert "build in its own main script" in str(warning.message), warning.message
"""
OTHER_SCRIPT = """
import pickle
import numpy as np
import torch

X = np.load("X.npy")
with open("cloudpickle.pkl", "rb") as file:
    models, outputs = pickle.load(file)
for model, output in zip(models, outputs, strict=True):
    np.testing.assert_array_equal(model.transform(X), output)
assert models[1].augment(torch.tensor([1, 2])).tolist() == [2, 1]
try:
    with open("pickle.pkl", "rb") as file:
        pickle.load(file)
except AttributeError as error:
    assert "build" in str(error), error
else:
    raise AssertionError("pickle has saved code")
"""


@pytest.mark.slow
def test_cloudpickle_saves_code_of_the_main_script_and_pickle_does_not(tmp_path):
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", Y)
    for script in (SCRIPT, OTHER_SCRIPT):
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
