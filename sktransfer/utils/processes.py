"""The processes that train an estimator together; usually, there is only one.

Each process trains on a share of every batch. An integration, such as that of Accelerate, provides
a subclass of `Processes`, and `use_processes` makes it that of all fits inside a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


class Processes:
    """A single process; a subclass exchanges values between several ones.

    All processes must call the same methods in the same order. Each call waits for the others.

    Attributes
    ----------
    rank, count : int
        Number of this process, from 0, and number of all processes.
    local_rank, local_count : int
        The same, among the processes of this machine.
    local_main : int
        The `rank` of the first process of this machine.
    device : torch.device or None
        Device of this process; None leaves the choice to the estimator.
    """

    rank, count = 0, 1
    device: torch.device | None = None
    local_rank, local_count, local_main = 0, 1, 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that decides, prints and writes checkpoints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        return [value]

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of the tensors of all processes, which have one shape."""
        return values

    def from_main(self, compute: Callable[[], T]) -> T:
        """Compute a value in the main process, and return it in all of them."""
        return compute()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave a block in all processes at the same time, and with an error if one has an error.

        An `ImageError` is the same in all processes.
        """
        yield

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in at least one process."""
        return any(self.gather(flag))

    def share(self, n_images: int) -> Share:
        """Return this process's share of a batch."""
        return Share(_part(n_images, self.rank, self.count), n_images, self)

    def local_share(self, n_items: int) -> slice:
        """Return this process's share of what the processes of a machine do together."""
        return _part(n_items, self.local_rank, self.local_count)


@dataclass(frozen=True)
class Share:
    """A process's share of a batch.

    Parameters
    ----------
    rows : slice
        Its rows of the batch.
    total : int
        Number of images in the batch.
    processes : Processes
    """

    rows: slice
    total: int
    processes: Processes

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def weight(self) -> float:
        """The share of the images, with which a mean over them enters the mean of the batch."""
        return len(self) / self.total

    @property
    def is_whole(self) -> bool:
        """Whether there is only one process."""
        return self.processes.count == 1


def _part(n_items: int, rank: int, count: int) -> slice:
    """Return one of `count` consecutive parts, whose sizes differ by at most 1.

    Examples
    --------
    >>> [_part(7, rank, 2) for rank in range(2)]
    [slice(0, 3, None), slice(3, 7, None)]
    """
    return slice(n_items * rank // count, n_items * (rank + 1) // count)


ALONE = Processes()

_current: ContextVar[Processes] = ContextVar("processes", default=ALONE)


def current_processes() -> Processes:
    """Return the processes that take part in a fit that begins now."""
    return _current.get()


@contextlib.contextmanager
def use_processes(processes: Processes) -> Iterator[None]:
    """Let several processes take part in the fits inside the block, which all of them must run."""
    token = _current.set(processes)
    try:
        yield
    finally:
        _current.reset(token)
