"""Code shared by the benchmarks: data split, timing, fresh processes, and results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from _sets import photographs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.efficientnet_lite import (
    EfficientNetLite,
    efficientnet_lite,
    weights_path,
)
from sktransfer.backbones.weights import load_state_dict

ROOT = Path(__file__).resolve().parent.parent

# Normalization of EfficientNet-Lite0, per channel of pixels scaled to 0-1.
MEAN, STD = [127 / 255] * 3, [128 / 255] * 3


class ChildError(RuntimeError):
    """A fresh process failed; its stderr has the reason."""


def split(fold: int = 0) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """Split the photographs into four fifths to train on and one fifth to test on.

    Returns training paths, training labels, test paths and test labels.
    """
    paths, y = photographs()
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(paths, y))
    train, test = folds[fold]
    return [paths[row] for row in train], y[train], [paths[row] for row in test], y[test]


def lite0() -> EfficientNetLite:
    """Build EfficientNet-Lite0 with its ImageNet weights."""
    return efficientnet_lite(
        "efficientnet_lite0", load_state_dict(weights_path("efficientnet_lite0"))
    )


def make_classifier() -> Pipeline:
    """Build the linear classifier that all benchmarks train on frozen embeddings."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000))


def make_probe(**parameters: Any) -> Pipeline:
    """Build the linear probe: an extractor and a linear classifier on its embeddings."""
    return make_pipeline(PretrainedFeatureExtractor(**parameters), *make_classifier())


def measure(estimator: Any, X: Any, y: np.ndarray, X_test: Any, y_test: np.ndarray) -> dict:
    """Measure the duration of `fit` and `predict`, and the accuracy of the predictions."""
    start = time.perf_counter()
    estimator.fit(X, y)
    fitted = time.perf_counter()
    accuracy = np.mean(estimator.predict(X_test) == y_test)
    return {
        "fit_seconds": round(fitted - start, 2),
        "accuracy": round(float(accuracy), 4),
        "predict_seconds": round(time.perf_counter() - fitted, 2),
    }


class PeakMemory:
    """Sample the anonymous memory of this process (Linux), and keep the maximum in bytes."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            kilobytes = int(status.split("RssAnon:")[1].split()[0])
            self.bytes = max(self.bytes, 1024 * kilobytes)
            if self._stop.wait(0.01):
                return


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the cosine similarity of each pair of rows."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def command_line(description: str) -> argparse.ArgumentParser:
    """Build a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file, too")
    parser.add_argument(
        "--threads",
        type=int,
        default=joblib.cpu_count(),
        help="threads per process; default: number of cores",
    )
    return parser


def in_fresh_process(
    script: str,
    *arguments: str,
    threads: int,
    python: str | Path = sys.executable,
    caches: str | None = None,
) -> dict:
    """Run a script of this folder in a fresh process, and parse the JSON in its last line.

    The script uses `caches` as its cache folder, or an empty folder that is deleted afterwards.
    """
    command = [str(python), str(ROOT / "benchmarks" / script), *arguments]
    with tempfile.TemporaryDirectory() as empty:
        names = ("XDG_CACHE_HOME", "FASTAI_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
        folders = dict.fromkeys(names, caches or empty)
        # The environment of the peers has the dependencies of sktransfer, but not sktransfer.
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)} | folders
        child = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        raise ChildError(f"{script} {' '.join(arguments)} ended with code {child.returncode}")
    return json.loads(lines[-1])


def cpu_name() -> str:
    """Return the model name of the CPU on Linux, or else the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def finish(result: dict, failures: Sequence[str], path: Path | None) -> None:
    """Write the figures, and exit with an error that lists the failures if there are any."""
    result["machine"] = {
        "cores": joblib.cpu_count(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }
    result["failures"] = list(failures)
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit("\n".join(failures) or 0)
