import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from sktransfer.store.store import EmbeddingStore


def pytest_itemcollected(item):
    """Mark the cases of a parametrized test that `slow_cases` names as slow.

    A name is the id of a case, or some of its parts between hyphens.
    """
    marker = item.get_closest_marker("slow_cases")
    if marker and any(f"-{name}-" in f"-{item.callspec.id}-" for name in marker.args):
        item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(config, items):
    """Deselect tests that need a CUDA device if there is none."""
    if torch.cuda.is_available():
        return
    out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def hidden_cuda(request, monkeypatch):
    """Hide CUDA devices from all tests but those for them: results would differ in rounding."""
    if request.node.get_closest_marker("gpu") is None and torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts


@pytest.fixture(autouse=True, scope="session")
def torch_home(tmp_path_factory):
    """Write downloads and graphs to a temporary folder, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, with new worker processes, which keep the folder they start in."""
    get_reusable_executor().shutdown(wait=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def store(tmp_path):
    """Return an empty store."""
    store = EmbeddingStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def log(tmp_path):
    """Return the file in which `CountingTiny` counts."""
    return tmp_path / "images.log"
