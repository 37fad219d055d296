"""The phases of benchmarks/gpu.py whose figures are images a second."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import torch
from _gpu import (
    ANOTHER,
    HALF,
    LITE0,
    RESNET,
    WEIGHTS,
    Bench,
    Figures,
    check,
    empty_store,
    phase,
    recorded,
)
from PIL import Image
from torch.nn import functional

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.backbones.loading import Backbone, load_backbone
from sktransfer.data.decoding import decode
from sktransfer.data.images import as_images
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views


@phase(35)
def decoding(bench: Bench, figures: Figures) -> None:
    """Run before CUDA is in use, so that processes can be forked."""
    views = Views(as_images(bench.paths), load_backbone(LITE0).preprocessing)

    def read(threads: int, count: int) -> None:
        rows = [range(start, min(count, start + 16)) for start in range(0, count, 16)]
        reader = ImageReader(views, threads, ImageErrors("raise"))
        for _ in reader.map(lambda pixels: np.zeros(len(pixels)), rows):
            pass

    for threads in (1, 2) if bench.fake else (1, 4, 8, 16, 32):
        run = functools.partial(read, threads)
        figures[f"threads_{threads}"] = bench.speed(run, len(bench.paths), 1.5)

    def read_with_torchvision(count: int) -> None:
        with ThreadPoolExecutor(bench.threads, "decode", torch.set_num_threads, (1,)) as pool:
            list(pool.map(functools.partial(prepare, views.preprocessing), bench.paths[:count]))

    with recorded(figures, "torchvision"):
        figures["torchvision"] = bench.speed(read_with_torchvision, len(bench.paths), 1.5)
    with multiprocessing.get_context("fork").Pool(bench.threads) as pool:
        run = lambda n: pool.map(prepare_with_pillow, bench.paths[:n], 8)  # noqa: E731
        figures["processes"] = bench.speed(run, len(bench.paths), 2)


def prepare(preprocessing: Preprocessing, path: str) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    data = torch.from_numpy(np.fromfile(path, np.uint8))
    pixels = decode_jpeg(data, ImageReadMode.RGB)
    return preprocessing.cropped(preprocessing.resized(pixels))


def prepare_with_pillow(path: str) -> int:
    with Image.open(path) as image:
        return image.convert("RGB").resize((341, 256), Image.Resampling.BICUBIC).size[0]


@phase(55)
def embedding(bench: Bench, figures: Figures) -> None:
    for network in [LITE0] if bench.fake else [LITE0, RESNET]:
        found = figures[network] = {}
        embed = bench.extractor(network).transform
        bench.checked(found, "ours", embed, network=network, seconds=4)
        few = bench.paths[: bench.compared]
        found["repeat_differs_by"] = float(abs(embed(few) - embed(few)).max())
        if network == RESNET:
            continue
        some, arrays = bench.paths[:2048], [decode(path) for path in bench.paths[:512]]
        with recorded(found, "ours_store"), empty_store() as store:
            run = bench.extractor(cache=store).transform
            found["ours_store"] = round(len(some) / bench.seconds(run, some), 1)
        for batch in () if bench.fake else (32, 64, 256, 512):
            embed = bench.extractor(batch_size=batch).transform
            bench.checked(found, f"ours_batch_{batch}", embed)
        embed = bench.extractor(n_jobs=2 * bench.threads).transform
        bench.checked(found, "ours_twice_threads", embed)
        bench.checked(found, "arrays", bench.extractor().transform, images=arrays)
        with recorded(found, "arrays_store"), empty_store() as store:
            run = bench.extractor(cache=store).transform
            found["arrays_store"] = round(len(arrays) / bench.seconds(run, arrays), 1)


@phase(40)
def forward(bench: Bench, figures: Figures) -> None:
    for network in [LITE0] if bench.fake else [LITE0, RESNET]:
        found = figures[network] = {}
        backbone = load_backbone(network, WEIGHTS[network])
        plain = copy.deepcopy(FrozenPrefix(backbone.block_list)).to(bench.device)
        plain = plain.to(memory_format=torch.channels_last)
        nets = {"autocast": plain, "half": copy.deepcopy(plain).half()}
        if bench.fake:
            del nets["half"]  # few CPUs compute it
        images = normalized(bench, backbone)
        for size in (8,) if bench.fake else (64, 128, 256, 512):
            repeats = -(-size // bench.compared)
            x = images.repeat(repeats, 1, 1, 1)[:size]
            x = x.contiguous(memory_format=torch.channels_last)
            right = np.tile(bench.reference(network), (repeats, 1))[:size]
            for name, net in nets.items():
                once = functools.partial(compute, net, x if name == "autocast" else x.half())
                measure_forward(bench, found, f"{name}_{size}", once, right)
                if size in (128, 256):
                    with recorded(found, f"{name}_{size}_graph"):
                        once = captured(once)
                        measure_forward(bench, found, f"{name}_{size}_graph", once, right)


def normalized(bench: Bench, backbone: Backbone) -> torch.Tensor:
    """Put the first images on the device, ready for the network."""
    paths, preprocessing = bench.paths[: bench.compared], backbone.preprocessing
    pixels = torch.stack([preprocessing.prepare(decode(path)) for path in paths])
    return preprocessing.normalize(pixels.to(bench.device))


@torch.inference_mode()
def compute(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(
        x.device.type, torch.float16, enabled=x.dtype == torch.float32 and x.is_cuda
    ):
        return net(x)


def captured(once: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Record one run as a CUDA graph, after runs on another stream in which libraries settle."""
    beside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(beside)
    with torch.cuda.graph(graph):
        found = once()

    def replay() -> torch.Tensor:
        graph.replay()
        return found

    return replay


