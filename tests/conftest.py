import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from sktransfer.store.store import EmbeddingStore


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True, scope="session")
def torch_home(tmp_path_factory):
    """Keep what torch and the engines keep out of the user's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder of the test's own, and so do worker processes, which keep theirs."""
    get_reusable_executor().shutdown(wait=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def store(tmp_path):
    """Give a store of its own to a test that counts."""
    store = EmbeddingStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def log(tmp_path):
    """Give the file in which `CountingTiny` counts."""
    return tmp_path / "images.log"
