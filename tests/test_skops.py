"""skops saves and loads all estimators; they predict the same, bit for bit, in a new process."""

import pickle
import subprocess
import sys
from pathlib import Path

import helpers
import joblib
import numpy as np
import pytest
from helpers import BOTH, DOMAIN, Bfloat16Tiny, Tiny, X, Y, all_outputs, domain_labels, images
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

from sktransfer import (
    EmbeddingStore,
    FineTunedImageClassifier,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
)

sio = pytest.importorskip("skops.io")

TEST = images(5, seed=3)


def extractor(backbone="efficientnet_lite0", **parameters):
    return PretrainedFeatureExtractor(backbone, **{"image_size": 32, "cache": None, **parameters})


def classifier(backbone="efficientnet_lite0", **parameters):
    defaults = {"image_size": 32, "unfreeze": (0, 1), "max_epochs": 1, "augment": None}
    defaults |= {"random_state": 0, "cache": None}
    return FineTunedImageClassifier(backbone, **{**defaults, **parameters})


def tiny(**parameters):
    return classifier(Tiny, unfreeze=(0, 1, 2), augment="light", n_views=1, **parameters)


def domains(estimator):
    return estimator.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)


def with_broken_image():
    return extractor(on_error="nan").fit([*TEST, "gone.png"])


ESTIMATORS = {
    "unfitted": lambda: extractor(),
    "extractor": lambda: extractor().fit(X),
    "extractor of layers": lambda: extractor(layer=["block1", "logits"], pooling="max").fit(X),
    "extractor of floats": lambda: extractor().fit(X / 255),
    "adapted extractor": lambda: extractor(batch_norm="adapt").fit(X),
    "extractor with a class": lambda: extractor(Tiny, batch_norm="adapt").fit(X),
    "extractor with a path": lambda: extractor(cache=Path("kept")).fit(X),
    "extractor with a store": lambda: extractor(cache=EmbeddingStore("kept")).fit(X),
    "extractor with a broken image": with_broken_image,
    "head": lambda: classifier(unfreeze=0).fit(X, Y),
    "classifier": lambda: classifier().fit(X, Y),
    "classifier with validation": lambda: tiny(early_stopping=True).fit(X, Y),
    "classifier of numbers": lambda: tiny(batch_norm="train", mixup=0.3).fit(X, np.arange(60) % 4),
    "adapted classifier": lambda: tiny(batch_norm="adapt").fit(X, Y),
    "classifier in bfloat16": lambda: classifier(Bfloat16Tiny, batch_norm="adapt").fit(X, Y),
    "matched classifier": lambda: domains(tiny(batch_norm="adapt", domain_adversarial=0.5)),
    "self-trained classifier": lambda: domains(SelfTrainedImageClassifier(tiny(), shares=[0.5])),
    "tuned backbone": lambda: extractor(FrozenEstimator(tiny().fit(X, Y))).fit(X),
    "pipeline": lambda: make_pipeline(
        extractor(), StandardScaler(), LogisticRegression(max_iter=2000)
    ).fit(X, Y),
    "pipeline with a union": lambda: make_pipeline(
        make_union(extractor(), extractor(batch_norm="adapt")), LogisticRegression(max_iter=2000)
    ).fit(X, Y),
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Fit all estimators once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fitted"))
        yield {name: make() for name, make in ESTIMATORS.items()}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_file_names_only_known_types(fitted, name):
    """Whoever loads a file reads the list of its types, so it should be short and clear."""
    types = set(sio.get_untrusted_types(data=sio.dumps(fitted[name])))
    own = {"helpers.Tiny", "helpers.Bfloat16Tiny", "pathlib.PosixPath", "pathlib._local.PosixPath"}
    assert {kind for kind in types - own if not kind.startswith("sktransfer.")} == set()


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import skops.io as sio
from helpers import all_outputs
X = np.load("X.npy")
for number in range(int(sys.argv[2])):
    file = f"{number}.skops"
    loaded = sio.load(file, trusted=sio.get_untrusted_types(file=file))
    np.savez(f"{number}.npz", **all_outputs(loaded, X))
"""


@pytest.mark.slow
def test_estimators_predict_the_same_in_a_new_process(fitted, tmp_path):
    np.save(tmp_path / "X.npy", TEST)
    for number, estimator in enumerate(fitted.values()):
        sio.dump(estimator, tmp_path / f"{number}.skops")
    arguments = [str(Path(helpers.__file__).parent), str(len(fitted))]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=tmp_path)
    for number, (name, estimator) in enumerate(fitted.items()):
        expected = all_outputs(estimator, TEST)
        with np.load(tmp_path / f"{number}.npz") as got:
            assert set(got) == set(expected), name
            for method, values in expected.items():
                np.testing.assert_array_equal(got[method], values, f"{name}, {method}")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_loaded_estimator_is_as_the_saved_one(fitted, name):
    saved = sio.dumps(fitted[name])
    loaded = sio.loads(saved, trusted=sio.get_untrusted_types(data=saved))
    assert repr(loaded) == repr(fitted[name])
    assert repr(clone(loaded)) == repr(clone(fitted[name]))
    copied = pickle.loads(pickle.dumps(loaded))
    for method, values in all_outputs(fitted[name], TEST).items():
        np.testing.assert_array_equal(all_outputs(copied, TEST)[method], values)


@pytest.mark.filterwarnings("ignore:.*Any type hint:UserWarning")  # of MLflow about its own code
@pytest.mark.parametrize("name", ["pipeline", "classifier", "self-trained classifier"])
def test_mlflow_saves_and_loads_in_its_default_format(fitted, tmp_path, name):
    mlflow = pytest.importorskip("mlflow.sklearn")
    types = sio.get_untrusted_types(data=sio.dumps(fitted[name]))
    options = {"serialization_format": "skops", "skops_trusted_types": types}
    requirements = {"pip_requirements": ["sktransfer"]}
    mlflow.save_model(fitted[name], str(tmp_path / "model"), **options, **requirements)
    loaded = mlflow.load_model(str(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.predict_proba(TEST), fitted[name].predict_proba(TEST))


@pytest.mark.parametrize("make", [extractor, classifier])
@pytest.mark.parametrize("backbone", [Tiny(), Bfloat16Tiny()])
def test_module_is_refused_with_a_remedy_and_pickled(tmp_path, make, backbone):
    estimator = make(backbone)
    message = f"Got a {type(backbone).__name__} as backbone, but skops cannot save a torch module"
    for saved in (estimator, make_pipeline(estimator), FrozenEstimator(estimator)):
        with pytest.raises(TypeError, match=message):
            sio.dumps(saved)
    joblib.dump(estimator, tmp_path / "estimator.joblib")
    for copied in (
        clone(estimator),
        pickle.loads(pickle.dumps(estimator)),
        joblib.load(tmp_path / "estimator.joblib"),
    ):
        assert isinstance(copied.backbone, type(backbone))


def test_state_holds_bits_of_bfloat16(fitted):
    weights = fitted["classifier in bfloat16"]._tuned.weights
    dtypes = {array.dtype.names for array in weights.values()}
    assert dtypes == {None, ("bfloat16",)}


@pytest.mark.parametrize("name", ["head", "classifier", "classifier in bfloat16", "pipeline"])
def test_joblib_maps_the_arrays_of_a_file_into_memory(fitted, tmp_path, name):
    joblib.dump(fitted[name], tmp_path / "model.joblib")
    loaded = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
    np.testing.assert_array_equal(loaded.predict_proba(TEST), fitted[name].predict_proba(TEST))
