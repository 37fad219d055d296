"""Feeding a CUDA device: files to large batches of pixels on it, and their embeddings back.

Threads only read files; the device decodes JPEGs, resizes and crops them. What it cannot decode is
decoded on the threads, and resized on the device. Two batches are under way, each on its own
stream: while the device computes one, the other is decoded. The host waits once for each batch,
for its result.

Shapes: N images of h x w pixels, H x W after the crop, D features.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from sktransfer.data.decoding import PlainJpeg, encode_jpeg
from sktransfer.transforms import device_resize
from sktransfer.transforms.device_resize import can_resize, resize_stack
from sktransfer.transforms.loader import ImageErrors, ImageReader, ahead, reading_pool
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Stack, Views
from sktransfer.utils.config import DEVICE_JPEG
from sktransfer.utils.errors import ImageError
from sktransfer.utils.runtime import to_device

# Batches that are read ahead of those on the device.
_BATCHES_AHEAD = 3
_LANES = 2
# Images that one task of a thread reads.
_READ_TOGETHER = 16
# Share of the JPEGs that the device may fail to decode before it is left to the CPU.
_MAX_FAILED = 0.25
# Threads that only read files: more of them would wait for Python's lock.
_MAX_READERS = 4
# Decoded pixels of a batch that are on the device at once, in bytes.
_MAX_DECODED_BYTES = 2**29

# Maps pixels (N, 3, H, W), uint8, to embeddings (N, D), float32, on the device and without waiting;
# with True, in float32 throughout.
Forward = Callable[[torch.Tensor, bool], torch.Tensor]
# A JPEG; decoded pixels (h, w, 3); or a crop (3, H, W) that needs no resizing.
Source = PlainJpeg | np.ndarray | torch.Tensor
_Read = PlainJpeg | Future[Source]


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
        Whether the device decodes JPEGs. Its decoder interpolates colors in another way than that
        of the CPU, so pixels differ by about one level in the mean.
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
        self._decodes = decodes and DEVICE_JPEG.get() != "0"

    def map(
        self, forward: Forward, batches: Iterable[Sequence[int]]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the readable rows and the embeddings (N, D), float32, of each batch."""
        lanes = deque(_Lane(self, forward) for _ in range(_LANES))
        for rows, sources in self._sources(batches):
            yield from lanes[0].results()
            lanes[0].launch(rows, sources)
            lanes.rotate(-1)
        for lane in lanes:
            yield from lane.results()
        self._image_errors.raise_all()

    def read(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the readable rows and the pixels (N, 3, H, W), uint8, on the device, of batches."""
        stream = torch.cuda.Stream(self._device)
        for rows, sources in self._sources(batches):
            with torch.no_grad(), torch.cuda.stream(stream):
                readable, pixels = self.prepare(rows, sources, stream)
            stream.synchronize()  # the caller uses another stream
            if readable and not self._image_errors.failed:
                yield readable, pixels
        self._image_errors.raise_all()

    def prepare(
        self, rows: list[int], sources: list[Source], stream: torch.cuda.Stream
    ) -> tuple[list[int], torch.Tensor]:
        """Return the readable rows and their pixels (N, 3, H, W), uint8, on the device.

        `stream` is the current one.
        """
        if self._stack is not None:
            return rows, self._prepare_stack(rows)
        crops = {slot: crop for slot, crop in enumerate(sources) if isinstance(crop, torch.Tensor)}
        slots, parts = list[int](), list[torch.Tensor]()
        others = [slot for slot in range(len(sources)) if slot not in crops]
        # The decoder does not wait for the stream, so it comes first, while the stream is idle.
        for number, group in enumerate(_groups(others, sources)):
            if number:
                stream.synchronize()
            pixels = self._on_device({slot: sources[slot] for slot in group}, rows)
            if pixels:
                slots += pixels
                parts.append(device_resize.resize([*pixels.values()], self._preprocessing))
        if crops:
            slots += crops
            parts.append(to_device(torch.stack([*crops.values()]), self._device))
        if not parts:
            return [], torch.empty(0)
        batch = parts[0] if len(parts) == 1 else torch.cat(parts)
        return [rows[slot] for slot in slots], batch

    def _prepare_stack(self, rows: list[int]) -> torch.Tensor:
        assert self._stack is not None
        source, channels_first, positions = self._stack
        chosen = positions[rows]
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

    def _on_device(self, sources: dict[int, Source], rows: list[int]) -> dict[int, torch.Tensor]:
        """Decode or copy images: pixels (3, h, w), uint8, on the device, by slot."""
        jpegs = {slot: jpeg for slot, jpeg in sources.items() if isinstance(jpeg, PlainJpeg)}
        pixels = _decode(jpegs, self._device) if self._decodes else {}
        arrays = {slot: array for slot, array in sources.items() if slot not in jpegs}
        failed = [slot for slot in jpegs if slot not in pixels]
        if len(failed) > _MAX_FAILED * len(jpegs):
            self._decodes = False  # the CPU decodes the other batches
        if failed:
            arrays |= self._decoded_on_cpu(failed, rows)
        for slot, array in arrays.items():
            pixels[slot] = to_device(torch.from_numpy(array), self._device).permute(2, 0, 1)
        return pixels

    def _decoded_on_cpu(self, slots: list[int], rows: list[int]) -> dict[int, np.ndarray]:
        """Decode JPEGs that the device could not decode; keep the errors of broken ones."""
        decoded = dict[int, np.ndarray]()
        with reading_pool(self._threads) as pool:
            tasks = {slot: pool.submit(self._views.pixels, rows[slot]) for slot in slots}
            for slot, task in tasks.items():
                try:
                    decoded[slot] = task.result()
                except ImageError as error:
                    self._image_errors.add(rows[slot], error)
        return decoded

    def _sources(
        self, batches: Iterable[Sequence[int]]
    ) -> Iterator[tuple[list[int], list[Source]]]:
        """Yield the readable rows and their sources of each batch, read ahead."""
        if self._stack is not None:
            yield from ((list(rows), []) for rows in batches)
            return
        n_readers = min(self._threads, _MAX_READERS)
        with reading_pool(n_readers) as readers, reading_pool(self._threads) as decoders:

            def submit(rows: Sequence[int]) -> tuple[Sequence[int], list[Future[list[_Read]]]]:
                starts = range(0, len(rows), _READ_TOGETHER)
                parts = (rows[start : start + _READ_TOGETHER] for start in starts)
                return rows, [readers.submit(self._read, part, decoders) for part in parts]

            yield from ahead(map(submit, batches), _BATCHES_AHEAD, self._finish)

    def _finish(
        self, read: tuple[Sequence[int], list[Future[list[_Read]]]]
    ) -> tuple[list[int], list[Source]]:
        readable, sources = list[int](), list[Source]()
        found = (source for future in read[1] for source in future.result())
        for row, source in zip(read[0], found, strict=True):
            try:
                sources.append(source.result() if isinstance(source, Future) else source)
                readable.append(row)
            except ImageError as error:
                self._image_errors.add(row, error)
        return readable, sources

    def _read(self, rows: Sequence[int], decoders: ThreadPoolExecutor) -> list[_Read]:
        """Read JPEGs for the device; leave the other images to the decoders."""
        return [self._plain_jpeg(row) or decoders.submit(self._decode, row) for row in rows]

    def _plain_jpeg(self, row: int) -> PlainJpeg | None:
        if not self._decodes or self._views.is_augmented(row):
            return None
        jpeg = self._views.plain_jpeg(row)
        return jpeg if jpeg and can_resize(self._preprocessing, jpeg[1:]) else None

    def _decode(self, row: int) -> Source:
        if self._views.is_augmented(row):
            return self._views.prepare(row)
        pixels = self._views.pixels(row)
        if can_resize(self._preprocessing, pixels.shape[:2]):
            return pixels
        return self._preprocessing.prepare(pixels)


class _Lane:
    """A stream, and the batch that is under way on it."""

    def __init__(self, feed: DeviceFeed, forward: Forward) -> None:
        self._feed, self._forward = feed, forward
        self._stream = torch.cuda.Stream(feed._device)
        self._rows: list[int] = []

    @torch.no_grad()
    def launch(self, rows: list[int], sources: list[Source]) -> None:
        """Start a batch, after the results of the previous one have been taken."""
        with torch.cuda.stream(self._stream):
            self._rows, self._pixels = self._feed.prepare(rows, sources, self._stream)
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


def _groups(slots: list[int], sources: list[Source]) -> Iterator[list[int]]:
    """Split a batch so that the decoded pixels of each group fit into the limit."""
    group, n_bytes = list[int](), 0
    for slot in slots:
        source = sources[slot]
        height, width = source[1:] if isinstance(source, PlainJpeg) else source.shape[:2]
        size = 3 * height * width
        if group and n_bytes + size > _MAX_DECODED_BYTES:
            yield group
            group, n_bytes = [], 0
        group.append(slot)
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
