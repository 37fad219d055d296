"""Engines that run a frozen prefix: pixels in, embeddings out.

Shapes: N pictures, H x W pixels, D features.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
from torch import nn

from sktransfer._config import autocast, is_fork, keep_pages
from sktransfer._errors import check_choice
from sktransfer.fusion import fuse
from sktransfer.likeness import likeness, noise
from sktransfer.openvino_engine import PRECISIONS, OpenVINOEngine, pictures_together
from sktransfer.split import FrozenPrefix
from sktransfer.transforms import Preprocessing

ENGINES = ("torch", "openvino")

# Pictures of 224 x 224 in a batch. On a CPU a small batch keeps the feature maps in its caches; an
# accelerator wants many at once, and halves the batch where its memory ends.
_CPU_BATCH = 4
_ACCELERATOR_BATCH = 128

# Batches that are on a CUDA device at once: one computes while others come and go.
_ON_DEVICE = 3

# A fused network has to give what the network gives: cosine on pictures of noise.
_LIKENESS = 0.9999

# For fewer pictures it takes longer to make a graph than to run the network as it is.
_WORTH_A_GRAPH = 128


class FrozenEngine(Protocol):
    """What an engine offers, whatever runs inside it."""

    name: str
    alone: bool
    """Whether no bit of an embedding can depend on the company in which the picture came."""
    side_by_side: bool
    """Whether several threads may run it at once."""
    callers: int
    """How many threads for each core: more than one where they wait while others compute."""

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        ...


def choose_engine(
    engine: str,
    device: torch.device,
    precision: torch.dtype,
    n_pictures: int,
    *,
    known: bool = True,
) -> str:
    """Choose the engine that runs a frozen prefix; the one place where this is decided.

    Parameters
    ----------
    engine : {"auto", "torch", "openvino"}
        `"auto"` is OpenVINO where it is installed, computes on the CPU, has a known architecture
        before it, and enough pictures to be worth it; torch otherwise. What it depends on is the
        same in every process of a search.
    device : torch.device
    precision : torch.dtype
    n_pictures : int
        How many are asked for, whether or not they are in a store.
    known : bool
        Whether the network is one of the libraries': the modules of a user may do more than
        compute, which a graph would leave out.

    Raises
    ------
    ValueError
        Where the engine is unknown, or cannot compute on that device.

    Examples
    --------
    >>> choose_engine("auto", torch.device("cpu"), torch.float16, 1000)
    'torch'
    """
    check_choice("engine", engine, ["auto", *ENGINES])
    fits = device.type == "cpu" and precision in PRECISIONS
    if engine == "openvino" and not fits:
        raise ValueError(
            f"Got engine='openvino' with device={str(device)!r} and {precision}, but it computes "
            "on the CPU in float32 or bfloat16; device='cpu' and precision='auto' do that"
        )
    if engine != "auto":
        return engine
    pays = known and n_pictures >= _WORTH_A_GRAPH and not is_fork()
    return "openvino" if fits and pays and importlib.util.find_spec("openvino") else "torch"


def create_engine(
    prefix: FrozenPrefix,
    preprocessing: Preprocessing,
    *,
    engine: str,
    device: torch.device,
    precision: torch.dtype,
    key: bytes,
    known: bool = True,
) -> FrozenEngine:
    """Make an engine that `choose_engine` has chosen.

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
        Its normalisation runs inside the engine.
    engine : {"torch", "openvino"}
    device : torch.device
    precision : torch.dtype
    key : bytes
        Identifies what prefix and preprocessing compute.
    known : bool
        Whether the network is one of the libraries'.

    Raises
    ------
    EngineError
        Where the engine cannot run this network.
    ImportError
        Where the engine is not installed.
    """
    if engine == "openvino":
        return OpenVINOEngine(prefix, preprocessing, precision, key)
    return TorchEngine(prefix, preprocessing, device, precision, known=known)


def auto_batch_size(device: torch.device, size: tuple[int, int], engine: str = "torch") -> int:
    """Choose how many pictures of `size` (height, width) go through the backbone at once.

    Examples
    --------
    >>> auto_batch_size(torch.device("cpu"), (224, 224))
    4
    """
    if engine == "openvino":
        return max(pictures_together(size), _CPU_BATCH)
    at_224 = _CPU_BATCH if device.type == "cpu" else _ACCELERATOR_BATCH
    scaled = at_224 * 224 * 224 // (size[0] * size[1])
    return max(1, min(scaled, 4 * at_224))


@torch.inference_mode()
def _fused(prefix: FrozenPrefix, preprocessing: Preprocessing) -> nn.Module:
    """Fuse what can be fused, where the result gives what the prefix gives."""
    try:
        fused = fuse(prefix)
        if fused is prefix:
            return prefix
        x = preprocessing.normalize(noise(preprocessing.crop))
        n = auto_batch_size(torch.device("cpu"), preprocessing.crop)
        batch = x.repeat(n, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        same = likeness(prefix(x), fused(batch)[:1]) >= _LIKENESS
    except Exception:  # whatever torch has against it, the prefix runs as it is
        return prefix
    return fused if same else prefix


class TorchEngine:
    """Eager torch: channels-last, without gradients, in mixed precision where asked.

    On the CPU in float32, convolutions do the work of what follows them.

    Parameters
    ----------
    prefix : FrozenPrefix
        Left where it is; another device gets a copy.
    preprocessing : Preprocessing
    device : torch.device
    precision : torch.dtype
        float32, or bfloat16 or float16 for autocast.
    known : bool
        Whether the network is one of the libraries': what a user's module does on several threads
        at once, nobody knows.
    """

    name = "torch"
    alone = False
    callers = 1

    def __init__(
        self,
        prefix: FrozenPrefix,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: torch.dtype,
        *,
        known: bool = True,
    ) -> None:
        self._prefix: nn.Module = prefix
        if device.type != "cpu":
            self._prefix = copy.deepcopy(prefix).to(device)
        elif known and precision == torch.float32:
            self._prefix = _fused(prefix, preprocessing)
        self._preprocessing = preprocessing
        self._device, self._precision = device, precision
        self.side_by_side = known and device.type in ("cpu", "cuda")
        if device.type == "cpu":
            keep_pages()
        if device.type == "cuda":
            self._prefix.to(memory_format=torch.channels_last)
            torch.cuda.synchronize(device)  # other streams would not wait for it
            self._streams = SimpleQueue[torch.cuda.Stream]()
            for _ in range(_ON_DEVICE):
                self._streams.put(torch.cuda.Stream(device))
        self._most: int | None = None

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        found, self._most = in_parts(self._forward, batch, self._most)
        return found

    @torch.inference_mode()
    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return self._compute(batch)
        stream = self._streams.get()  # copies of one run beside the forward of another
        try:
            with torch.cuda.stream(stream):
                return self._compute(batch.pin_memory())
        finally:
            self._streams.put(stream)

    def _compute(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(self._device, non_blocking=True)
        x = self._preprocessing.normalize(batch.contiguous(memory_format=torch.channels_last))
        return run_frozen(self._prefix, x, self._precision).cpu()


def run_frozen(blocks: nn.Module, x: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Run frozen blocks in mixed precision: float32; what is too large for float16 in float32."""
    with autocast(x.device, precision):
        y = blocks(x)
    if precision == torch.float16 and not y.isfinite().all():
        y = blocks(x)
    return y.float()


def in_parts(
    run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, most: int | None = None
) -> tuple[np.ndarray, int | None]:
    """Run a batch; where memory ends on the device, in halves, or in halves of these.

    Parameters
    ----------
    run : callable
        Maps a part (n, ...) of the batch to what belongs to it, (n, ...), on the CPU.
    batch : Tensor of shape (N, ...)
    most : int or None
        How many go at once from the beginning; None is all.

    Returns
    -------
    ndarray of shape (N, ...)
    most : int or None
        How many went at once in the end.
    """
    done = []
    while len(batch):
        part = batch[:most]
        try:
            done.append(run(part).numpy())
            batch = batch[len(part) :]
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        # Outside the handler, whose traceback would keep the tensors of the failed run alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        most = len(part) // 2
    return np.concatenate(done), most
