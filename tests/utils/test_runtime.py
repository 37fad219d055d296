import contextlib
import multiprocessing
import types

import numpy as np
import pytest
import torch

from sktransfer.utils import runtime as _config
from sktransfer.utils.runtime import (
    resolve_device,
    resolve_precision,
    resolve_threads,
    torch_threads,
    training_precision,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that simulates CUDA and MPS devices."""

    def pretend(cuda=0, mps=False, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

        def supports(including_emulation=True):
            return bf16 or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supports)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def test_auto_device_is_the_fastest_available(machine):
    machine()
    assert resolve_device("auto") == CPU
    machine(mps=True)
    assert resolve_device("auto") == torch.device("mps")
    machine(cuda=1, mps=True)
    assert resolve_device("auto") == torch.device("cuda", 0)


def test_auto_device_spreads_workers_over_the_gpus(machine, monkeypatch):
    machine(cuda=2)
    indices = []
    for name in ("LokyProcess-1", "LokyProcess-2", "LokyProcess-3", "MainProcess"):
        process = types.SimpleNamespace(name=name)
        monkeypatch.setattr(multiprocessing, "current_process", lambda process=process: process)
        indices.append(resolve_device("auto").index)
    assert indices == [0, 1, 0, 0]
    assert [resolve_device("auto", worker).index for worker in (0, 1, 5)] == [0, 1, 1]
    for rank, index in [("1", 1), ("3", 1), ("2", 0), ("", 0)]:
        monkeypatch.setenv("LOCAL_RANK", rank)  # as torchrun does
        assert resolve_device("auto").index == index


def test_fork_of_a_process_that_uses_cuda_uses_the_cpu(machine, monkeypatch):
    machine(cuda=2)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert resolve_device("auto") == CPU
    assert resolve_device("cpu") == CPU
    for device in ("cuda", "cuda:1", CUDA):
        with pytest.raises(ValueError, match=r"^Got device='cuda.* was forked .* loky or with"):
            resolve_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_missing_device_is_rejected(machine, device):
    machine()
    with pytest.raises(ValueError, match=f"Got device='{device}', but this machine has no such"):
        resolve_device(device)


def test_device_by_number_is_resolved_or_rejected(machine):
    machine(cuda=2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="Got device='cuda:2', but this machine has no such"):
        resolve_device("cuda:2")


def test_auto_precision_follows_the_device(machine):
    machine(cuda=1)
    assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("auto", CUDA) == torch.float16
    assert resolve_precision("float32", CUDA) == torch.float32
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16


def test_training_precision_has_the_range_of_float32(machine):
    machine(cuda=1)
    assert training_precision(torch.float32, CUDA) == torch.float32
    assert training_precision(torch.float16, CUDA) == torch.bfloat16
    machine(cuda=1, bf16=False)
    assert training_precision(torch.float16, CUDA) == torch.float32
    assert training_precision(torch.bfloat16, CPU) == torch.bfloat16


def test_resolve_threads_counts_like_torch_and_joblib(monkeypatch):
    monkeypatch.setattr(_config.torch, "get_num_threads", lambda: 4)
    assert resolve_threads(None) == 4
    assert resolve_threads(3) == 3
    assert resolve_threads(-1) >= 1
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    assert resolve_threads(None) == resolve_threads(None, CPU) == 1
    assert resolve_threads(None, CUDA) == 4  # decodes images for the device


def test_a_number_of_threads_holds_where_joblib_starts_no_processes(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    with pytest.warns(UserWarning, match="n_jobs"):
        assert resolve_threads(-1) == 1
    assert resolve_threads(3) == 3


def test_torch_threads_are_set_and_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with torch_threads(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("n_jobs", [0, "all", 1.5, True, 10**9, float("nan"), [1], np.float64(2)])
def test_resolve_threads_rejects_invalid_numbers(n_jobs):
    with pytest.raises(ValueError, match=r"^Got n_jobs=.*number of threads from 1 to 1,024, a neg"):
        resolve_threads(n_jobs)


@pytest.mark.parametrize(("n_jobs", "threads"), [(1, 1), (3, 3), (np.int64(2), 2), (-10_000, 1)])
def test_resolve_threads_accepts_integers(n_jobs, threads):
    assert resolve_threads(n_jobs) == threads


@pytest.mark.parametrize("device", [0, None, True, "", "gpu", "cuda:x", 1.5, ["cpu"]])
def test_resolve_device_rejects_unknown_devices(device):
    with pytest.raises(ValueError, match=r"^Got device=.*, but expected 'auto', 'cpu', 'cuda', 'c"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("device", "mps", "meant"),
    [
        ("gpu", False, "'cuda'"),
        ("GPU", False, "'cuda'"),
        ("gpu:0", False, "'cuda'"),
        ("gpu", True, "'mps'"),
        ("cuda0", False, "'cuda:0'"),
        ("cuda:x", False, "'cuda:0'"),
        ("cude", False, "'cuda'"),
        ("aut", False, "'auto'"),
        ("tpu", False, "'cpu'"),
        ("zzz", False, None),
        (1.5, False, None),
        ("", False, None),
    ],
)
def test_error_about_a_device_suggests_the_one_that_is_meant(machine, device, mps, meant):
    machine(mps=mps)
    with pytest.raises(ValueError, match=r"^Got device=") as caught:
        resolve_device(device)
    ending = "" if meant is None else f"; did you mean {meant}?"
    assert str(caught.value).endswith(f"'cuda:0' or 'mps'{ending}")
