"""A cache of networks that is bounded by memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch

T = TypeVar("T")

# Share of a device's memory that one cache may keep, and the smallest limit.
_MEMORY_SHARE = 1 / 8
_MIN_LIMIT = 2**30
# Assumed if the system does not report its memory.
_USUAL_MEMORY = 2**33
# Files with the memory limit of a container, in versions 2 and 1 of Linux control groups.
_CONTAINER_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


_CPU = torch.device("cpu")


class _Entry(NamedTuple):
    value: Any
    n_bytes: int
    device: torch.device


class MemoryCache(Generic[T]):
    """The most recently used values, up to a limit on the bytes of each device.

    Threads may share a cache: a value is built once, and another value can be built or read at the
    same time. A removed value that is still in use somewhere is found again, not built again.

    Parameters
    ----------
    at_least : int
        Number of values that stay on a device even if they exceed the limit.
    limit : callable
        Returns the limit of a device in bytes.

    Examples
    --------
    >>> cache = MemoryCache(at_least=1, limit=lambda device: 100)
    >>> values = [cache.get(key, lambda: set(key), lambda value: 60) for key in "aab"]
    >>> values[0] is values[1], len(cache)
    (True, 1)
    """

    def __init__(
        self, *, at_least: int, limit: Callable[[torch.device], int] | None = None
    ) -> None:
        self.at_least, self.limit = at_least, limit or memory_limit
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._in_use: WeakValueDictionary[Hashable, T] = WeakValueDictionary()
        self._renew_locks()
        if hasattr(os, "register_at_fork"):
            # Another thread may hold a lock at the time of a fork.
            os.register_at_fork(after_in_child=self._renew_locks)

    def get(
        self,
        key: Hashable,
        make: Callable[[], T],
        n_bytes: Callable[[T], int],
        device: torch.device = _CPU,
    ) -> T:
        """Return the value of a key; build it if necessary.

        Parameters
        ----------
        key : hashable
        make : callable
            Builds the value.
        n_bytes : callable
            Returns the bytes of memory of the value.
        device : torch.device
            Device whose memory the value takes.
        """
        with self._lock:
            building = self._building.setdefault(key, threading.RLock())
        with building:
            with self._lock:
                entry = self._entries.pop(key, None)
                if entry is not None:
                    self._entries[key] = entry  # the most recently used
                    return entry.value
                value = self._in_use.get(key)
            if value is None:
                value = make()
            entry = _Entry(value, n_bytes(value), device)
            limit = self.limit(device)
            with self._lock:
                self._in_use[key], self._entries[key] = value, entry
                self._remove_oldest(device, limit)
        return value

    def _remove_oldest(self, device: torch.device, limit: int) -> None:
        on_device = {key: entry for key, entry in self._entries.items() if entry.device == device}
        total = sum(entry.n_bytes for entry in on_device.values())
        for key in list(on_device)[: max(0, len(on_device) - self.at_least)]:
            if total <= limit:
                return
            total -= self._entries.pop(key).n_bytes

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._entries.clear()
            self._in_use.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()
        # One lock for each key that is being built or read.
        self._building: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()


def memory_limit(device: torch.device) -> int:
    """Return the bytes of networks that one cache of this process may keep on a device.

    It is an eighth of the device's memory, or of the system's, divided by the number of cores in a
    worker process, and at least 1 GiB.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = _system_memory()
    processes = 1 if multiprocessing.parent_process() is None else os.cpu_count() or 1
    return max(int(_MEMORY_SHARE * total / processes), _MIN_LIMIT)


def _system_memory(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory of the machine, or of the container that this process runs in."""
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _CONTAINER_LIMITS:
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            sizes.append(int((control_groups / name).read_text()))
    return min(sizes, default=_USUAL_MEMORY)
