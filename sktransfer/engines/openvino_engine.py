"""The engine that OpenVINO drives: a frozen prefix as one graph, compiled for this CPU.

Turning a network into a graph takes seconds. Graphs are therefore kept in a folder beside torch's
own downloads, `sktransfer` in `torch.hub.get_dir()`, where the next process finds them.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.engines.base import pad
from sktransfer.engines.verification import min_cosine, noise
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import EngineError, import_optional

# What OpenVINO calls them.
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# A graph has to give what the network gives: cosine on an image of noise. bfloat16 has two to
# three digits, and what a network makes of that, on noise above all, no engine can help.
_MIN_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99}

# To be raised when the same prefix becomes another graph.
_EDITION = 1
# Images that go together share what a call of each layer costs and the reading of its weights.
# It pays while their feature maps stay in the caches: those of two images of 224 x 224 do, and of
# more that are smaller. Weights larger than the caches of any CPU are shared by four or more.
_PIXELS, _MOST = 2 * 224 * 224, 16
_HEAVY_BYTES, _HEAVY_TOGETHER = 2**26, 4
# What all kept graphs together may take; the ones that were not used for longest go first.
_KEPT_BYTES = 2 * 2**30


def images_together(size: tuple[int, int]) -> int:
    """Choose how many images of `size` (height, width) go together: a power of two.

    Examples
    --------
    >>> [images_together((side, side)) for side in (32, 96, 160, 224, 288)]
    [16, 8, 4, 2, 1]
    """
    fitting = math.log2(_PIXELS / (size[0] * size[1]))
    return min(2 ** max(round(fitting), 0), _MOST)


class OpenVINOEngine:
    """A frozen prefix on the CPU, on as many images at once as pays.

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
    precision : torch.dtype
        float32 or bfloat16.
    key : bytes
        Identifies what the engine computes.

    Raises
    ------
    ImportError
        Where OpenVINO is not installed.
    EngineError
        Where the network cannot be turned into a graph that gives the same.
    """

    name = "openvino"
    thread_safe = True
    threads_per_core = 2

    def __init__(
        self,
        prefix: FrozenPrefix,
        preprocessing: Preprocessing,
        precision: torch.dtype,
        key: bytes,
    ) -> None:
        openvino, whole = _openvino(), _Whole(prefix, preprocessing)
        self._together = whole.shape[0]
        self.batch_invariant = self._together == 1
        parts = (_EDITION, key.hex(), self._together, openvino.__version__, torch.__version__)
        folder = _kept() / hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        self._core, self._precision = openvino.Core(), precision
        with contextlib.suppress(EngineError):
            self._idle = self._read(folder)
            self._compare(whole)
            os.utime(folder)
            return
        with _new_folder(folder.parent) as new:
            graph = _convert(whole)
            try:
                openvino.save_model(graph, new / "graph.xml", compress_to_fp16=False)
            except (OSError, RuntimeError) as error:
                raise EngineError(f"OpenVINO cannot write its graph to {new}: {error}") from error
            # As every later process does: what is read is compiled to other roundings.
            self._idle = self._read(new)
            self._compare(whole)
            _keep(new, folder)

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        embeddings, request = [], self._idle.get()
        try:
            for part in batch.split(self._together):
                padded = pad(part, self._together).permute(0, 2, 3, 1).contiguous()
                request.infer({0: padded.numpy()}, share_inputs=True)
                embeddings.append(request.get_output_tensor(0).data.copy())
        finally:
            self._idle.put(request)
        return np.concatenate(embeddings)[: len(batch)]

    def _read(self, folder: Path) -> SimpleQueue[Any]:
        """Give the requests that run the graph in a folder."""
        settings = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": PRECISIONS[self._precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            graph = self._core.read_model(folder / "graph.xml")
            compiled = self._core.compile_model(graph, "CPU", settings)
        except (OSError, RuntimeError) as error:
            raise EngineError(f"OpenVINO cannot read its graph in {folder}: {error}") from error
        requests = SimpleQueue[Any]()
        parallel = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        for _ in range(self.threads_per_core * parallel):
            requests.put(compiled.create_infer_request())
        return requests

    def _compare(self, whole: _Whole) -> None:
        """Refuse a graph that gives something else than the network."""
        image = noise(whole.shape[1:3]).repeat(self._together, 1, 1, 1)
        with torch.no_grad():
            expected = whole(image.permute(0, 2, 3, 1))
        cosine = min_cosine(expected, torch.from_numpy(self.run(image)))
        if not cosine >= _MIN_COSINE[self._precision]:
            raise EngineError(
                f"OpenVINO computes something else than the network: the cosine is {cosine:.4f}; "
                "engine='torch' computes it as it is"
            )


@cache
def _openvino() -> ModuleType:
    """Import OpenVINO, without the module by which it reports to its makers that it is used."""
    absent = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if absent:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_optional("openvino", extra="cpu", purpose="engine='openvino'")
    finally:
        if absent:
            del sys.modules["openvino_telemetry"]


class _Whole(nn.Module):
    """What becomes a graph: pixels of one image or a few, uint8 (N, H, W, 3), to embeddings."""

    def __init__(self, prefix: FrozenPrefix, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.prefix, self.preprocessing = prefix, preprocessing
        heavy = sum(each.nbytes for each in prefix.state_dict().values()) > _HEAVY_BYTES
        together = images_together(preprocessing.crop)
        together = max(together, _HEAVY_TOGETHER) if heavy else together
        self.shape = (together, *preprocessing.crop, 3)
        freeze(self)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.prefix(self.preprocessing.normalize(pixels.permute(0, 3, 1, 2)))


def _convert(whole: _Whole) -> Any:
    """Turn a network into a graph."""
    example = torch.zeros(whole.shape, dtype=torch.uint8)
    try:
        with torch.no_grad(), _quiet():
            return _openvino().convert_model(torch.export.export(whole, (example,)))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"OpenVINO cannot run this network ({reason}); engine='torch' can"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's exporter warns of to ourselves: the graph is compared afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _kept() -> Path:
    return Path(torch.hub.get_dir()) / "sktransfer"


@contextlib.contextmanager
def _new_folder(kept: Path) -> Iterator[Path]:
    """Make a folder for a graph among those that are kept, or elsewhere where that cannot be."""
    try:
        kept.mkdir(parents=True, exist_ok=True)
        new = tempfile.mkdtemp(dir=kept, prefix="new-")
    except OSError:
        new = tempfile.mkdtemp(prefix="sktransfer-")
    try:
        yield Path(new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _keep(new: Path, folder: Path) -> None:
    """Keep a graph, whole or not at all; where nothing can be written, none is kept."""
    if new.parent != folder.parent:
        return
    with contextlib.suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)  # one that could not be read
        new.rename(folder)
        _make_room(folder.parent)


def _make_room(kept: Path) -> None:
    """Remove the graphs that were not used for longest, until the others fit."""
    total = 0
    for folder in sorted(kept.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > _KEPT_BYTES:
            shutil.rmtree(folder, ignore_errors=True)
