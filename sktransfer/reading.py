"""Reading pictures on threads: rows -> batches of pixels, ahead of whoever consumes them.

Shapes: N pictures of H x W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sktransfer._errors import PictureError
from sktransfer.views import Views

# Batches that are read ahead of the one that is consumed.
_AHEAD = 3


class Faults:
    """Broken pictures: the first one ends the run, or all are kept to be reported.

    Parameters
    ----------
    on_error : {"raise", "nan"}
    """

    def __init__(self, on_error: str) -> None:
        self._raise = on_error == "raise"
        self._errors: dict[int, PictureError] = {}

    def add(self, row: int, error: PictureError) -> None:
        """Raise the error of a row, or keep it."""
        if self._raise:
            raise error
        self._errors[row] = error

    def spread(self, rows: Sequence[int], keys: Sequence[bytes]) -> None:
        """Give the error of a broken picture to the other rows that hold the same picture."""
        if not self._errors:
            return
        broken = {
            key: self._errors[row]
            for row, key in zip(rows, keys, strict=True)
            if row in self._errors
        }
        for row, key in zip(rows, keys, strict=True):
            if key in broken and row not in self._errors:
                self._errors[row] = PictureError(broken[key].reason, row, broken[key].source)

    def sorted(self) -> list[PictureError]:
        """Give the errors that were kept, by row."""
        return [self._errors[row] for row in sorted(self._errors)]


class PictureReader:
    """Decodes and prepares pictures on threads, ahead of the engine that consumes them.

    Memory holds a few batches, however many pictures there are.

    Parameters
    ----------
    views : Views
        Its items are the rows.
    threads : int
    faults : Faults
        Takes the errors of broken pictures.
    """

    def __init__(self, views: Views, threads: int, faults: Faults) -> None:
        self._views, self._threads, self._faults = views, threads, faults

    def batches(
        self, rows: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the readable rows and their pixels (N, 3, H, W), uint8, a batch at a time."""
        starts = range(0, len(rows), batch_size)
        return self.read(rows[start : start + batch_size] for start in starts)

    def read(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the same for batches that are made already."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="sktransfer-read")
        waiting = iter(batches)
        ahead: deque[_Batch] = deque()
        try:
            while True:
                while len(ahead) < _AHEAD and (rows := next(waiting, None)) is not None:
                    ahead.append(self._submit(pool, rows))
                if not ahead:
                    return
                batch_rows, batch = self._finish(*ahead.popleft())
                if batch_rows:
                    yield batch_rows, batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, rows: Sequence[int]) -> _Batch:
        crop = self._views.preprocessing.crop
        pixels = torch.empty((len(rows), *crop, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        slots = enumerate(rows)
        return [
            (row, pool.submit(self._read_into, pixels[slot], row)) for slot, row in slots
        ], pixels

    def _read_into(self, slot: torch.Tensor, row: int) -> None:
        slot.copy_(self._views.prepare(row))

    def _finish(
        self, reads: list[tuple[int, Future[None]]], pixels: torch.Tensor
    ) -> tuple[list[int], torch.Tensor]:
        good = []
        for slot, (row, read) in enumerate(reads):
            try:
                read.result()
                good.append(slot)
            except PictureError as error:
                self._faults.add(row, error)
        batch = pixels if len(good) == len(reads) else pixels[good]
        return [reads[slot][0] for slot in good], batch


_Batch = tuple[list[tuple[int, Future[None]]], torch.Tensor]
