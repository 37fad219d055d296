"""Embedding on a CUDA device, against what decoding alone and the network alone can do there.

It needs torch, torchvision, scikit-learn and skorch, and nothing else but this repository. The
images are JPEGs of 500 x 375, cut from the photographs that come with scikit-learn; the network
is torchvision's, with random weights. Each variant runs in a fresh process; figures are images a
second, medians of three passes after the first.

ours         PretrainedFeatureExtractor(cache=None), from paths to embeddings
decode       the same threads, which decode, resize and crop, and do nothing else
forward      the network alone, in the same precision, on pixels that lie in the device's memory
captured     the same as one CUDA graph, which spares the launching of each kernel
compiled     the same, compiled by torch; for both, the seconds that this takes are told
single       one image after another through the network, as embetter does it, on the device
device_jpeg  ours with SKTRANSFER_DEVICE_JPEG=1, which decodes on the device, too
head         milliseconds in which LogisticRegression solves a head, in numpy and on the device

The embeddings have to be those of the CPU in float32: cosine at least 0.9999, and 0.999 where
another decoder read the images; captured and compiled have to give what forward gives. Fails
unless ours reaches 0.8 times the slower of decode and forward, and 10 times single. ours runs the
network as `forward` does: where captured or compiled is faster by more than what decoding hides,
that is worth changing.

    python benchmarks/gpu.py [--network resnet50] [--count 4096] [--device cuda] [--json PATH]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _common import ChildError, command_line, cosines, finish, in_fresh_process  # noqa: E402

from sktransfer import PretrainedFeatureExtractor  # noqa: E402
from sktransfer.backbones.frozen import FrozenPrefix  # noqa: E402
from sktransfer.backbones.loading import load_backbone  # noqa: E402
from sktransfer.data.decoding import decode  # noqa: E402
from sktransfer.data.images import as_images  # noqa: E402
from sktransfer.transforms.loader import ImageErrors, ImageReader  # noqa: E402
from sktransfer.transforms.views import Views  # noqa: E402
from sktransfer.utils.runtime import autocast, resolve_precision  # noqa: E402

VARIANTS = ["ours", "decode", "forward", "single", "device_jpeg"]
FASTER = ["captured", "compiled"]  # which may be faster than forward
CUTS, PASSES, COMPARED = 256, 3, 64
SHARE, TIMES = 0.8, 10
LIKENESS = {"ours": 0.9999, "device_jpeg": 0.999}
BATCH = 128


def make_folder(folder: Path, count: int) -> None:
    """Write different cuts, and link each under as many names as are needed."""
    random = np.random.default_rng(0)
    photographs = load_sample_images().images
    for number in range(CUTS):
        top, left = random.integers(0, 427 - 375), random.integers(0, 640 - 500)
        cut = photographs[number % 2][top : top + 375, left : left + 500]
        Image.fromarray(cut).save(folder / f"cut-{number:03}.jpg", quality=90)
    for number in range(count):
        os.link(folder / f"cut-{number % CUTS:03}.jpg", folder / f"{number:06}.jpg")


def median_speed(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Give images a second, of the passes after the first."""
    seconds = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds[1:])


