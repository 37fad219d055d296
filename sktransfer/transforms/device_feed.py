"""Feeding a CUDA device: files to large batches of pixels on it, and their embeddings back.

Threads only read files; the device decodes JPEGs, resizes and crops them, and augments them if it
can. What it cannot decode is decoded on the threads, and resized on the device. Two batches are
in flight, each on its own stream: while the device computes one, the other is decoded. The host
waits once for each batch, for its result.

Shapes: N images of h x w pixels, H x W after the crop, D features.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from sktransfer.data.decoding import PlainJpeg, content_digest, encode_jpeg
from sktransfer.transforms import device_resize
from sktransfer.transforms.augmentation import Augmentation
from sktransfer.transforms.device_resize import can_resize, resize_stack
from sktransfer.transforms.device_views import augment, can_augment
from sktransfer.transforms.loader import ImageErrors, ImageReader, ahead, reading_pool
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Stack, Views
from sktransfer.utils.config import DEVICE_JPEG
from sktransfer.utils.errors import ImageError
from sktransfer.utils.runtime import to_device

# Batches that are read ahead of those on the device.
_BATCHES_AHEAD = 3
_LANES = 2
# Images that a thread reads in one task.
_READ_TOGETHER = 16
# Share of the JPEGs that the device may fail to decode before decoding is left to the CPU.
_MAX_FAILED = 0.25
# Threads that only read files, if they wait for the storage.
_MAX_READERS = 16
# A reader waits for the storage if it takes this many times as long as it computes.
_SLOW_STORAGE = 4
# Maximum size in bytes of the decoded pixels of a batch that are on the device at once.
_MAX_DECODED_BYTES = 2**29

_Result = TypeVar("_Result")

# Maps pixels (N, 3, H, W), uint8, to embeddings (N, D), float32, on the device and without waiting;
# with True, in float32 throughout.
Forward = Callable[[torch.Tensor, bool], torch.Tensor]


class _Source(NamedTuple):
    """An image that the device resizes, and the items that are views of it.

    Parameters
    ----------
    items : list of int
    content : PlainJpeg or ndarray of shape (h, w, 3)
        The JPEG for the decoder of the device, or uint8 pixels.
    digest : bytes
        Digest of the content, if a view is augmented.
    """

    items: list[int]
    content: PlainJpeg | np.ndarray
    digest: bytes


# Crops (3, H, W) that the CPU has prepared, by item, or errors.
_Crops = dict[int, torch.Tensor | ImageError]
_Read = _Source | Future[_Source | _Crops]
# An image, and its pixels (3, h, w), uint8, on the device.
_Decoded = tuple[_Source, torch.Tensor]


class _Batch(NamedTuple):
    """A batch as it was read: images for the device, and crops that need no more work."""

    sources: list[_Source]
    crops: dict[int, torch.Tensor]


def image_reader(
    views: Views,
    threads: int,
    image_errors: ImageErrors,
    device: torch.device,
    *,
    decodes: bool,
) -> ImageReader | DeviceFeed:
    """Choose how images are read for a device: CUDA devices decode and resize them themselves."""
    if device.type == "cuda":
        return DeviceFeed(views, threads, image_errors, device, decodes=decodes)
    return ImageReader(views, threads, image_errors)


class DeviceFeed:
    """Reads images for a CUDA device, and runs them through a network on it.

    After a broken image that will raise an error, the other images are only read and decoded, and
    the error at the end names all broken ones.

    Parameters
    ----------
    views : Views
        Its items are the rows.
    threads : int
        Threads that decode what the device cannot decode.
    image_errors : ImageErrors
        Takes the errors of broken images.
    device : torch.device
    decodes : bool
        Whether the device decodes JPEGs. Its decoder does not interpolate colors as the CPU does,
        so pixels differ by about one level on average.
    """

    def __init__(
        self,
        views: Views,
        threads: int,
        image_errors: ImageErrors,
        device: torch.device,
        *,
        decodes: bool = True,
    ) -> None:
        self._views, self._threads, self._image_errors = views, threads, image_errors
        self._device = device
        self._preprocessing = views.preprocessing
        stack = views.stack()
        self._stack = stack if stack and _can_resize(stack, views.preprocessing) else None
        if self._stack is not None and isinstance(self._stack.pixels, torch.Tensor):
            # The caller may still be writing to it, on another stream.
            torch.cuda.current_stream(self._stack.pixels.device).synchronize()
        self._augments = can_augment(views.augmentation)
        self._decodes = decodes and DEVICE_JPEG.get() != "0"

    def map(
        self, forward: Forward, batches: Iterable[Sequence[int]]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the readable rows and the embeddings (N, D), float32, of each batch."""
        lanes = deque(_Lane(self, forward) for _ in range(_LANES))
        for rows, batch in self._batches(batches):
            yield from lanes[0].results()
            lanes[0].launch(rows, batch)
            lanes.rotate(-1)
        for lane in lanes:
            yield from lane.results()
        self._image_errors.raise_all()

    def read(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the readable rows and the pixels (N, 3, H, W), uint8, on the device, of batches."""
        stream = torch.cuda.Stream(self._device)
        for rows, batch in self._batches(batches):
            with torch.no_grad(), torch.cuda.stream(stream):
                readable, pixels = self.prepare(rows, batch, stream)
            stream.synchronize()  # the caller uses another stream
            if readable and not self._image_errors.failed:
                yield readable, pixels
        self._image_errors.raise_all()

    def prepare(
        self, rows: Sequence[int], batch: _Batch, stream: torch.cuda.Stream
    ) -> tuple[list[int], torch.Tensor]:
        """Return the readable rows and their pixels (N, 3, H, W), uint8, on the device.

        `stream` is the current one.
        """
        if self._stack is not None:
            return list(rows), self._prepare_stack(rows)
        readable, parts = list[int](), list[torch.Tensor]()
        # The decoder does not wait for the stream, so it comes first, while the stream is idle.
        for number, group in enumerate(_groups(batch.sources)):
            if number:
                stream.synchronize()
            decoded = self._on_device(group)
            for items, pixels in (self._resized(decoded), self._augmented(decoded)):
                readable += items
                parts += pixels
        if batch.crops:
            readable += batch.crops
            parts.append(to_device(torch.stack([*batch.crops.values()]), self._device))
        if not parts:
            return [], torch.empty(0)
        return readable, parts[0] if len(parts) == 1 else torch.cat(parts)

    def _resized(self, decoded: list[_Decoded]) -> tuple[list[int], list[torch.Tensor]]:
        """Resize and crop the images that have a view without augmentation."""
        is_augmented = self._views.is_augmented
        plain = [
            (item, pixels)
            for source, pixels in decoded
            for item in source.items
            if not is_augmented(item)
        ]
        if not plain:
            return [], []
        items, images = zip(*plain, strict=True)
        return list(items), [device_resize.resize(images, self._preprocessing)]

    def _augmented(self, decoded: list[_Decoded]) -> tuple[list[int], list[torch.Tensor]]:
        """Compute the augmented views of images."""
        if self._views.augmentation is None:
            return [], []
        views = [
            (item, row, self._views.seed(item, source.digest))
            for row, (source, _) in enumerate(decoded)
            for item in source.items
            if self._views.is_augmented(item)
        ]
        if not views:
            return [], []
        assert isinstance(self._views.augmentation, Augmentation)
        items, rows, seeds = zip(*views, strict=True)
        images = device_resize.resize_whole([pixels for _, pixels in decoded], self._preprocessing)
        crop = self._preprocessing.crop
        return list(items), [augment(self._views.augmentation, images, rows, seeds, crop)]

    def _prepare_stack(self, rows: Sequence[int]) -> torch.Tensor:
        assert self._stack is not None
        source, channels_first, positions = self._stack
        chosen = positions[list(rows)]
        if isinstance(source, np.ndarray):
            shape = (len(rows), *source.shape[1:])
            staged = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            # Any other mode would copy the result once more.
            np.take(source, chosen, axis=0, out=staged.numpy(), mode="clip")
            pixels = staged.to(self._device, non_blocking=True)
        else:
            index = to_device(torch.from_numpy(chosen), source.device)
            pixels = source[index].to(self._device)
        return resize_stack(
            pixels if channels_first else pixels.permute(0, 3, 1, 2), self._preprocessing
        )

    def _on_device(self, sources: list[_Source]) -> list[_Decoded]:
        """Decode or copy images to the device; broken ones are left out."""
        jpegs = {
            slot: source.content
            for slot, source in enumerate(sources)
            if isinstance(source.content, PlainJpeg)
        }
        pixels = _decode(jpegs, self._device) if self._decodes else {}
        failed = [slot for slot in jpegs if slot not in pixels]
        if len(failed) > _MAX_FAILED * len(jpegs):
            self._decodes = False  # the CPU decodes the other batches
        arrays = self._decoded_on_cpu({slot: sources[slot] for slot in failed}) if failed else {}
        for slot, source in enumerate(sources):
            if isinstance(source.content, np.ndarray):
                arrays[slot] = source.content
        for slot, array in arrays.items():
            pixels[slot] = to_device(torch.from_numpy(array), self._device).permute(2, 0, 1)
        return [(sources[slot], pixels[slot]) for slot in sorted(pixels)]

    def _decoded_on_cpu(self, sources: dict[int, _Source]) -> dict[int, np.ndarray]:
        """Decode JPEGs that the device could not decode; keep the errors of broken ones."""
        decoded = dict[int, np.ndarray]()
        with reading_pool(self._threads) as pool:
            tasks = {
                slot: pool.submit(self._views.pixels, source.items[0])
                for slot, source in sources.items()
            }
            for slot, task in tasks.items():
                try:
                    decoded[slot], _ = task.result()
                except ImageError as error:
                    for item in sources[slot].items:
                        self._image_errors.add(item, error)
        return decoded

    def _batches(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], _Batch]]:
        """Yield the rows of each batch, and what was read of them, ahead of time."""
        if self._stack is not None:
            yield from ((rows, _Batch([], {})) for rows in batches)
            return
        with (
            self._views.fetched_ahead(batches) as fetched,
            _Readers() as readers,
            reading_pool(self._threads) as decoders,
        ):

            def submit(rows: Sequence[int]) -> tuple[Sequence[int], list[Future[list[_Read]]]]:
                if self._views.augmentation is None:
                    views_of_images = [[row] for row in rows]
                else:
                    groups = groupby(rows, self._views.image_of)
                    views_of_images = [[*group] for _, group in groups]
                starts = range(0, len(views_of_images), _READ_TOGETHER)
                parts = (views_of_images[start : start + _READ_TOGETHER] for start in starts)
                return rows, [readers.submit(self._read, part, decoders) for part in parts]

            yield from ahead(map(submit, fetched), _BATCHES_AHEAD, self._finish)

    def _finish(
        self, submitted: tuple[Sequence[int], list[Future[list[_Read]]]]
    ) -> tuple[Sequence[int], _Batch]:
        rows, futures = submitted
        batch = _Batch([], {})
        for read in (read for future in futures for read in future.result()):
            content = read.result() if isinstance(read, Future) else read
            if isinstance(content, _Source):
                batch.sources.append(content)
                continue
            for item, crop in content.items():
                if isinstance(crop, ImageError):
                    self._image_errors.add(item, crop)
                else:
                    batch.crops[item] = crop
        return rows, batch

    def _read(self, images: list[list[int]], decoders: ThreadPoolExecutor) -> list[_Read]:
        """Read JPEGs for the device; leave the other images to the decoders."""
        return [self._plain_jpeg(items) or decoders.submit(self._decode, items) for items in images]

    def _is_augmented(self, items: list[int]) -> bool:
        return any(self._views.is_augmented(item) for item in items)

    def _plain_jpeg(self, items: list[int]) -> _Source | None:
        is_augmented = self._is_augmented(items)
        if not self._decodes or (is_augmented and not self._augments):
            return None
        jpeg = self._views.plain_jpeg(items[0])
        if jpeg is None or not can_resize(self._preprocessing, (jpeg.height, jpeg.width)):
            return None
        digest = content_digest(jpeg.encoded.data) if is_augmented else b""
        return _Source(items, jpeg, digest)

    def _decode(self, items: list[int]) -> _Source | _Crops:
        """Decode an image, or prepare its views, if the device cannot resize or augment it."""
        if self._augments or not self._is_augmented(items):
            try:
                pixels, digest = self._views.pixels(items[0])
            except ImageError as error:
                return dict.fromkeys(items, error)
            if can_resize(self._preprocessing, pixels.shape[:2]):
                return _Source(items, pixels, digest)
        crops: _Crops = {}
        for item in items:
            try:
                crops[item] = self._views.prepare(item)
            except ImageError as error:
                crops[item] = error
        return crops


class _Readers(contextlib.ExitStack):
    """Runs tasks on one thread, and on more if they wait for the storage.

    Files in the page cache are read fastest by one thread: several would wait for
    Python's lock. Over a network, one thread would mostly wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pools = [self.enter_context(reading_pool(1))]
        self._lock = threading.Lock()
        self._n_tasks, self._elapsed, self._computed = 0, 0.0, 0.0

    def submit(self, function: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Start a task; if there are several threads, they take turns."""
        waits = self._elapsed > _SLOW_STORAGE * self._computed
        if waits and len(self._pools) < _MAX_READERS:
            self._pools.append(self.enter_context(reading_pool(1)))
        self._n_tasks += 1
        pool = self._pools[self._n_tasks % len(self._pools)]
        return pool.submit(self._measured, function, *args)

    def _measured(self, function: Callable[..., _Result], *args: Any) -> _Result:
        start, computed = time.perf_counter(), time.thread_time()
        result = function(*args)
        elapsed, computed = time.perf_counter() - start, time.thread_time() - computed
        with self._lock:
            self._elapsed += elapsed
            self._computed += computed
        return result


class _Lane:
    """A stream, and the batch that is in flight on it."""

    def __init__(self, feed: DeviceFeed, forward: Forward) -> None:
        self._feed, self._forward = feed, forward
        self._stream = torch.cuda.Stream(feed._device)
        self._rows: list[int] = []

    @torch.no_grad()
    def launch(self, rows: Sequence[int], batch: _Batch) -> None:
        """Start a batch, after the results of the previous one have been taken."""
        with torch.cuda.stream(self._stream):
            self._rows, self._pixels = self._feed.prepare(rows, batch, self._stream)
            if not self._rows or self._feed._image_errors.failed:
                self._rows = []
                return
            embeddings = self._forward(self._pixels, False)
            self._result = torch.empty(embeddings.shape, pin_memory=True)
            self._result.copy_(embeddings, non_blocking=True)

    @torch.no_grad()
    def results(self) -> Iterator[tuple[list[int], np.ndarray]]:
        """Wait for the batch; yield its rows and embeddings, if there is one."""
        # Also without a batch: memory that it used must be idle before the device decodes into it.
        self._stream.synchronize()
        if not self._rows:
            return
        values = self._result.numpy()
        if not np.isfinite(values).all():  # float16 overflows in some networks
            with torch.cuda.stream(self._stream):
                values = self._forward(self._pixels, True).cpu().numpy()
        rows, self._rows = self._rows, []
        yield rows, values


def _can_resize(stack: Stack, preprocessing: Preprocessing) -> bool:
    height, width = stack.pixels.shape[2:] if stack.channels_first else stack.pixels.shape[1:3]
    return can_resize(preprocessing, (height, width))


def _groups(sources: list[_Source]) -> Iterator[list[_Source]]:
    """Split a batch so that the decoded pixels of each group fit into the limit."""
    group, n_bytes = list[_Source](), 0
    for source in sources:
        content = source.content
        height, width = content[1:] if isinstance(content, PlainJpeg) else content.shape[:2]
        size = 3 * height * width
        if group and n_bytes + size > _MAX_DECODED_BYTES:
            yield group
            group, n_bytes = [], 0
        group.append(source)
        n_bytes += size
    if group:
        yield group


def _decode(jpegs: dict[int, PlainJpeg], device: torch.device) -> dict[int, torch.Tensor]:
    """Decode JPEGs on a device: pixels (3, h, w), uint8, by slot; broken ones are left out."""
    if not jpegs or not _has_decoder(device):
        return {}
    slots = list(jpegs)
    try:
        decoded = _call_decoder([jpegs[slot].encoded for slot in slots], device)
    except RuntimeError:
        # One of them is broken, or memory ran out: search for it, or take less at once.
        if len(slots) == 1:
            return {}
        half = len(slots) // 2
        first, second = (
            _decode({slot: jpegs[slot] for slot in part}, device)
            for part in (slots[:half], slots[half:])
        )
        return first | second
    return {
        slot: pixels
        for slot, pixels in zip(slots, decoded, strict=True)
        if pixels.shape == (3, jpegs[slot].height, jpegs[slot].width)
    }


@lru_cache
def _has_decoder(device: torch.device) -> bool:
    """Return whether torchvision can decode JPEGs on a device; tried once."""
    example = np.frombuffer(encode_jpeg(torch.zeros((3, 16, 16), dtype=torch.uint8)), np.uint8)
    try:
        return _call_decoder([example.copy()], device)[0].shape == (3, 16, 16)
    except (ImportError, NotImplementedError, RuntimeError, AttributeError):
        return False


def _call_decoder(encoded: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    # Imported here, because a later torchvision may leave it out in favor of torchcodec.
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_jpeg([torch.from_numpy(jpeg) for jpeg in encoded], ImageReadMode.RGB, device)
