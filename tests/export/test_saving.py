"""A saved model predicts the same, bit for bit, wherever it is loaded."""

import os
import re
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
from helpers import BOTH, DOMAIN, Bfloat16Tiny, Tiny, X, Y, all_outputs, domain_labels, images
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from skorch.callbacks import Callback
from torch.optim import SGD
from torchvision.transforms import v2

from sktransfer import (
    FineTunedImageClassifier,
    ModelFileError,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    load,
    save,
)

TEST = images(5, seed=3)
LITE = "efficientnet_lite0"


class OtherCode(Tiny):
    """The same weights, and another computation."""

    def forward(self, x):
        return super().forward(x) + 1


def extractor(backbone=LITE, **parameters):
    return PretrainedFeatureExtractor(backbone, **{"image_size": 32, "cache": None, **parameters})


def classifier(backbone=LITE, **parameters):
    defaults = {"image_size": 32, "unfreeze": (0, 1), "max_epochs": 1, "augment": None}
    defaults |= {"random_state": 0, "cache": None, "averaging": 0.5}
    return FineTunedImageClassifier(backbone, **{**defaults, **parameters})


def tiny(backbone=Tiny, **parameters):
    return classifier(backbone, unfreeze=(0, 1, 2), n_views=1, **parameters)


def with_code():
    """Fit a classifier with functions and classes that no other process can import."""

    class LocalSGD(SGD):
        pass

    class Locked(Callback):
        def __init__(self):
            self.lock = threading.Lock()  # cannot even be copied

    flip = v2.Compose([v2.Lambda(lambda image: image.flip(-1))])
    code = {"augment": flip, "optimizer": LocalSGD, "callbacks": [Locked()]}
    return classifier(n_views=1, **code).fit(X, Y)


def domains(estimator):
    return estimator.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)


def pipeline(first, *steps):
    return make_pipeline(first, *steps, LogisticRegression())


MODELS = {
    "extractor": lambda: extractor().fit(X),
    "extractor of layers": lambda: extractor(layer=["block1", "logits"], pooling="max").fit(X),
    "extractor of floats": lambda: extractor().fit(X / 255),
    "extractor with random weights": lambda: extractor(weights=None).fit(X),
    "adapted extractor": lambda: extractor(batch_norm="adapt").fit(X),
    "extractor with pandas output": lambda: extractor().set_output(transform="pandas").fit(X),
    "torchvision": lambda: extractor("resnet18", weights=None).fit(X),
    "classifier": lambda: classifier().fit(X, Y),
    "head only": lambda: classifier(unfreeze=0).fit(X, Y),
    "all blocks": lambda: classifier(unfreeze="all").fit(X, Y),
    "default parameters": lambda: FineTunedImageClassifier(image_size=32, random_state=0).fit(X, Y),
    "random weights": lambda: classifier("resnet18", weights=None, unfreeze="all").fit(X, Y),
    "two classes of numbers": lambda: classifier().fit(X, (Y == "cat").astype(int)),
    "adapted to a target": lambda: domains(classifier(batch_norm="adapt")),
    "self-trained": lambda: domains(SelfTrainedImageClassifier(classifier(), shares=[0.5])),
    "pipeline": lambda: pipeline(extractor(), StandardScaler(), PCA(5)).fit(X, Y),
    "pipeline with a gap": lambda: pipeline(extractor(), "passthrough").fit(X, Y),
    "nested pipeline": lambda: pipeline(make_pipeline(extractor(), StandardScaler())).fit(X, Y),
    "classifier in a pipeline": lambda: pipeline(classifier()).fit(X, Y),
    "frozen classifier": lambda: pipeline(FrozenEstimator(classifier().fit(X, Y))).fit(X, Y),
    "classifier as backbone": lambda: extractor(classifier().fit(X, Y)).fit(X),
    "frozen backbone": lambda: extractor(FrozenEstimator(classifier().fit(X, Y))).fit(X),
    "classifier with code": with_code,
    "tuned twice": lambda: classifier(classifier().fit(X, Y)).fit(X, Y == "cat"),
}


