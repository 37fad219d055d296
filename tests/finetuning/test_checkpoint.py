import math
import os
import pickle

import pytest
import torch

from sktransfer.finetuning.checkpoint import load_checkpoint, save_checkpoint

CONTENT = {
    "seed": 2**62,
    "loss": math.inf,
    "nothing": None,
    "reports": [{"stage": "head", "blocks": ["a", "b"], "C": 0.1, "early": True}],
    "pair": (1, 2.5),
    "weights": {"head.weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "0123abcd.pt"


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def assert_whole(path, content=CONTENT):
    loaded = load_checkpoint(path)
    assert loaded.keys() == content.keys()
    for name, tensor in content["weights"].items():
        assert loaded["weights"][name].dtype == tensor.dtype
        assert torch.equal(loaded["weights"][name], tensor)
    for name in content.keys() - {"weights"}:
        assert loaded[name] == content[name]


def test_checkpoint_round_trip_is_lossless(path):
    save_checkpoint(path, CONTENT)
    assert_whole(path)
    assert names(path) == ["0123abcd.pt"]


def test_save_checkpoint_replaces_an_older_file(path):
    save_checkpoint(path, CONTENT)
    newer = {**CONTENT, "seed": 1, "weights": {"head.weight": torch.zeros(2)}}
    save_checkpoint(path, newer)
    assert_whole(path, newer)
    assert names(path) == ["0123abcd.pt"]


def test_load_checkpoint_returns_none_without_a_file(path):
    assert load_checkpoint(path) is None
    path.parent.mkdir()
    assert load_checkpoint(path) is None
    save_checkpoint(path.with_name("other.pt"), CONTENT)
    assert load_checkpoint(path) is None


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_save_keeps_the_old_file(path, monkeypatch, error):
    save_checkpoint(path, CONTENT)

    def breaks_off(content, file):
        file.write(b"half of it")
        assert_whole_but_for_leftovers(path)
        raise error("No space left on device")

    def assert_whole_but_for_leftovers(path):
        assert torch.load(path, weights_only=True)["seed"] == CONTENT["seed"]

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", breaks_off)
        with pytest.raises(error):
            save_checkpoint(path, {**CONTENT, "seed": 1})
    assert_whole(path)
    assert names(path) == ["0123abcd.pt"]


def test_interrupted_first_save_leaves_no_file(path, monkeypatch):
    def breaks_off(content, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", breaks_off)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, CONTENT)
    assert load_checkpoint(path) is None
    assert names(path) == []


def test_save_checkpoint_syncs_before_it_replaces_the_old_file(path, monkeypatch):
    save_checkpoint(path, CONTENT)
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    save_checkpoint(path, CONTENT)
    assert done == ["fsync", "replace"]


def test_load_checkpoint_removes_only_leftovers_of_dead_processes(path):
    save_checkpoint(path, CONTENT)
    other_files = ["0123abcd.txt", "0123abcde.77.tmp", "other.77.tmp", "0123abcd.pt.bak"]
    for name in ["0123abcd.9999998.tmp", "0123abcd.9999999.tmp", *other_files]:
        (path.parent / name).write_bytes(b"half")
    assert_whole(path)
    assert names(path) == sorted(["0123abcd.pt", *other_files])


def test_loaded_tensors_are_on_the_cpu_and_share_no_memory(path):
    tensor = torch.ones(3)
    save_checkpoint(path, {"weights": tensor})
    tensor.zero_()
    loaded = load_checkpoint(path)["weights"]
    assert loaded.device.type == "cpu"
    assert loaded.tolist() == [1, 1, 1]


class Evil:
    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_load_checkpoint_runs_no_code_of_the_file(path, tmp_path, kind):
    path.parent.mkdir()
    content = {**CONTENT, "loss": Evil(tmp_path / "proof")}
    if kind == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["loss"], protocol=2))
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "proof").exists()
