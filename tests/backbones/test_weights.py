import time

import pytest
import torch
from helpers import unreachable
from safetensors.torch import save_file

from sktransfer.backbones import weights
from sktransfer.utils.errors import WeightsNotFoundError

URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_load_state_dict_reads_every_file_format(tmp_path, suffix, wrapper):
    state = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)}
    path = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    got = weights.load_state_dict(path)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) for name in state)


class Trap:
    """Runs code when it is unpickled."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_load_state_dict_runs_no_code_of_the_file(tmp_path):
    path = tmp_path / "trap.pth"
    torch.save({"weight": Trap()}, path)
    with pytest.raises(ValueError, match="could not be read as a state dict"):
        weights.load_state_dict(path)
    assert not Trap.sprung


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3}, {"weight": "text"}])
def test_load_state_dict_rejects_other_content(tmp_path, content):
    path = tmp_path / "file.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"but expected a state dict \(names to tensors\)"):
        weights.load_state_dict(path)


def test_load_state_dict_names_a_missing_file(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"no such file \(looked in .*nowhere\)"):
        weights.load_state_dict(tmp_path / "nowhere" / "model.pth")


def test_load_state_dict_rejects_a_damaged_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="could not be read as a state dict"):
        weights.load_state_dict(path)


def test_fetch_returns_the_file_of_the_hub_folder(hub):
    hub.mkdir(parents=True)
    (hub / "resnet18-f37072fd.pth").write_bytes(b"here")
    assert weights.fetch(URL, "resnet18") == hub / "resnet18-f37072fd.pth"


def test_fetch_offline_raises_before_the_connection_times_out(hub, monkeypatch):
    # A name that never resolves and an address that never answers are the two ways to be offline.
    monkeypatch.setattr(weights.socket, "create_connection", unreachable)
    start = time.perf_counter()
    with pytest.raises(WeightsNotFoundError) as caught:
        weights.fetch(URL, "resnet18")
    assert weights.REACH_SECONDS < 1
    assert time.perf_counter() - start < 15, "it waited for the answer"
    assert str(caught.value) == (
        "The weights of 'resnet18' are not on this machine: resnet18-f37072fd.pth is not in "
        f"{hub}, and download.pytorch.org cannot be reached to download it. On a machine "
        f"with a network, download {URL} and put it there, or pass its path "
        "(weights='resnet18-f37072fd.pth'); or use random values (weights=None), or the backbone "
        "whose weights come with the installation (backbone='efficientnet_lite0')"
    )


def test_fetch_downloads_to_the_hub_folder_and_checks_the_hash(hub, monkeypatch):
    request = {}

    def download(url, target, hash_prefix):
        request.update(url=url, hash_prefix=hash_prefix)
        with open(target, "wb") as file:
            file.write(b"weights")

    monkeypatch.setattr(weights, "_reachable", lambda url: True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert weights.fetch(URL, "resnet18").read_bytes() == b"weights"
    assert request == {"url": URL, "hash_prefix": "f37072fd"}


def test_failed_download_raises_an_error_that_names_the_remedy(hub, monkeypatch):
    def download(url, target, hash_prefix):
        raise OSError("connection reset")

    monkeypatch.setattr(weights, "_reachable", lambda url: True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(WeightsNotFoundError, match=r"failed \(connection reset\)\. Download https"):
        weights.fetch(URL, "resnet18")


def test_reachability_is_tested_at_the_proxy(monkeypatch):
    addresses = []

    class Open:
        def close(self):
            pass

    def connect(address, timeout):
        addresses.append(address)
        return Open()

    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setattr(weights.socket, "create_connection", connect)
    assert weights._reachable(URL)
    assert addresses == [("proxy.example", 3128)]


def test_digest_tensors_depends_on_every_bit_name_and_shape():
    state = {"a": torch.zeros(2, 3), "b": torch.tensor(1, dtype=torch.int64)}
    variants = [
        state,
        {**state, "a": torch.zeros(3, 2)},
        {**state, "a": torch.zeros(2, 3).bfloat16()},
        {**state, "a": torch.full((2, 3), 1e-45)},
        {"c": state["a"], "b": state["b"]},
        {**state, "b": torch.tensor(2)},
    ]
    digests = {weights.digest_tensors(variant.items()) for variant in variants}
    assert len(digests) == len(variants)
    assert weights.digest_tensors(state.items(), "code") not in digests
    strided = {**state, "a": torch.zeros(3, 2).T}
    assert weights.digest_tensors(strided.items()) == weights.digest_tensors(state.items())