def measure_forward(
    bench: Bench, figures: Figures, name: str, once: Callable[[], torch.Tensor], right: np.ndarray
) -> None:
    with recorded(figures, name):
        check(figures, name, once().float().cpu().numpy(), right, HALF)
        run = lambda n: [once() for _ in range(n)]  # noqa: E731
        most = 2 if bench.fake else 10_000
        figures[name] = round(bench.speed(run, most, 0.5, warm=8) * len(right), 1)


@phase(45)
def peers(bench: Bench, figures: Figures) -> None:
    import _peers
    from _engines import Photographs, headless

    net = headless().to(bench.device, memory_format=torch.channels_last)

    class OnDevice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return net(x.to(bench.device)).cpu()

    for name, build in {"embetter": headless, "embetter_on_device": OnDevice}.items():
        with recorded(figures, name), mock.patch.object(_peers, "headless", build):
            embed = _peers.embetter()
            bench.checked(figures, name, embed, ANOTHER, images=bench.paths[:64])

    @torch.inference_mode()
    def loop(workers: int, half: bool, paths: list[str]) -> np.ndarray:
        images = Photographs(paths)
        loader = torch.utils.data.DataLoader(
            images, 128, num_workers=workers, pin_memory=bench.device.type == "cuda"
        )
        found = []
        for x in loader:
            x = x.to(bench.device, non_blocking=True)
            with torch.autocast(bench.device.type, torch.float16, enabled=half):
                y = net(x.contiguous(memory_format=torch.channels_last))
            found.append(y.float().cpu().numpy())
        return np.concatenate(found)

    kinds = [(0, False)] if bench.fake else [(0, False), (16, False), (16, True)]
    for workers, half in kinds:
        name = f"loop_{workers}_workers" + "_half" * half
        embed = functools.partial(loop, workers, half)
        images = bench.paths if workers else bench.paths[:256]
        bench.checked(figures, name, embed, ANOTHER, images=images, seconds=3)