@pytest.fixture(scope="module")
def fitted():
    """Return a function that fits each model once."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = MODELS[name]()
        return models[name]

    return get


def assert_same(loaded, model, X=TEST):
    expected, outputs = all_outputs(model, X), all_outputs(loaded, X)
    assert outputs.keys() == expected.keys() != set()
    if "history_" in outputs:  # as text, numbers of NumPy are others
        del outputs["history_"], expected["history_"]
        assert loaded.history_ == model.history_
    for name, output in expected.items():
        np.testing.assert_array_equal(outputs[name], output, err_msg=name)


@pytest.mark.slow_cases(
    "False", "default parameters", "self-trained", "random weights", "tuned twice", "all blocks"
)
@pytest.mark.parametrize("standalone", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_predicts_the_same(fitted, name, standalone, tmp_path):
    model, path = fitted(name), tmp_path / "model.skt"
    save(model, path, standalone=standalone)
    loaded = load(path)
    assert type(loaded) is type(model)
    assert_same(loaded, model, TEST / 255 if name == "extractor of floats" else TEST)


def test_loaded_model_shows_no_progress(tmp_path, capsys):
    model = pipeline(extractor(verbose=1)).fit(X, Y)
    capsys.readouterr()
    save(model, tmp_path / "model.skt")
    load(tmp_path / "model.skt").predict(np.concatenate([X] * 10))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("path", [None, 3, FineTunedImageClassifier()])
def test_what_is_no_path_is_rejected(path, fitted):
    expected = rf"Got {type(path).__name__} as the path, .* as in save\(model, 'model.skt'\)"
    with pytest.raises(TypeError, match=expected):
        save(fitted("pipeline"), path)
    with pytest.raises(TypeError, match=expected):
        load(path)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("name", ["classifier", "extractor"])
def test_few_images_are_predicted_the_same(fitted, name, n, tmp_path):
    """A fitted model pads their batch for the store, which a loaded one does not use."""
    model = fitted(name)
    save(model, tmp_path / "model.skt")
    assert_same(load(tmp_path / "model.skt"), model, images(n, seed=50 + n))


@pytest.mark.slow_cases("self-trained", "classifier as backbone")
@pytest.mark.parametrize(
    "name", ["classifier", "self-trained", "pipeline", "classifier as backbone"]
)
def test_loaded_model_is_saved_again(fitted, name, tmp_path):
    model = fitted(name)
    save(model, tmp_path / "a.skt")
    save(load(tmp_path / "a.skt"), tmp_path / "b.skt")
    assert_same(load(tmp_path / "b.skt"), model)


def test_loaded_model_is_fitted_again(fitted, tmp_path):
    save(fitted("classifier"), tmp_path / "model.skt")
    again = clone(load(tmp_path / "model.skt")).set_params(cache=None).fit(X, Y)
    np.testing.assert_array_equal(
        again.predict_proba(TEST), fitted("classifier").predict_proba(TEST)
    )


@pytest.mark.slow_cases("True")
@pytest.mark.parametrize("standalone", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: extractor(Tiny).fit(X),
        lambda: tiny().fit(X, Y),
        lambda: tiny(Bfloat16Tiny).fit(X, Y),
        lambda: extractor(tiny().fit(X, Y)).fit(X),
        lambda: extractor(Tiny(), batch_norm="adapt").fit(X),
    ],
)
def test_users_own_network_is_passed_again(make, standalone, tmp_path):
    model, path = make(), tmp_path / "model.skt"
    own = model.backbone if not hasattr(model.backbone, "predict") else model.backbone.backbone
    name = own.__name__ if isinstance(own, type) else type(own).__name__
    with pytest.warns(UserWarning, match=rf"helpers.{name} is not saved.*backbone={name}\)"):
        save(model, path, standalone=standalone)
    assert_same(load(path, backbone=own), model)
    with pytest.raises(ModelFileError, match=rf"helpers\.{name}'.*load\(path, backbone="):
        load(path)
    with pytest.raises(ModelFileError, match="its network differs"):
        load(path, backbone=OtherCode)


@pytest.mark.parametrize("name", ["classifier", "classifier as backbone"])
def test_network_that_the_file_does_not_need_is_refused(fitted, tmp_path, name):
    save(fitted(name), tmp_path / "model.skt", standalone=False)
    for own, shown in ((Tiny, "Tiny"), (Tiny(), "Tiny"), ("resnet18", "'resnet18'")):
        message = (
            f"Got backbone={shown}, but expected no backbone: load itself builds the networks of "
            f"'{tmp_path / 'model.skt'}' ('{LITE}'); leave out backbone"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            load(tmp_path / "model.skt", backbone=own)


def test_weights_of_a_network_are_saved_once(fitted, tmp_path):
    save(fitted("classifier"), tmp_path / "one.skt")
    save(fitted("self-trained"), tmp_path / "two.skt")
    one, two = ((tmp_path / f"{name}.skt").stat().st_size for name in ("one", "two"))
    assert len(fitted("self-trained").estimators_) == 2
    assert two < 1.3 * one


def test_file_without_the_frozen_weights_is_small(fitted, tmp_path):
    save(fitted("head only"), tmp_path / "model.skt", standalone=False)
    assert (tmp_path / "model.skt").stat().st_size < 50_000


def test_equal_models_have_equal_files(fitted, tmp_path):
    for name in "ab":
        save(fitted("classifier"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_file_replaces_an_older_one_when_it_is_complete(fitted, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "model.skt"
    save(fitted("extractor"), path)
    before = path.read_bytes()

    def full(self, *arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        save(fitted("classifier"), path)
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_code_and_folders_of_this_machine_are_left_out(tmp_path):
    from torch.optim import AdamW

    settings = {"callbacks": [], "augment": lambda image: image, "optimizer": AdamW}
    model = classifier(**settings, cache=tmp_path / "store", checkpoint_dir=tmp_path, n_views=1)
    save(model.fit(X, Y), tmp_path / "model.skt")
    loaded = load(tmp_path / "model.skt")
    default = FineTunedImageClassifier()
    for name in (*settings, "checkpoint_dir"):
        assert getattr(loaded, name) == getattr(default, name)
    assert loaded.cache is None
    assert_same(loaded, model)


FRESH = """
import os, socket, sys
import numpy as np

