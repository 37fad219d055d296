"""Measure speed and check results on a CUDA device, in one run of less than six minutes.

The run needs this repository and its dependencies, but neither network nor other files. The images
are distinct JPEGs of 500 x 375, cut from the two photographs that come with scikit-learn. The
networks are EfficientNet-Lite0 with its weights and ResNet-50 with random weights. Figures without
a unit are images per second. Each phase has a time limit. A phase that fails or runs out of time
records this and keeps its figures, and the other phases still run. The JSON file is written after
each phase.

machine    device, driver, versions, cores
decoding   the image loader on 1 to 32 threads; torchvision's decoder on threads; Pillow in
           processes
embedding  PretrainedFeatureExtractor: from paths, into a store, with other batch sizes and numbers
           of threads, from arrays
forward    only the network: under autocast and with half-precision weights, with and without a
           CUDA graph
peers      embetter with its defaults and with its network on the device; plain DataLoader loops
tuning     FineTunedImageClassifier: seconds, accuracy, reproducibility, its pickle on a CPU
equal      each precision compared with float32 on the CPU; batches of 7; too little memory
nvjpeg     decoding on the device: alone, in a plain loop, and not in PretrainedFeatureExtractor
views      views per second: each image and three augmented views of it, for each policy
tests      the tests marked gpu
head       seconds to fit the head, on the device and on the CPU
workers    a grid search in two processes on one device, and a forked child process
compiled   the network compiled with torch.compile

A speed is measured only if the embeddings are correct, by their minimum cosine with embeddings
computed on the CPU in float32. The mean embedding is subtracted from both first, because otherwise
all images have a high cosine.

    python benchmarks/gpu.py [--only machine,embedding] [--seconds 345] [--fake] [--json PATH]

--fake, or FAKE=1 in the environment, rehearses the run on a few images without a GPU, on the
emulated device of the tests.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("SCIPY_ARRAY_API", "1")  # read when scipy is imported
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that processes can be forked
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _gpu_speed  # noqa: F401 - registers its phases
import joblib
import numpy as np
import torch
from _common import ROOT, command_line, cpu_name
from _gpu import (
    FLOAT32,
    HALF,
    LITE0,
    OTHER_DECODER,
    PHASES,
    Bench,
    Figures,
    area_labels,
    check,
    empty_store,
    phase,
    recorded,
    run_phase,
)

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor
from sktransfer.finetuning.head import LabeledEmbeddings, fit_logistic_regression

# Phases that do not use CUDA come first, because they fork processes.
ORDER = [
    *["machine", "decoding", "embedding", "forward", "peers", "tuning"],
    *["equal", "nvjpeg", "views", "tests", "head", "workers", "compiled"],
]


@phase(15)
def machine(bench: Bench, figures: Figures) -> None:
    packages = ["torch", "torchvision", "sklearn", "PIL", "skorch", "numpy"]
    for name in packages:
        with recorded(figures, name):
            figures[name] = importlib.import_module(name).__version__
    figures |= {"python": sys.version.split()[0], "cuda": torch.version.cuda, "cpu": cpu_name()}
    figures |= {"cores": joblib.cpu_count(), "torch_threads": torch.get_num_threads()}
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total"
    with contextlib.suppress(FileNotFoundError):
        smi = ["nvidia-smi", query, "--format=csv,noheader"]
        figures["card"] = subprocess.run(smi, capture_output=True, text=True).stdout.strip()


@phase(65)
def tuning(bench: Bench, figures: Figures) -> None:
    import tuning as textbook

    small = {"n_views": 1, "max_epochs": 1, "image_size": 32} if bench.fake else {}
    y, y_test = area_labels(bench.train), area_labels(bench.test)

    def fit(name: str) -> FineTunedImageClassifier:
        classifier = FineTunedImageClassifier(
            random_state=0, device=str(bench.device), cache=None, **small
        )
        figures[name] = round(bench.seconds(classifier.fit, bench.train, y), 2)
        print(f"    {name:24} {figures[name]:>10}", flush=True)
        return classifier

    first, second = fit("first_seconds"), fit("seconds")
    figures["accuracy"] = float(np.mean(second.predict(bench.test) == y_test))
    figures["stages"] = [(stage["stage"], stage["seconds"]) for stage in second.stages_]
    p = second.predict_proba(bench.test)
    figures["same_fit_differs_by"] = float(abs(first.predict_proba(bench.test) - p).max())
    predict = lambda n: second.predict(bench.paths[:n])  # noqa: E731
    figures["predict"] = bench.speed(predict, len(bench.paths), 2)
    with recorded(figures, "on_a_cpu"):
        saved = bench.folder / "classifier.pkl"
        saved.write_bytes(pickle.dumps((second.set_params(device="auto"), bench.test, p)))
        figures["on_a_cpu"] = in_child("predict", saved, CUDA_VISIBLE_DEVICES="")
    for workers in (0,) if bench.fake else (16, 0):
        loader = partial(textbook.DataLoader, num_workers=workers, persistent_workers=workers > 0)
        name = f"loop_{workers}_workers_seconds"
        with recorded(figures, name), mock.patch.object(textbook, "DataLoader", loader):
            loop = textbook.TextbookLoop()
            loop.epochs = 1  # a tenth of its epochs
            figures[name] = round(10 * bench.seconds(loop.fit, bench.train, y), 1)


@phase(30)
def equal(bench: Bench, figures: Figures) -> None:
    paths, expected = bench.paths[: bench.compared], bench.reference(LITE0)
    minima = {"float32": FLOAT32, "bfloat16": OTHER_DECODER, "float16": HALF}
    for precision, minimum in minima.items():
        with recorded(figures, precision):
            embed = bench.extractor(precision=precision).transform
            check(figures, precision, embed(paths), expected, minimum)
    with recorded(figures, "batch_7"):
        check(figures, "batch_7", bench.extractor(batch_size=7).transform(paths), expected, HALF)
    if bench.fake:
        figures["too_little_memory"] = "needs a real CUDA device"
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.mem_get_info()[1])
    try:
        with recorded(figures, "too_little_memory"):
            embed = bench.extractor(batch_size=1024, n_jobs=4).transform
            embeddings = embed(bench.paths[:2048])[: len(paths)]
            check(figures, "too_little_memory", embeddings, expected, HALF)
            figures["out_of_memory_errors"] = torch.cuda.memory_stats()["num_ooms"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@phase(45, needs_device=True)
def tests(bench: Bench, figures: Figures) -> None:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, "-o", "filterwarnings=default", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    figures["tail"] = done.stdout[-1500:]
    if done.returncode:
        raise RuntimeError(f"pytest ended with code {done.returncode}")


@phase(30)
def head(bench: Bench, figures: Figures) -> None:
    random, n = np.random.default_rng(0), 64 if bench.fake else 16_384
    y = random.integers(0, 8, n)
    x = random.normal(size=(n, 1, 1280)) + 0.1 * random.normal(size=(8, 1, 1280))[y]
    data = LabeledEmbeddings(x.astype(np.float32), y, np.ones(n))
    heads = {}
    for device in (bench.device, torch.device("cpu")):
        start = time.perf_counter()
        valid = data.take(np.arange(n // 4))
        heads[device.type] = fit_logistic_regression(data, valid, 8, device=device)
        figures[f"{device.type}_seconds"] = round(time.perf_counter() - start, 2)
    weight, expected = heads[bench.device.type].weight, heads["cpu"].weight
    figures["differs_by"] = float(abs(weight - expected).max() / abs(expected).max())


@phase(45, needs_device=True)
def workers(bench: Bench, figures: Figures) -> None:
    saved = bench.folder / "search.pkl"
    saved.write_bytes(pickle.dumps((bench.train, area_labels(bench.train))))
    figures |= in_child("search", saved)


def in_child(task: str, saved: Path, **environment: str) -> dict:
    """Run a task in a fresh process, and parse the JSON in its last line."""
    command = [sys.executable, __file__, "--child", task, str(saved)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])
    return json.loads(done.stdout.splitlines()[-1])


def predict_without_device(saved: Path) -> dict:
    """Predict on the CPU with a classifier that was fitted on a device."""
    classifier, paths, expected = pickle.loads(saved.read_bytes())
    p = classifier.predict_proba(paths)
    same = float((p.argmax(1) == expected.argmax(1)).mean())
    figures: Figures = {"differs_by": float(abs(p - expected).max()), "same_classes": same}
    try:
        classifier.set_params(device="cuda").predict(paths)
    except ValueError as error:
        figures["with_device_cuda"] = str(error)
    return figures


def search(saved: Path) -> dict:
    """Run a grid search in one process and in two on one device, then embed in a forked process."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    X, y = pickle.loads(saved.read_bytes())
    figures: Figures = {}
    for jobs in (1, 2):
        with empty_store() as store:
            model = make_pipeline(PretrainedFeatureExtractor(cache=store), LogisticRegression())
            grid = {"logisticregression__C": [0.01, 0.1]}
            start = time.perf_counter()
            best = GridSearchCV(model, grid, cv=3, n_jobs=jobs).fit(X, y).best_score_
            seconds = round(time.perf_counter() - start, 1)
            computed = store.info().computed
            figures[f"{jobs}_jobs"] = {"seconds": seconds, "score": best, "computed": computed}
    figures["images"] = len(X)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=embed_in_fork, args=(X[:4], queue))
    process.start()
    try:
        figures["fork"] = queue.get(timeout=10)
    except Exception:
        figures["fork"] = "FAILED: no answer after 10 s"
    process.kill()
    return figures


