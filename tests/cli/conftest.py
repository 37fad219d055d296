import pickle

import pytest
from cli_helpers import QUICK, run, save_classes

import sktransfer


def _save(model, path):
    path.write_bytes(pickle.dumps(model))


def _load(path, *, backbone=None):
    return pickle.loads(path.read_bytes())


@pytest.fixture(autouse=True, scope="session")
def stand_ins():
    """Stand-ins for functions that are being written, where they are missing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in {"save": _save, "load": _load}.items():
            if name not in sktransfer.__all__:
                patch.setattr(sktransfer, name, function, raising=False)
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Return a folder with three classes of 8 images."""
    return save_classes(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def model(photos, tmp_path_factory):
    """Return a model that the command train has saved."""
    path = tmp_path_factory.mktemp("models") / "model.skt"
    run("train", photos, "-o", path, *QUICK)
    return path
