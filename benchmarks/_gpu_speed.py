"""The phases of benchmarks/gpu.py that measure images per second."""

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
    HALF,
    LITE0,
    OTHER_DECODER,
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
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.embed import embed
from sktransfer.embedding.recipe import Recipe
from sktransfer.transforms.augmentation import POLICIES, resolve_augmentation
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views


@phase(35)
def decoding(bench: Bench, figures: Figures) -> None:
    """Measure decoding, before CUDA is in use, so that processes can be forked."""
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
        speeds = figures[network] = {}
        embed = bench.extractor(network).transform
        bench.checked(speeds, "sktransfer", embed, OTHER_DECODER, network=network, seconds=4)
        paths = bench.paths[: bench.compared]
        speeds["repeat_differs_by"] = float(abs(embed(paths) - embed(paths)).max())
        if network == RESNET:
            continue
        paths, arrays = bench.paths[:2048], [decode(path) for path in bench.paths[:512]]
        with recorded(speeds, "store"), empty_store() as store:
            run = bench.extractor(cache=store).transform
            speeds["store"] = round(len(paths) / bench.seconds(run, paths), 1)
        for batch in () if bench.fake else (64, 128, 256, 1024):
            embed = bench.extractor(batch_size=batch).transform
            bench.checked(speeds, f"batch_{batch}", embed, OTHER_DECODER)
        for threads in () if bench.fake else (1, 2, 4, 2 * bench.threads):
            embed = bench.extractor(n_jobs=threads).transform
            bench.checked(speeds, f"threads_{threads}", embed, OTHER_DECODER)
        bench.checked(speeds, "arrays", bench.extractor().transform, images=arrays)
        embed = bench.extractor().transform
        stack = np.stack([arrays[row % len(arrays)] for row in range(4 * len(arrays))])
        bench.checked(speeds, "stack", embed, images=stack)
        on_device = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous().to(bench.device)
        bench.checked(speeds, "stack_on_device", embed, images=on_device)
        with recorded(speeds, "arrays_store"), empty_store() as store:
            run = bench.extractor(cache=store).transform
            speeds["arrays_store"] = round(len(arrays) / bench.seconds(run, arrays), 1)


@phase(40)
def forward(bench: Bench, figures: Figures) -> None:
    for network in [LITE0] if bench.fake else [LITE0, RESNET]:
        speeds = figures[network] = {}
        backbone = load_backbone(network, WEIGHTS[network])
        plain = copy.deepcopy(FrozenPrefix(backbone.block_list)).to(bench.device)
        plain = plain.to(memory_format=torch.channels_last)
        nets = {"autocast": plain, "half": copy.deepcopy(plain).half()}
        if bench.fake:
            del nets["half"]  # few CPUs support float16
        images = normalized(bench, backbone)
        for size in (8,) if bench.fake else (64, 128, 256, 512):
            repeats = -(-size // bench.compared)
            x = images.repeat(repeats, 1, 1, 1)[:size]
            x = x.contiguous(memory_format=torch.channels_last)
            expected = np.tile(bench.reference(network), (repeats, 1))[:size]
            for name, net in nets.items():
                once = functools.partial(compute, net, x if name == "autocast" else x.half())
                measure_forward(bench, speeds, f"{name}_{size}", once, expected)
                if size in (128, 256):
                    with recorded(speeds, f"{name}_{size}_graph"):
                        once = captured(once)
                        measure_forward(bench, speeds, f"{name}_{size}_graph", once, expected)


def normalized(bench: Bench, backbone: Backbone) -> torch.Tensor:
    """Preprocess the first images, and move them to the device."""
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
    """Record one run as a CUDA graph, after warm-up runs on another stream."""
    side_stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side_stream)
    with torch.cuda.graph(graph):
        output = once()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def measure_forward(
    bench: Bench,
    figures: Figures,
    name: str,
    once: Callable[[], torch.Tensor],
    expected: np.ndarray,
) -> None:
    with recorded(figures, name):
        check(figures, name, once().float().cpu().numpy(), expected, HALF)
        run = lambda n: [once() for _ in range(n)]  # noqa: E731
        max_runs = 2 if bench.fake else 10_000
        figures[name] = round(bench.speed(run, max_runs, 0.5, warm_up=8) * len(expected), 1)


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
            bench.checked(figures, name, embed, OTHER_DECODER, images=bench.paths[:64])

    @torch.inference_mode()
    def loop(workers: int, half: bool, paths: list[str]) -> np.ndarray:
        images = Photographs(paths)
        loader = torch.utils.data.DataLoader(
            images, 128, num_workers=workers, pin_memory=bench.device.type == "cuda"
        )
        embeddings = []
        for x in loader:
            x = x.to(bench.device, non_blocking=True)
            with torch.autocast(bench.device.type, torch.float16, enabled=half):
                y = net(x.contiguous(memory_format=torch.channels_last))
            embeddings.append(y.float().cpu().numpy())
        return np.concatenate(embeddings)

    kinds = [(0, False)] if bench.fake else [(0, False), (16, False), (16, True)]
    for workers, half in kinds:
        name = f"loop_{workers}_workers" + "_half" * half
        embed = functools.partial(loop, workers, half)
        images = bench.paths if workers else bench.paths[:256]
        bench.checked(figures, name, embed, OTHER_DECODER, images=images, seconds=3)


