"""Code shared by the phases of benchmarks/gpu.py: images, expected embeddings, timing, limits."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
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
# Minimum cosines with float32 on the CPU: in float32, in half precision, and for code that decodes
# or resizes differently (also in bfloat16).
FLOAT32, HALF, OTHER_DECODER = 0.9999, 0.99, 0.97
N_COMPARED = 128
Figures = dict[str, Any]


class OutOfTimeError(BaseException):
    """A phase has reached its time limit.

    This derives from BaseException so that `except Exception` inside a phase does not catch it.
    """


@contextlib.contextmanager
def empty_store() -> Iterator[EmbeddingStore]:
    with tempfile.TemporaryDirectory() as directory:
        store = EmbeddingStore(directory, temporary=True)
        yield store
        store.close()


class Bench:
    """Shared by all phases: images, device, expected embeddings, and methods that measure."""

    def __init__(self, folder: Path, threads: int, *, fake: bool) -> None:
        self.folder, self.threads, self.fake = folder, threads, fake
        self.device = torch.device("cuda")
        self.warm_up, self.compared = (4, 8) if fake else (256, N_COMPARED)
        n_cuts, n_areas = (24, 48) if fake else (4096, 432)
        with multiprocessing.get_context("fork").Pool(threads) as pool:
            self.paths = pool.map(functools.partial(write_cut, folder), range(n_cuts))
            areas = pool.map(functools.partial(write_area, folder), range(n_areas))
        self.train, self.test = areas[: n_areas * 4 // 5], areas[n_areas * 4 // 5 :]
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
        self, run: Callable[[int], object], max_count: int, seconds: float, warm_up: int = 0
    ) -> float:
        """Measure the images per second of `run`.

        The number of images is increased until a run takes about `seconds`, or to `max_count`.
        """
        count = min(warm_up or self.warm_up, max_count)
        self.seconds(run, count)
        while True:
            elapsed = self.seconds(run, count)
            if count == max_count or elapsed >= seconds / 2:
                return round(count / elapsed, 1)
            count = min(max_count, int(count * max(2, seconds / elapsed)))

    def seconds(self, run: Callable[..., object], *arguments: Any) -> float:
        start = time.perf_counter()
        run(*arguments)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def checked(
        self,
        figures: Figures,
        name: str,
        embed: Callable[[list[Any]], np.ndarray],
        minimum: float = HALF,
        *,
        network: str = LITE0,
        images: Any = None,
        seconds: float = 2.0,
    ) -> None:
        """Check the first embeddings, and measure the speed if they are correct."""
        images = self.paths if images is None else images
        with recorded(figures, name):
            embeddings = embed(images[: self.compared])
            check(figures, name, embeddings, self.reference(network), minimum)
            figures[name] = self.speed(lambda n: embed(images[:n]), len(images), seconds)
            print(f"    {name:24} {figures[name]:>10}", flush=True)


@functools.cache
def two_photographs() -> list[np.ndarray]:
    return load_sample_images().images


def write_cut(folder: Path, number: int) -> str:
    """Write a crop of 500 x 375 with random position, mirroring, tone and noise."""
    random, photographs = np.random.default_rng(number), two_photographs()
    top, left = random.integers(0, 427 - 375), random.integers(0, 640 - 500)
    cut = photographs[number % 2][top : top + 375, left : left + 500]
    cut = cut * random.uniform(0.5, 1.2, 3) + random.normal(0, 4, (375, 500, 1))
    path = folder / f"{number:06}.jpg"
    pixels = np.clip(cut, 0, 255).astype(np.uint8)[:, :: 1 - 2 * (number // 2 % 2)]
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=88)
    return str(path)


def write_area(folder: Path, number: int) -> str:
    """Write a crop of one of eight areas, quarters of photographs. Its class is `number % 8`."""
    random, photographs = np.random.default_rng(number), two_photographs()
    down, right = divmod(number // 2 % 4, 2)
    top, left = down * 213 + random.integers(0, 60), right * 320 + random.integers(0, 115)
    cut = photographs[number % 2][top : top + 150, left : left + 200] * random.uniform(0.6, 1.2, 3)
    path = folder / f"area-{number:04}-{number % 8}.jpg"
    Image.fromarray(np.clip(cut, 0, 255).astype(np.uint8)).resize((480, 360)).save(path, quality=88)
    return str(path)


def area_labels(paths: list[str]) -> np.ndarray:
    return np.array([int(Path(path).stem[-1]) for path in paths])


def check(
    figures: Figures, name: str, embeddings: np.ndarray, expected: np.ndarray, minimum: float
) -> None:
    """Record the minimum cosine with the expected embeddings, and raise if it is too low."""
    expected = expected[: len(embeddings)]
    mean = expected.mean(0)
    cosine = round(float(cosines(embeddings - mean, expected - mean).min()), 6)
    figures[f"{name}_cosine"] = cosine
    if not cosine >= minimum:
        raise ValueError(f"Got a minimum cosine of {cosine}, expected at least {minimum}")


@contextlib.contextmanager
def recorded(figures: Figures, name: str) -> Iterator[None]:
    """Record an error instead of a figure, so that the phase continues."""
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
    """Register a phase with its time limit, and whether it needs a real device."""

    def register(function: Phase) -> Phase:
        PHASES[function.__name__] = seconds, needs_device, function
        return function

    return register


def run_phase(name: str, bench: Bench, left: float) -> Figures:
    """Run a phase until it ends, fails or reaches its time limit, and return its figures."""
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
