"""Device, precision, threads, random state and memory of a process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import platform
import re
import threading
from collections.abc import Iterator
from numbers import Integral

import joblib
import torch

from sktransfer.utils.config import TUNE_MALLOC
from sktransfer.utils.errors import check_choice, did_you_mean

# More threads are never faster, and each one needs memory.
_MAX_THREADS = 1024
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Constants of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_IMPORTING_PID = os.getpid()

# Held by code that seeds or uses the random generators of the whole process.
GLOBAL_GENERATORS = threading.RLock()


def is_fork() -> bool:
    """Return whether this process was forked after torch was imported; it lacks torch's threads."""
    return os.getpid() != _IMPORTING_PID


def limit_threads_after_fork() -> None:
    """Limit torch to one thread in a process that was forked after torch started its threads.

    The threads do not survive the fork, so torch would deadlock with more than one.
    """
    if is_fork() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


@contextlib.contextmanager
def seeded(seed: int = 0, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's generator of the CPU, and restore its state on exit.

    The state of `device` is restored, too, but the caller must seed it.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would also seed the generators of all GPUs.
        torch.default_generator.manual_seed(seed)
        yield


@functools.cache
def tune_malloc() -> None:
    """Let the C library keep the memory that tensors free; once in a process.

    Feature maps are large, so glibc would request each one from the system and return it, and
    clearing new pages would take most of the time. The setting applies to the whole process, from
    the first run of a network on the CPU. ``SKTRANSFER_TUNE_MALLOC=0`` in the environment turns it
    off.
    """
    if TUNE_MALLOC.get() == "0" or platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, 2**30)
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Let torch use a number of threads of the CPU; None leaves it as it is."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def resolve_device(device: str | torch.device, worker: int | None = None) -> torch.device:
    """Resolve the device in the process that uses it.

    Parameters
    ----------
    device : str or torch.device
        `"auto"` is a CUDA device if available, else Apple's MPS, else the CPU. Workers of a
        parallel search, and processes that torchrun or Accelerate has started, are spread over the
        visible CUDA devices. A process that was forked from one
        that uses CUDA cannot use it, so there it is the CPU.
    worker : int or None
        Index of this worker; None is that in the name of a process of joblib or multiprocessing.

    Raises
    ------
    ValueError
        If the device is unknown or not available.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available() and not _is_forked_from_cuda():
            number = _worker_number() if worker is None else worker
            return torch.device("cuda", number % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    names = ("auto", "cpu", "cuda", "cuda:0", "mps")
    gpu = "mps" if torch.backends.mps.is_available() else "cuda"
    meant = gpu if isinstance(device, str) and "gpu" in device.lower() else device
    unknown = ValueError(
        f"Got device={device!r}, but expected 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'"
        f"{did_you_mean(meant, names)}"
    )
    if not isinstance(device, str | torch.device):
        raise unknown
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise unknown from error
    if resolved.type == "cuda" and _is_forked_from_cuda():
        raise ValueError(
            f"Got device={str(device)!r} in a process that was forked from one that uses CUDA, but "
            "CUDA does not work after a fork; start processes with joblib's loky or with "
            "multiprocessing.get_context('spawn'), or set device='cpu'"
        )
    missing = {
        "cuda": not torch.cuda.is_available() or (resolved.index or 0) >= torch.cuda.device_count(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing.get(resolved.type, False):
        raise ValueError(
            f"Got device={str(device)!r}, but this machine has no such device; "
            "device='auto' takes the fastest one available"
        )
    return resolved


def differ(first: torch.device, second: torch.device) -> bool:
    """Return whether two devices differ; a missing index means 0."""
    return (first.type, first.index or 0) != (second.type, second.index or 0)


def _is_forked_from_cuda() -> bool:
    """Return whether CUDA was used before this process was forked; torch then refuses it."""
    return torch.cuda._is_in_bad_fork()


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Resolve the compute dtype.

    Parameters
    ----------
    precision : {"auto", "float32", "bfloat16", "float16"}
        `"auto"` is float16 on CUDA, where it is as fast as bfloat16 and 8 times as precise, and
        float32 on other devices.
    device : torch.device

    Examples
    --------
    >>> resolve_precision("auto", torch.device("cpu"))
    torch.float32
    """
    check_choice("precision", precision, ["auto", *PRECISIONS])
    if precision != "auto":
        return PRECISIONS[precision]
    return torch.float16 if device.type == "cuda" else torch.float32


def training_precision(precision: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the compute dtype for training: float16 would lose small gradients.

    Examples
    --------
    >>> training_precision(torch.float32, torch.device("cpu"))
    torch.float32
    """
    if precision == torch.float32:
        return torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):  # the function reports on the current device
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.float32
    return torch.bfloat16


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Compute in mixed precision if `precision` is less than float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


_float32_lock = threading.Lock()
_float32_users = 0
_float32_before: list[str] = []


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 with all bits on a CUDA device, not in TF32.

    The setting belongs to the whole process; it is restored when no thread needs it any more.
    """
    global _float32_users
    if device.type != "cuda":
        yield
        return
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    with _float32_lock:
        if _float32_users == 0:
            _float32_before[:] = [setting.fp32_precision for setting in settings]
            for setting in settings:
                setting.fp32_precision = "ieee"
        _float32_users += 1
    try:
        yield
    finally:
        with _float32_lock:
            _float32_users -= 1
            if _float32_users == 0:
                for setting, before in zip(settings, _float32_before, strict=True):
                    setting.fp32_precision = before


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Return the free memory of a CUDA device, in bytes."""
    return int(torch.cuda.mem_get_info(device)[0])


def resolve_threads(n_jobs: int | None, device: torch.device | None = None) -> int:
    """Resolve the number of threads that read images and, on a CPU, run the network.

    Parameters
    ----------
    n_jobs : int or None
        As in joblib: -1 is one thread per core. `None` is as many threads as torch uses, and one
        thread in a worker of a parallel search on the CPU.
    device : torch.device or None
        None means the CPU. A worker that computes on another device has its share of the cores
        to decode images.

    Raises
    ------
    ValueError
        If it is 0, or neither an integer nor None.
    """
    is_integer = isinstance(n_jobs, Integral) and not isinstance(n_jobs, bool)
    if n_jobs is not None and (not is_integer or n_jobs == 0 or n_jobs > _MAX_THREADS):
        raise ValueError(
            f"Got n_jobs={n_jobs!r}, but expected a number of threads from 1 to {_MAX_THREADS:,}, "
            "a negative integer (-1 is one thread per core), or None"
        )
    if n_jobs is None:
        worker = multiprocessing.parent_process() is not None
        on_cpu = device is None or device.type == "cpu"
        return 1 if worker and on_cpu else torch.get_num_threads()
    # joblib would return 1 in a worker of Dask, which must start no processes, but may use threads.
    return int(n_jobs) if n_jobs > 0 else max(1, joblib.effective_n_jobs(int(n_jobs)))


def _worker_number() -> int:
    """Return the index of a worker of a pool or of a launcher, or 0 in other processes."""
    rank = os.environ.get("LOCAL_RANK", "")  # of torchrun and Accelerate
    if rank.isdecimal():
        return int(rank)
    number = re.search(r"(\d+)$", multiprocessing.current_process().name)
    return int(number.group(1)) - 1 if number else 0