@phase(30)
def nvjpeg(bench: Bench, figures: Figures) -> None:
    if bench.device.type != "cuda":
        figures["skipped"] = "needs a CUDA device, real or emulated"
        return
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in bench.paths[:1024]]
    decoded = decode_jpeg(data[:8], ImageReadMode.RGB, bench.device)
    expected = [decode(path).astype(int) for path in bench.paths[:8]]
    figures["mean_pixel_difference"] = [
        round(float(abs(pixels.cpu().permute(1, 2, 0).numpy() - expected_pixels).mean()), 3)
        for pixels, expected_pixels in zip(decoded, expected, strict=True)
    ]

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
    bench.checked(figures, "plain_loop", nvjpeg_loop(bench), OTHER_DECODER)
    with recorded(figures, "decoded_on_the_device"):
        figures["decoded_on_the_device"] = count_decoded(bench)
    with mock.patch.dict(os.environ, SKTRANSFER_DEVICE_JPEG="0"):
        embed = bench.extractor().transform
        bench.checked(figures, "sktransfer_decoding_on_the_cpu", embed, HALF, seconds=3)


def nvjpeg_loop(bench: Bench) -> Callable[[list[str]], np.ndarray]:
    """Build a plain loop that decodes, resizes, crops and embeds batches on the device."""
    from torchvision.io import ImageReadMode, decode_jpeg

    backbone = load_backbone(LITE0)
    net = copy.deepcopy(FrozenPrefix(backbone.block_list)).to(bench.device)
    net = net.to(memory_format=torch.channels_last)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1).to(bench.device)
        for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )

    @torch.inference_mode()
    def embed(paths: list[str]) -> np.ndarray:
        embeddings = []
        for start in range(0, len(paths), 128):
            data = [torch.from_numpy(np.fromfile(p, np.uint8)) for p in paths[start : start + 128]]
            x = torch.stack(decode_jpeg(data, ImageReadMode.RGB, bench.device)).float()
            x = functional.interpolate(x, (256, 341), mode="bicubic", antialias=True)
            x = (x[..., 16:240, 58:282].clamp(0, 255) / 255 - mean) / std
            x = x.contiguous(memory_format=torch.channels_last)
            embeddings.append(compute(net, x).float())
        return torch.cat(embeddings).cpu().numpy()

    return embed


def count_decoded(bench: Bench) -> str:
    """Count the images that PretrainedFeatureExtractor decodes on the device."""
    from sktransfer.transforms import device_feed

    decode_on_device, counts, paths = device_feed._decode, [0], bench.paths[: bench.compared]

    def counted(*arguments: object) -> dict[int, torch.Tensor]:
        images = decode_on_device(*arguments)
        counts.append(len(images))
        return images

    with mock.patch.object(device_feed, "_decode", counted):
        bench.extractor().transform(paths)
    return f"{sum(counts)} of {len(paths)}"


@phase(30)
def views(bench: Bench, figures: Figures) -> None:
    backbone, n_views = load_backbone(LITE0), 3
    plain = bench.extractor(device="cpu", engine="torch", precision="float32")
    on_cpu, on_device = ComputeConfig.of(plain), ComputeConfig.of(bench.extractor())
    paths = bench.paths[: 4 if bench.fake else 32]

    def embed_views(policy: str, compute: ComputeConfig, paths: list[str]) -> np.ndarray:
        augmentation = resolve_augmentation(policy)
        of_paths = Views(as_images(paths), backbone.preprocessing, augmentation, n_views)
        recipe = Recipe(backbone, backbone.preprocessing, precision=compute.precision)
        return embed(of_paths, recipe, compute).embeddings

    for policy in POLICIES:
        with recorded(figures, policy):
            run = functools.partial(embed_views, policy)
            check(figures, policy, run(on_device, paths), run(on_cpu, paths), OTHER_DECODER)
            images = bench.speed(lambda n, run=run: run(on_device, bench.paths[:n]), 1024, 1)
            figures[policy] = round(images * (1 + n_views), 1)
            print(f"    {policy:24} {figures[policy]:>10}", flush=True)


@phase(40, needs_device=True)
def compiled(bench: Bench, figures: Figures) -> None:
    backbone = load_backbone(LITE0)
    net = copy.deepcopy(FrozenPrefix(backbone.block_list)).to(bench.device).half()
    net = torch.compile(net.to(memory_format=torch.channels_last))
    x = normalized(bench, backbone).half()
    once = functools.partial(compute, net, x.contiguous(memory_format=torch.channels_last))
    figures["compile_seconds"] = round(bench.seconds(once), 1)
    measure_forward(bench, figures, "half_128", once, bench.reference(LITE0))
