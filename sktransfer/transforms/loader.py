"""Reading images on threads: rows to batches of pixels, or to the embeddings of an engine.

Shapes: N images of H x W pixels.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from sktransfer.data.images import Images
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError

# Batches that are read ahead of the one in use.
_BATCHES_AHEAD = 3
# Images in a batch that are only read to find broken ones.
_READ_AT_ONCE = 16

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class ImageErrors:
    """Errors of broken images, kept to be raised together at the end, or for a report.

    Parameters
    ----------
    on_error : {"raise", "nan"}
    """

    def __init__(self, on_error: str) -> None:
        self._raise = on_error == "raise"
        self._errors: dict[int, ImageError] = {}

    def add(self, row: int, error: ImageError) -> None:
        """Keep the error of a row."""
        self._errors[row] = error

    @property
    def failed(self) -> bool:
        """Whether an error will be raised, so that results of other images are not needed."""
        return self._raise and bool(self._errors)

    def raise_all(self) -> None:
        """Raise one error for all broken images, unless they are kept for a report."""
        if self.failed:
            raise ImageError.of(self.sorted())

    def copy_to_duplicates(self, rows: Sequence[int], keys: Sequence[bytes], views: Views) -> None:
        """Copy the error of a broken image to all other rows with the same image.

        Rows are items of `views`. Copies of a broken file have other names.
        """
        if not self._errors:
            return
        broken = {
            key: self._errors[row]
            for row, key in zip(rows, keys, strict=True)
            if row in self._errors
        }
        for row, key in zip(rows, keys, strict=True):
            if key in broken and row not in self._errors:
                self._errors[row] = ImageError(
                    broken[key].reason,
                    views.origin(row),
                    views.images.describe(views.image_of(row)),
                    argument=views.images.argument,
                )

    def sorted(self) -> list[ImageError]:
        """Return the kept errors, in the order of their rows."""
        return [self._errors[row] for row in sorted(self._errors)]


class ImageReader:
    """Decodes and prepares images on threads.

    Images at URLs are fetched by further threads, which wait for the network.

    If only one thread calls the engine, threads read images ahead of it (`read`). Otherwise each
    thread reads a batch and runs it through the engine (`map`), so no core waits for another. Only
    a few batches are in memory at a time.

    After a broken image that will raise an error, the other images are only read, not yielded, and
    the error at the end names all broken ones.

    Parameters
    ----------
    views : Views
        Its items are the rows.
    threads : int
    image_errors : ImageErrors
        Takes the errors of broken images.
    """

    def __init__(self, views: Views, threads: int, image_errors: ImageErrors) -> None:
        self._views, self._threads, self._image_errors = views, threads, image_errors

    def batches(
        self, rows: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the readable rows and their pixels (N, 3, H, W), uint8, batch by batch."""
        starts = range(0, len(rows), batch_size)
        return self.read(rows[start : start + batch_size] for start in starts)

    def read(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the readable rows and the pixels of each of the given batches.

        A single image is read on this thread, because starting another one would take longer.
        """
        reads = (
            map(self._read_here, batches) if len(self._views) == 1 else self._read_ahead(batches)
        )
        for rows, pixels in reads:
            if rows and not self._image_errors.failed:
                yield rows, pixels
        self._image_errors.raise_all()

    def map(
        self,
        function: Callable[[torch.Tensor], np.ndarray],
        batches: Iterable[Sequence[int]],
        threads_per_core: int = 1,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the readable rows and the result of a function of their pixels, batch by batch.

        The function is called on several threads at once, `threads_per_core` for each core. On each
        of them, torch uses no further threads.
        """

        def read_and_apply(rows: Sequence[int]) -> _Mapped:
            readable, pixels, errors = self._read_batch(rows)
            needed = readable and not self._image_errors.failed
            return readable, function(pixels) if needed else None, errors

        threads = threads_per_core * self._threads
        with self._views.fetched_ahead(batches) as fetched, reading_pool(threads) as pool:
            futures = (pool.submit(read_and_apply, rows) for rows in fetched)
            for rows, values, errors in ahead(futures, 2 * threads, Future.result):
                self._keep(errors)
                if values is not None and not self._image_errors.failed:
                    yield rows, values
        self._image_errors.raise_all()

    def _read_here(self, rows: Sequence[int]) -> _Read:
        _torch_threads.restore()
        readable, pixels, errors = self._read_batch(rows)
        self._keep(errors)
        return readable, pixels

    def _read_batch(
        self, rows: Sequence[int]
    ) -> tuple[list[int], torch.Tensor, dict[int, ImageError]]:
        """Read a batch on this thread; return its readable rows, their pixels, and the errors."""
        pixels, errors = self._empty(len(rows)), dict[int, ImageError]()
        for slot, row in enumerate(rows):
            try:
                self._read_into(pixels[slot], row)
            except ImageError as error:
                errors[row] = error
        readable = [slot for slot, row in enumerate(rows) if row not in errors]
        return *self._readable(rows, pixels, readable), errors

    def _keep(self, errors: dict[int, ImageError]) -> None:
        for row, error in errors.items():
            self._image_errors.add(row, error)

    def _read_ahead(self, batches: Iterable[Sequence[int]]) -> Iterator[_Read]:
        with self._views.fetched_ahead(batches) as fetched, reading_pool(self._threads) as pool:
            reads = (self._submit(pool, rows) for rows in fetched)
            yield from ahead(reads, _BATCHES_AHEAD, self._finish)

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

    def _finish(self, batch: _Batch) -> _Read:
        reads, pixels = batch
        readable = []
        for slot, (row, read) in enumerate(reads):
            try:
                read.result()
                readable.append(slot)
            except ImageError as error:
                self._image_errors.add(row, error)
        return self._readable([row for row, _ in reads], pixels, readable)

    @staticmethod
    def _readable(rows: Sequence[int], pixels: torch.Tensor, slots: list[int]) -> _Read:
        return [rows[slot] for slot in slots], pixels if len(slots) == len(rows) else pixels[slots]


_Batch = tuple[list[tuple[int, Future[None]]], torch.Tensor]
_Read = tuple[list[int], torch.Tensor]
_Mapped = tuple[list[int], np.ndarray | None, dict[int, ImageError]]


def find_broken(image_sets: Iterable[Images], threads: int) -> list[ImageError]:
    """Read all images of some sets; return an error for each set that has broken ones."""
    broken: list[ImageError] = []
    for images in image_sets:
        reader = ImageReader(Views(images, Preprocessing()), threads, ImageErrors("raise"))
        try:
            deque(reader.batches(range(len(images)), _READ_AT_ONCE), maxlen=0)
        except ImageError as error:
            broken.append(error)
    return broken


class _TorchThreads(threading.local):
    """The numbers of torch's threads, while pools of readers are open.

    The threads of a pool set torch's number to 1, which is then the number of every new thread too.
    One whose first work is a request at such a time must not keep it.
    """

    _lock, _n_open, _before, _generation = threading.Lock(), 0, 1, 0
    # Of each thread.
    _is_reader = _is_known = False

    @classmethod
    def reset(cls) -> None:
        """Forget the pools that are open; in a fork, none of their threads is left."""
        cls._lock, cls._n_open, cls._generation = threading.Lock(), 0, cls._generation + 1

    def become_reader(self) -> None:
        """Use one thread of torch's on this thread."""
        self._is_reader = self._is_known = True
        torch.set_num_threads(1)

    def restore(self) -> None:
        """Give this thread the number from before the pools, if it may have that of a reader."""
        cls = type(self)
        if not self._is_known and cls._n_open:
            torch.set_num_threads(cls._before)
        self._is_known = True

    @contextmanager
    def pool(self) -> Iterator[None]:
        """Keep the number of this thread while it has a pool."""
        cls = type(self)
        with cls._lock:
            self.restore()
            own, generation = torch.get_num_threads(), cls._generation
            if not cls._n_open:
                cls._before = own
            cls._n_open += 1
        try:
            yield
        finally:
            with cls._lock:
                if generation == cls._generation:
                    cls._n_open -= 1
                torch.set_num_threads(own)


_torch_threads = _TorchThreads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TorchThreads.reset)


@contextmanager
def reading_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool of threads, on each of which torch uses no further threads."""
    with _torch_threads.pool():
        pool = ThreadPoolExecutor(threads, "sktransfer-read", _torch_threads.become_reader)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(
    tasks: Iterator[_Task], count: int, finish: Callable[[_Task], _Result]
) -> Iterator[_Result]:
    """Yield the results of tasks in order; start up to `count` tasks ahead."""
    started: deque[_Task] = deque()
    while True:
        while len(started) < count and (task := next(tasks, None)) is not None:
            started.append(task)
        if not started:
            return
        yield finish(started.popleft())