@phase(30)
def nvjpeg(bench: Bench, figures: Figures) -> None:
    if bench.device.type != "cuda":
        figures["skipped"] = "needs a CUDA device, or one that is emulated"
        return
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in bench.paths[:1024]]
    decoded = decode_jpeg(data[:8], ImageReadMode.RGB, bench.device)
    right = [decode(path).astype(int) for path in bench.paths[:8]]
    pairs = zip(decoded, right, strict=True)
    differences = [abs(one.cpu().permute(1, 2, 0).numpy() - other).mean() for one, other in pairs]
    figures["gray_levels_apart"] = [round(float(each), 3) for each in differences]

    def decode_all(size: int, count: int) -> list[torch.Tensor]:
        starts = range(0, count, size)
        parts = [data[start : min(count, start + size)] for start in starts]
        return [x for part in parts for x in decode_jpeg(part, ImageReadMode.RGB, bench.device)]

    for size in (4,) if bench.fake else (32, 128, 512):
        run = functools.partial(decode_all, size)
        figures[f"decode_{size}"] = bench.speed(run, len(data), 1)
    with recorded(figures, "truncated_file"):
        try:
            decode_jpeg([data[0][:20_000]], ImageReadMode.RGB, bench.device)
            figures["truncated_file"] = "decoded without an error"
        except RuntimeError as error:
            figures["truncated_file"] = f"refused: {error}"[:100]
    bench.checked(figures, "plain_loop", nvjpeg_loop(bench), ANOTHER)
    with mock.patch.dict(os.environ, SKTRANSFER_DEVICE_JPEG="1"):
        bench.checked(figures, "ours", bench.extractor().transform, ANOTHER, seconds=3)
        with recorded(figures, "decoded_on_the_device"):
            figures["decoded_on_the_device"] = count_decoded(bench)


def nvjpeg_loop(bench: Bench) -> Callable[[list[str]], np.ndarray]:
    """Build what a user would write: decode, resize, crop and run a batch on the device."""
    from torchvision.io import ImageReadMode, decode_jpeg

    backbone = load_backbone(LITE0)
    net = copy.deepcopy(FrozenPrefix(backbone.block_list)).to(bench.device)
    net = net.to(memory_format=torch.channels_last)
    mean, std = (
        torch.tensor(each).view(-1, 1, 1).to(bench.device)
        for each in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )

    @torch.inference_mode()
    def embed(paths: list[str]) -> np.ndarray:
        found = []
        for start in range(0, len(paths), 128):
            data = [torch.from_numpy(np.fromfile(p, np.uint8)) for p in paths[start : start + 128]]
            x = torch.stack(decode_jpeg(data, ImageReadMode.RGB, bench.device)).float()
            x = functional.interpolate(x, (256, 341), mode="bicubic", antialias=True)
            x = (x[..., 16:240, 58:282].clamp(0, 255) / 255 - mean) / std
            found.append(compute(net, x.contiguous(memory_format=torch.channels_last)).float())
        return torch.cat(found).cpu().numpy()

    return embed


def count_decoded(bench: Bench) -> str:
    """Count the images that PretrainedFeatureExtractor decodes on the device."""
    from sktransfer.transforms import views

    real, counts, few = views.prepare_jpegs, [0], bench.paths[: bench.compared]

    def counted(*arguments: object) -> dict[int, torch.Tensor]:
        found = real(*arguments)
        counts.append(len(found))
        return found

    with mock.patch.object(views, "prepare_jpegs", counted):
        bench.extractor().transform(few)
    return f"{sum(counts)} of {len(few)}"


@phase(40, needs_device=True)
def compiled(bench: Bench, figures: Figures) -> None:
    backbone = load_backbone(LITE0)
    net = copy.deepcopy(FrozenPrefix(backbone.block_list)).to(bench.device).half()
    net = torch.compile(net.to(memory_format=torch.channels_last))
    x = normalized(bench, backbone).half()
    once = functools.partial(compute, net, x.contiguous(memory_format=torch.channels_last))
    figures["making_seconds"] = round(bench.seconds(once), 1)
    measure_forward(bench, figures, "half_128", once, bench.reference(LITE0))