def embed_in_fork(paths: list[str], queue: multiprocessing.Queue) -> None:
    try:
        queue.put(str(PretrainedFeatureExtractor(cache=None).fit_transform(paths).shape))
    except BaseException as error:
        queue.put(f"FAILED {type(error).__name__}: {error}"[:300])


CHILDREN = {"predict": predict_without_device, "search": search}


def relative_speeds(result: dict) -> dict:
    """Divide the speed of sktransfer by those of decoding, the network and the other loops."""
    ratios = {}
    speed = result["embedding"][LITE0]["sktransfer"]
    for phase_name, figures in [
        ("decoding", result["decoding"]),
        ("forward", result["forward"][LITE0]),
        ("peers", result["peers"]),
        ("nvjpeg", result["nvjpeg"]),
    ]:
        speeds = {k: v for k, v in figures.items() if isinstance(v, float)}
        for name in speeds:
            if "cosine" not in name and "seconds" not in name:
                ratios[f"{phase_name}_{name}"] = round(speed / speeds[name], 3)
    return ratios


def failures(figures: object, key: str = "") -> Iterator[str]:
    """Yield all failures recorded in the figures, with their keys."""
    if isinstance(figures, dict):
        for name, value in figures.items():
            if name == "FAILED":
                yield f"{key}: {value}"
            yield from failures(value, f"{key} {name}".strip())
    elif isinstance(figures, str) and figures.startswith("FAILED"):
        yield f"{key}: {figures}"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", help="phases to run, separated by commas; default: all")
    parser.add_argument(
        "--seconds", type=float, default=345, help="limit of the whole run; default: %(default)s"
    )
    parser.add_argument(
        "--fake",
        action="store_true",
        default=os.environ.get("FAKE") == "1",
        help="rehearse without a GPU",
    )
    parser.add_argument(
        "--child", nargs=2, metavar=("TASK", "FILE"), help="run a task in this process"
    )
    options = parser.parse_args()
    if options.child:
        task, saved = options.child
        print(json.dumps(CHILDREN[task](Path(saved))))
        return
    names = options.only.split(",") if options.only else ORDER
    if unknown := set(names) - set(PHASES):
        parser.error(f"Got {sorted(unknown)} in --only, expected some of {', '.join(PHASES)}")
    if not options.fake and not torch.cuda.is_available():
        sys.exit("No CUDA device is available; rehearse without one with --fake")
    start = time.perf_counter()
    faulthandler.dump_traceback_later(options.seconds + 20, exit=True)  # if a phase hangs in C
    result: dict = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bench = Bench(Path(folder), options.threads, fake=options.fake)
        if bench.fake:
            sys.path.insert(0, str(ROOT / "tests"))
            stack.enter_context(importlib.import_module("emulated_cuda").emulated_cuda())
        for name in names:
            left = options.seconds - (time.perf_counter() - start)
            print(name, flush=True)
            result[name] = run_phase(name, bench, left)
            print(f"    {json.dumps(result[name], default=str)[:1500]}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
    with contextlib.suppress(KeyError, TypeError):
        result["relative_speeds"] = relative_speeds(result)
        print(json.dumps(result["relative_speeds"], indent=2))
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["failures"] = list(failures(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
    sys.exit("\n".join(result["failures"]) or 0)


if __name__ == "__main__":
    main()
