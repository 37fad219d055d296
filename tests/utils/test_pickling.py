"""Code that other programs cannot load is named when an estimator is saved, and only then."""

import copy
import functools
import io
import multiprocessing.reduction
import pickle
import re
import sys
import threading
import types
import warnings

import cloudpickle
import joblib
import numpy as np
import pytest
import torch
from helpers import Tiny, X
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torchvision.transforms import v2

from sktransfer import (
    EmbeddingStore,
    FineTunedImageClassifier,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
)
from sktransfer.utils.pickling import check_other_programs_can_load


def dump_with_skops(estimator):
    return pytest.importorskip("skops.io").dumps(estimator)


SAVE = {
    "pickle": pickle.dumps,
    "old pickle": functools.partial(pickle.dumps, protocol=0),
    "pickle in Python": pickle._dumps,
    "joblib": lambda estimator: joblib.dump(estimator, io.BytesIO()),
    "torch": lambda estimator: torch.save(estimator, io.BytesIO()),
    "skops": dump_with_skops,
}
# These save code too, or copy and hash estimators within one program and its workers.
COPY = {
    "clone": clone,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "cloudpickle": cloudpickle.dumps,
    "multiprocessing": multiprocessing.reduction.ForkingPickler.dumps,
}


def local_function(image):
    def flip(image):
        return image.flip(-1)

    return flip


def local_class():
    class Local(torch.optim.SGD):
        pass

    return Local


CODE = {
    "lambda": ("augment", lambda image: image, "<lambda>"),
    "partial": ("augment", functools.partial(lambda image: image), "<lambda>"),
    "transform": ("augment", v2.Compose([v2.Lambda(lambda image: image)]), "<lambda>"),
    "local function": ("augment", local_function(None), "local_function.<locals>.flip"),
    "local class": ("optimizer", local_class(), "local_class.<locals>.Local"),
    "callback": ("callbacks", [("mine", lambda net: None)], "<lambda>"),
    "backbone": ("backbone", lambda: Tiny(), "<lambda>"),
}