def refuse(*arguments, **keywords):
    raise OSError("no network")

socket.socket.connect = socket.create_connection = refuse
from sktransfer import load
loaded = load(sys.argv[1])
X = np.load(sys.argv[2])
method = loaded.predict_proba if hasattr(loaded, "predict_proba") else loaded.transform
np.save(sys.argv[3], method(X))
"""


@pytest.mark.slow_cases("extractor", "pipeline", "self-trained", "classifier with code")
@pytest.mark.parametrize(
    "name", ["extractor", "classifier", "pipeline", "self-trained", "classifier with code"]
)
def test_fresh_process_without_network_predicts_the_same(fitted, name, tmp_path):
    model = fitted(name)
    save(model, tmp_path / "model.skt")
    np.save(tmp_path / "X.npy", TEST)
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    environment = {key: os.environ[key] for key in kept if key in os.environ}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(tmp_path / file) for file in ("model.skt", "X.npy", "out.npy")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, env=environment, cwd=work)
    method = model.predict_proba if hasattr(model, "predict_proba") else model.transform
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), method(TEST))
    assert not [*work.iterdir()]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (classifier(), NotFittedError, "not fitted"),
        (pipeline(extractor()), NotFittedError, "not fitted"),
        (GridSearchCV(LogisticRegression(), {}), TypeError, "GridSearchCV.*best_estimator_"),
        (make_union(extractor()), TypeError, "FeatureUnion with a PretrainedFeatureExtractor"),
        (object(), TypeError, "Got a object, but expected a FineTunedImageClassifier"),
        (Tiny(), TypeError, "Got a Tiny, but expected"),
    ],
)
def test_models_that_cannot_be_saved_are_refused(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save(model, tmp_path / "model.skt")
    assert not [*tmp_path.iterdir()]


def test_weights_that_are_not_finite_are_refused(fitted, tmp_path):
    model = classifier(unfreeze=0).fit(X, Y)
    model._tuned.weights["head.bias"][0] = np.nan
    with pytest.raises(ValueError, match=r"not finite in head\.bias"):
        save(model, tmp_path / "model.skt")


def test_parameter_without_a_form_in_a_file_is_named(tmp_path):
    model = classifier(unfreeze=0, class_weight={"cat": 2.0}).fit(X, Y)
    model.class_weight = {object(): 1}
    with pytest.raises(TypeError, match=r"class_weight=.*cannot be saved"):
        save(model, tmp_path / "model.skt")


def double(x):
    return 2 * x


def test_types_outside_of_scikit_learn_must_be_trusted(tmp_path):
    model, path = pipeline(extractor(), FunctionTransformer(double)).fit(X, Y), tmp_path / "a.skt"
    types = [f"{double.__module__}.double"]
    with pytest.warns(UserWarning, match=re.escape(f"trust them: load(path, trusted={types})")):
        save(model, path)
    with pytest.raises(ModelFileError, match=re.escape(f"types that are not trusted: {types}")):
        load(path)
    assert_same(load(path, trusted=types), model)


def test_errors_of_arguments_do_not_blame_the_file(tmp_path):
    def broken():
        raise RuntimeError("no memory")

    with pytest.warns(UserWarning, match="is not saved"):
        save(extractor(Tiny).fit(X), tmp_path / "model.skt")
    with pytest.raises(ValueError, match=r"^Got backbone=.*cannot be built \(RuntimeError: no "):
        load(tmp_path / "model.skt", backbone=broken)
    for trusted in (None, "mypackage.MyScaler", [3]):
        with pytest.raises(TypeError, match=r"^Got trusted=.*expected a list of names of types"):
            load(tmp_path / "model.skt", backbone=Tiny, trusted=trusted)
