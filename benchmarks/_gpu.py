"""What the phases of benchmarks/gpu.py share: images, the right embeddings, clock and limits."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import cosines
from PIL import Image
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedFeatureExtractor
from sktransfer.store.store import EmbeddingStore

LITE0, RESNET = "efficientnet_lite0", "resnet50"
WEIGHTS = {LITE0: "default", RESNET: None}
# Least cosines with float32 on the CPU; ANOTHER is for other decoders and resizers.
FLOAT32, HALF, ANOTHER = 0.9999, 0.99, 0.97
COMPARED = 128
Figures = dict[str, Any]


class OutOfTimeError(BaseException):
    """A phase has reached its limit; nothing that it calls may catch this."""


@contextlib.contextmanager
def empty_store() -> Iterator[EmbeddingStore]:
    with tempfile.TemporaryDirectory() as directory:
        store = EmbeddingStore(directory, temporary=True)
        yield store
        store.close()


class Bench:
    """What the phases share: images, device, the right embeddings, and how to measure."""

    def __init__(self, folder: Path, threads: int, *, fake: bool) -> None:
        self.folder, self.threads, self.fake = folder, threads, fake
        self.plugin = os.environ.get("SKTRANSFER_BENCH_PLUGIN") if fake else None
        self.device = torch.device("cpu" if fake and not self.plugin else "cuda")
        self.warm, self.compared = (4, 8) if fake else (256, COMPARED)
        count, tuned = (24, 48) if fake else (4096, 432)
        with multiprocessing.get_context("fork").Pool(threads) as pool:
            self.paths = pool.map(functools.partial(write_cut, folder), range(count))
            areas = pool.map(functools.partial(write_area, folder), range(tuned))
        self.train, self.test = areas[: tuned * 4 // 5], areas[tuned * 4 // 5 :]
        self.reference = functools.cache(self._reference)

    def extractor(self, network: str = LITE0, **parameters: Any) -> PretrainedFeatureExtractor:
        settings = {"device": str(self.device), "cache": None, "n_jobs": self.threads}
        extractor = PretrainedFeatureExtractor(
            network, weights=WEIGHTS[network], **(settings | parameters)
        )
        return extractor.fit(self.paths)

    def _reference(self, network: str) -> np.ndarray:
        """Embed the first images on the CPU in float32, with torch."""
        plain = self.extractor(network, device="cpu", engine="torch", precision="float32")
        return plain.transform(self.paths[: self.compared])

    def speed(
        self, run: Callable[[int], object], most: int, seconds: float, warm: int = 0
    ) -> float:
        """Measure how many a second `run` handles, with so many that it takes about that long."""
        count = min(warm or self.warm, most)
        self.seconds(run, count)
        while True:
            elapsed = self.seconds(run, count)
            if count == most or elapsed >= seconds / 2:
                return round(count / elapsed, 1)
            count = min(most, int(count * max(2, seconds / elapsed)))

    def seconds(self, run: Callable[..., object], *arguments: Any) -> float:
        start = time.perf_counter()
        run(*arguments)
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def checked(
        self,
        figures: Figures,
        name: str,
        embed: Callable[[list[Any]], np.ndarray],
        least: float = HALF,
        *,
        network: str = LITE0,
        images: list[Any] | None = None,
        seconds: float = 2.0,
    ) -> None:
        """Compare the first embeddings with the right ones, and measure the speed if they agree."""
        images = self.paths if images is None else images
        with recorded(figures, name):
            check(figures, name, embed(images[: self.compared]), self.reference(network), least)
            figures[name] = self.speed(lambda n: embed(images[:n]), len(images), seconds)
            print(f"    {name:24} {figures[name]:>10}", flush=True)


@functools.cache
def two_photographs() -> list[np.ndarray]:
    return load_sample_images().images


def write_cut(folder: Path, number: int) -> str:
    """Write a cut of 500 x 375 with a place, a side, a tone and noise of its own."""
    random, photographs = np.random.default_rng(number), two_photographs()
    top, left = random.integers(0, 427 - 375), random.integers(0, 640 - 500)
    cut = photographs[number % 2][top : top + 375, left : left + 500]
    cut = cut * random.uniform(0.5, 1.2, 3) + random.normal(0, 4, (375, 500, 1))
    path = folder / f"{number:06}.jpg"
    pixels = np.clip(cut, 0, 255).astype(np.uint8)[:, :: 1 - 2 * (number // 2 % 2)]
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=88)
    return str(path)


def write_area(folder: Path, number: int) -> str:
    """Write a cut from one of eight areas, its class (`number % 8`): a quarter of a photograph."""
    random, photographs = np.random.default_rng(number), two_photographs()
    down, right = divmod(number // 2 % 4, 2)
    top, left = down * 213 + random.integers(0, 60), right * 320 + random.integers(0, 115)
    cut = photographs[number % 2][top : top + 150, left : left + 200] * random.uniform(0.6, 1.2, 3)
    path = folder / f"area-{number:04}-{number % 8}.jpg"
    Image.fromarray(np.clip(cut, 0, 255).astype(np.uint8)).resize((480, 360)).save(path, quality=88)
    return str(path)


def labels(paths: list[str]) -> np.ndarray:
    return np.array([int(Path(path).stem[-1]) for path in paths])


def check(figures: Figures, name: str, one: np.ndarray, other: np.ndarray, least: float) -> None:
    """Record the least cosine of embeddings with the right ones, and raise if it is too low."""
    other = other[: len(one)]
    mean = other.mean(0)
    likeness = round(float(cosines(one - mean, other - mean).min()), 6)
    figures[f"{name}_cosine"] = likeness
    if not likeness >= least:
        raise ValueError(f"the cosine is {likeness}, expected at least {least}")


@contextlib.contextmanager
def recorded(figures: Figures, name: str) -> Iterator[None]:
    """Record an error instead of a figure, so that the phase goes on."""
    try:
        yield
    except ModuleNotFoundError as error:
        figures[name] = f"missing: {error}"
    except Exception as error:
        figures[name] = f"FAILED {type(error).__name__}: {error}"[:400]
        print(f"    {name:24} {figures[name]}", flush=True)


Phase = Callable[[Bench, Figures], None]
PHASES: dict[str, tuple[float, bool, Phase]] = {}


def phase(seconds: float, *, needs_device: bool = False) -> Callable[[Phase], Phase]:
    """Register a phase, its limit, and whether it has nothing to rehearse without a device."""

    def register(function: Phase) -> Phase:
        PHASES[function.__name__] = seconds, needs_device, function
        return function

    return register


def run_phase(name: str, bench: Bench, left: float) -> Figures:
    """Run a phase until it ends, fails or reaches its limit; return what it has measured."""
    limit, needs_device, function = PHASES[name]
    if needs_device and bench.fake:
        return {"skipped": "needs a real CUDA device"}
    if left < 5:
        return {"skipped": "no time is left"}
    figures: Figures = {}
    start = time.perf_counter()
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, min(limit, left))
    try:
        function(bench, figures)
    except OutOfTimeError:
        figures["FAILED"] = f"stopped after {min(limit, left):.0f} s"
    except Exception as error:
        figures["FAILED"] = f"{type(error).__name__}: {error}"[:400]
        figures["traceback"] = traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    figures["phase_seconds"] = round(time.perf_counter() - start, 1)
    return figures


def _out_of_time(*_: object) -> None:
    raise OutOfTimeError