@pytest.fixture
def of_main(monkeypatch):
    """Return a class that the main script seems to define."""
    kind = type("Small", (Tiny,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Small", kind, raising=False)
    return kind


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("kind", CODE)
def test_parameter_with_code_that_cannot_be_saved_is_named(kind, save):
    parameter, value, code = CODE[kind]
    estimator = FineTunedImageClassifier().set_params(**{parameter: value})
    kept = "saves its weights" if parameter == "backbone" else "leaves it out"
    message = (
        rf"Got {parameter}=.*, which pickle, joblib and skops cannot save: .*\. They save code by "
        rf"the name by which it is imported\. Define {re.escape(code)} in a module that you "
        rf"import, or save the model with cloudpickle\.dump or with sktransfer\.save, which {kept}$"
    )
    with pytest.raises(pickle.PicklingError, match=message):
        SAVE[save](estimator)


@pytest.mark.parametrize(
    "wrap",
    [
        make_pipeline,
        FrozenEstimator,
        SelfTrainedImageClassifier,
        functools.partial(GridSearchCV, param_grid={}),
        lambda estimator: PretrainedFeatureExtractor(FrozenEstimator(estimator)),
    ],
)
def test_estimator_within_another_names_its_parameter(wrap):
    with pytest.raises(pickle.PicklingError, match=r"Got augment=<function .*<lambda> at"):
        pickle.dumps(wrap(FineTunedImageClassifier(augment=lambda image: image)))


def test_object_that_is_no_code_has_no_remedy_for_code():
    message = (
        r"Got callbacks=\[<unlocked .*, which pickle, joblib and skops cannot save: cannot pickle "
        r"'_thread\.lock' object\. Save the model with sktransfer\.save, which leaves it out$"
    )
    with pytest.raises(pickle.PicklingError, match=message):
        pickle.dumps(FineTunedImageClassifier(callbacks=[threading.Lock()]))


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("kind", ["class", "module"])
def test_code_of_the_main_script_is_named_in_a_warning(of_main, kind, save):
    if (kind, save) == ("module", "skops"):
        pytest.skip("skops refuses modules")
    estimator = PretrainedFeatureExtractor(of_main if kind == "class" else of_main())
    message = (
        r"Got backbone=.*Small.*, but only a program that defines Small in its own main script or "
        r"notebook can load this file\. Define Small in a module that you import, or save the "
        r"model with cloudpickle\.dump or with sktransfer\.save, which saves its weights$"
    )
    with pytest.warns(UserWarning, match=message):
        SAVE[save](estimator)


def test_warning_points_to_the_line_that_saves(of_main):
    with pytest.warns(UserWarning, match="Got backbone=") as caught:
        pickle.dumps(PretrainedFeatureExtractor(of_main))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("method", ["clone", "copy", "deepcopy", "cloudpickle"])
@pytest.mark.parametrize("kind", CODE)
def test_code_is_copied_and_sent_to_workers(kind, method):
    parameter, value, _ = CODE[kind]
    COPY[method](FineTunedImageClassifier().set_params(**{parameter: value}))


def test_dill_saves_code():
    dill = pytest.importorskip("dill")
    loaded = dill.loads(dill.dumps(FineTunedImageClassifier(augment=lambda image: image + 1)))
    assert loaded.augment(1) == 2


@pytest.mark.parametrize("method", COPY)
def test_code_of_the_main_script_is_copied_without_a_warning(of_main, method):
    estimator = make_pipeline(PretrainedFeatureExtractor(of_main))
    COPY[method](estimator)
    assert joblib.hash(estimator) == joblib.hash(clone(estimator))


def test_subclass_with_a_state_of_its_own_is_copied():
    class Counted(FineTunedImageClassifier):
        def __getstate__(self):
            return {**super().__getstate__(), "copies": 1}

        def __reduce_ex__(self, protocol):
            return super().__reduce_ex__(protocol)

    copied = copy.deepcopy(Counted(augment=lambda image: image))
    assert copied.copies == 1
    with pytest.raises(pickle.PicklingError, match="Got augment=<function"):
        pickle.dumps(Counted(augment=lambda image: image))


def test_library_code_raises_and_warns_of_nothing(tmp_path):
    estimator = FineTunedImageClassifier(
        Tiny(),
        augment=v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter()]),
        optimizer=torch.optim.AdamW,
        cache=EmbeddingStore(tmp_path),
        class_weight={"cat": np.float64(2)},
        random_state=np.random.RandomState(0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pickle.loads(pickle.dumps(estimator))
    assert repr(loaded.augment) == repr(estimator.augment)


def test_weights_are_not_pickled_to_look_for_code(monkeypatch):
    def refuse(self, protocol):
        raise AssertionError("a tensor is pickled")

    module = Tiny()
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", refuse)
    monkeypatch.setattr(torch.nn.Parameter, "__reduce_ex__", refuse)
    check_other_programs_can_load({"backbone": module})
    with pytest.raises(AssertionError):
        pickle.dumps(module)


@pytest.mark.slow
def test_search_with_workers_takes_a_lambda():
    search = GridSearchCV(
        FineTunedImageClassifier(
            Tiny,
            unfreeze=(0, 1),
            max_epochs=1,
            n_views=1,
            augment=lambda image: image.flip(-1),
            cache=None,
            random_state=0,
        ),
        {"lr": [0.001, 0.003]},
        cv=2,
        n_jobs=2,
        error_score="raise",
    )
    search.fit(X, np.arange(len(X)) % 2)
    assert search.best_estimator_.augment is search.estimator.augment
    with pytest.raises(pickle.PicklingError, match=r"Got augment=<function .*<lambda> at"):
        pickle.dumps(search)


class Wordy:
    """It cannot be pickled, and has a repr without a space."""

    def __init__(self, text):
        self.function, self.text = lambda image: image, text

    def __repr__(self):
        if not self.text:
            raise ValueError("no repr")
        return self.text


@pytest.mark.parametrize(
    ("text", "shown"), [("W" * 200, "Got augment=WWW"), ("", "Got augment=a Wordy")]
)
def test_parameter_is_named_whatever_its_repr(text, shown):
    with pytest.raises(pickle.PicklingError, match=f"^{shown}"):
        pickle.dumps(FineTunedImageClassifier(augment=Wordy(text)))


@pytest.mark.parametrize("module", ["mypackage.distributed", "mypackage.pool", "copying"])
def test_modules_of_users_with_names_like_those_of_libraries_are_checked(module):
    user = types.ModuleType(module)
    exec("import pickle\ndef save(estimator): return pickle.dumps(estimator)", user.__dict__)
    with pytest.raises(pickle.PicklingError, match=r"^Got augment=.*<lambda>"):
        user.save(FineTunedImageClassifier(augment=lambda image: image))


def test_hashing_of_dask_is_no_saving(of_main, recwarn):
    tokenize = pytest.importorskip("dask.base").tokenize
    tokenize(PretrainedFeatureExtractor(of_main))
    assert not [w for w in recwarn if "can load this file" in str(w.message)]