def measure(variant: str, network: str, folder: Path, device: torch.device) -> dict:
    """Measure a variant in this process."""
    paths = [str(path) for path in sorted(folder.glob("[0-9]*.jpg"))]
    if variant in LIKENESS:
        os.environ["SKTRANSFER_DEVICE_JPEG"] = "1" if variant == "device_jpeg" else "0"
        options = {"weights": None, "cache": None, "device": str(device)}
        extractor = PretrainedFeatureExtractor(network, **options).fit(paths)
        speed = median_speed(lambda: extractor.transform(paths), len(paths), device)
        np.save(folder / f"{variant}.npy", extractor.transform(paths[:COMPARED]))
        return {"images_per_second": speed}
    backbone = load_backbone(network, None)
    if variant == "decode":
        views = Views(as_images(paths), backbone.preprocessing)
        reader = ImageReader(views, torch.get_num_threads(), ImageErrors("raise"))
        batches = [range(start, start + 16) for start in range(0, len(paths) - 15, 16)]
        run = lambda: list(reader.map(lambda pixels: np.zeros(len(pixels)), batches))  # noqa: E731
        return {"images_per_second": median_speed(run, 16 * len(batches), device)}
    prefix = FrozenPrefix(backbone.block_list).to(device, memory_format=torch.channels_last)
    precision = resolve_precision("auto", device)

    @torch.inference_mode()
    def forward(x: torch.Tensor) -> torch.Tensor:
        with autocast(device, precision):
            return prefix(x.to(device).contiguous(memory_format=torch.channels_last))

    if variant in ["forward", *FASTER]:
        pixels = [backbone.preprocessing.prepare(decode(path)) for path in paths[:BATCH]]
        x = backbone.preprocessing.normalize(torch.stack(pixels).to(device))
        right = forward(x).float().cpu().numpy()
        start = time.perf_counter()
        if variant == "compiled":
            prefix = torch.compile(prefix)
        once = captured(forward, x) if variant == "captured" else lambda: forward(x)
        likeness = float(cosines(once().float().cpu().numpy(), right).min())
        if not likeness >= LIKENESS["device_jpeg"]:
            raise ValueError(f"{variant} gives something else: the cosine is {likeness}")
        making = {} if variant == "forward" else {"making_s": time.perf_counter() - start}
        rounds = max(1, len(paths) // BATCH)
        run = lambda: [once() for _ in range(rounds)]  # noqa: E731
        speed = median_speed(run, rounds * len(x), device)
        return {"images_per_second": speed, **making}

    def one_by_one() -> None:
        for path in paths[:COMPARED]:
            pixels = backbone.preprocessing.prepare(decode(path))
            forward(backbone.preprocessing.normalize(pixels[None])).float().cpu()

    return {"images_per_second": median_speed(one_by_one, COMPARED, device)}


def captured(
    forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Record one run as a CUDA graph, after runs on another stream in which libraries settle."""
    beside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(PASSES):
            forward(x)
    torch.cuda.current_stream().wait_stream(beside)
    with torch.cuda.graph(graph):
        found = forward(x)

    def replay() -> torch.Tensor:
        graph.replay()
        return found

    return replay


def measure_head(device: torch.device) -> dict:
    """Time the solver on 20,000 embeddings of 1,280 numbers in 8 classes."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    y = random.integers(0, 8, 20_000)
    X = (random.normal(size=(20_000, 1280)) + 0.1 * random.normal(size=(8, 1280))[y]).astype("f4")
    figures, found = {}, []
    for name, arrays in {
        "numpy": (X, y),
        "device": (torch.from_numpy(X).to(device), torch.from_numpy(y).to(device)),
    }.items():
        seconds = []
        for _ in range(PASSES):
            start = time.perf_counter()
            with sklearn.config_context(array_api_dispatch=name == "device"):
                model = LogisticRegression(C=0.01, max_iter=1000).fit(*arrays)
            seconds.append(time.perf_counter() - start)
        coefficients = model.coef_
        found.append(np.asarray(coefficients.cpu() if name == "device" else coefficients))
        figures[f"{name}_ms"] = round(1000 * statistics.median(seconds))
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)
    return figures


def expected(network: str, folder: Path) -> np.ndarray:
    """Embed on the CPU, in float32, with plain torch."""
    paths = [str(path) for path in sorted(folder.glob("[0-9]*.jpg"))[:COMPARED]]
    options = {"weights": None, "cache": None, "device": "cpu", "engine": "torch"}
    return PretrainedFeatureExtractor(network, **options).fit_transform(paths)


def run_variant(variant: str, *arguments: str, threads: int) -> dict:
    """Measure a variant in a fresh process; what may be faster may also be missing."""
    try:
        found = in_fresh_process(*arguments, threads=threads)
    except ChildError as error:
        if variant not in FASTER:
            raise
        return {"missing": str(error)}
    return {key: round(value, 1) for key, value in found.items()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--network", default="resnet50", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "FOLDER"))
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.measure:
        variant, folder = options.measure
        found = (
            measure_head(device)
            if variant == "head"
            else measure(variant, options.network, Path(folder), device)
        )
        print(json.dumps(found))
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here; --device cpu tries the script without one")
    result: dict = {"network": options.network, "count": options.count, "device": options.device}
    result["cores"] = joblib.cpu_count()
    if device.type == "cuda":
        result["name"] = torch.cuda.get_device_name(device)
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name), options.count)
        common = ("--network", options.network, "--device", options.device)
        os.environ["SCIPY_ARRAY_API"] = "1"  # read when scipy is imported
        for variant in [*VARIANTS, *FASTER, "head"]:
            arguments = ("gpu.py", "--measure", variant, name, *common)
            result[variant] = run_variant(variant, *arguments, threads=options.threads)
            print(f"{variant:12}", result[variant])
        right = expected(options.network, Path(name))
        found = {variant: np.load(Path(name) / f"{variant}.npy") for variant in LIKENESS}
    for variant, least in LIKENESS.items():
        likeness = float(cosines(found[variant], right).min())
        if not likeness >= least:
            sys.exit(f"{variant} embeds something else: the cosine is {likeness}")
    ours, decoding, forward, single, _ = (result[each]["images_per_second"] for each in VARIANTS)
    result["share"] = round(ours / min(decoding, forward), 3)
    result["times_single"] = round(ours / single, 1)
    print(f"share of the limit {result['share']}, times single {result['times_single']}")
    failures = []
    if result["share"] < SHARE:
        failures.append(f"ours reaches {result['share']} of the limit, not {SHARE}")
    if result["times_single"] < TIMES:
        failures.append(f"ours is {result['times_single']} times as fast as single, not {TIMES}")
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
