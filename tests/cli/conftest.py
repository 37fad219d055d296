import pytest
from cli_helpers import QUICK, run, save_classes


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
