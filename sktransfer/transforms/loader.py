"""Reading images on threads: rows -> batches of pixels, or what an engine makes of them.

Shapes: N images of H x W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError

# Batches that are read ahead of the one that is consumed.
_AHEAD = 3

_Begun = TypeVar("_Begun")
_Done = TypeVar("_Done")


class ImageErrors:
    """Broken images: the first one ends the run, or all are kept to be reported.

    Parameters
    ----------
    on_error : {"raise", "nan"}
    """

    def __init__(self, on_error: str) -> None:
        self._raise = on_error == "raise"
        self._errors: dict[int, ImageError] = {}

    def add(self, row: int, error: ImageError) -> None:
        """Raise the error of a row, or keep it."""
        if self._raise:
            raise error
        self._errors[row] = error

    def copy_to_duplicates(self, rows: Sequence[int], keys: Sequence[bytes]) -> None:
        """Copy the error of a broken image to the other rows that hold the same image."""
        if not self._errors:
            return
        broken = {
            key: self._errors[row]
            for row, key in zip(rows, keys, strict=True)
            if row in self._errors
        }
        for row, key in zip(rows, keys, strict=True):
            if key in broken and row not in self._errors:
                self._errors[row] = ImageError(broken[key].reason, row, broken[key].source)

    def sorted(self) -> list[ImageError]:
        """Return the errors that were kept, by row."""
        return [self._errors[row] for row in sorted(self._errors)]


class ImageReader:
    """Decodes and prepares images on threads.

    Where one thread alone calls the engine, images are read ahead of it (`read`). Otherwise each
    thread reads a batch and sends it through the engine (`map`), so that no core waits for another.
    Memory holds a few batches, however many images there are.

    Parameters
    ----------
    views : Views
        Its items are the rows.
    threads : int
    image_errors : ImageErrors
        Takes the errors of broken images.
    device : torch.device or None
        If `map` decodes JPEGs, many at once; `None` decodes on the threads.
    """

    def __init__(
        self,
        views: Views,
        threads: int,
        image_errors: ImageErrors,
        device: torch.device | None = None,
    ) -> None:
        self._views, self._threads, self._image_errors = views, threads, image_errors
        self._device = device

    def batches(
        self, rows: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the readable rows and their pixels (N, 3, H, W), uint8, a batch at a time."""
        starts = range(0, len(rows), batch_size)
        return self.read(rows[start : start + batch_size] for start in starts)

    def read(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the same for batches that are made already."""
        with _pool(self._threads) as pool:
            reads = (self._submit(pool, rows) for rows in batches)
            for rows, pixels in _ahead(reads, _AHEAD, self._finish):
                if rows:
                    yield rows, pixels

    def map(
        self,
        function: Callable[[torch.Tensor], np.ndarray],
        batches: Iterable[Sequence[int]],
        threads_per_core: int = 1,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the readable rows and what a function makes of their pixels, in order.

        The function is called on several threads at once, on each of which torch computes alone;
        there are `threads_per_core` for each core.
        """

        def work(rows: Sequence[int]) -> _Mapped:
            pixels, errors = self._empty(len(rows)), dict[int, ImageError]()
            on_device = self._views.prepare_on(self._device, rows) if self._device else {}
            for slot, row in enumerate(rows):
                try:
                    if row in on_device:
                        pixels[slot] = on_device[row]
                    else:
                        self._read_into(pixels[slot], row)
                except ImageError as error:
                    errors[row] = error
            good = [slot for slot, row in enumerate(rows) if row not in errors]
            pixels = pixels if not errors else pixels[good]
            return [rows[slot] for slot in good], function(pixels) if good else None, errors

        threads = threads_per_core * self._threads
        with _pool(threads) as pool:
            futures = (pool.submit(work, rows) for rows in batches)
            for rows, values, errors in _ahead(futures, 2 * threads, Future.result):
                for row, error in errors.items():
                    self._image_errors.add(row, error)
                if values is not None:
                    yield rows, values

    def _submit(self, pool: ThreadPoolExecutor, rows: Sequence[int]) -> _Batch:
        pixels, slots = self._empty(len(rows)), enumerate(rows)
        return [
            (row, pool.submit(self._read_into, pixels[slot], row)) for slot, row in slots
        ], pixels

    def _empty(self, count: int) -> torch.Tensor:
        crop = self._views.preprocessing.crop
        return torch.empty((count, *crop, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def _read_into(self, slot: torch.Tensor, row: int) -> None:
        slot.copy_(self._views.prepare(row))

    def _finish(self, batch: _Batch) -> tuple[list[int], torch.Tensor]:
        reads, pixels = batch
        good = []
        for slot, (row, read) in enumerate(reads):
            try:
                read.result()
                good.append(slot)
            except ImageError as error:
                self._image_errors.add(row, error)
        pixels = pixels if len(good) == len(reads) else pixels[good]
        return [reads[slot][0] for slot in good], pixels


_Batch = tuple[list[tuple[int, Future[None]]], torch.Tensor]
_Mapped = tuple[list[int], np.ndarray | None, dict[int, ImageError]]


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool of threads, on each of which torch computes without the help of others."""
    of_torch = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "sktransfer-read", torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(of_torch)  # for threads to come; this one has kept it


def _ahead(
    begun: Iterator[_Begun], count: int, finish: Callable[[_Begun], _Done]
) -> Iterator[_Done]:
    """Keep some tasks begun ahead of the one whose result is taken."""
    waiting: deque[_Begun] = deque()
    while True:
        while len(waiting) < count and (task := next(begun, None)) is not None:
            waiting.append(task)
        if not waiting:
            return
        yield finish(waiting.popleft())
