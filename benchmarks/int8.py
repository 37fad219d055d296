"""Measure speed and accuracy of int8: OpenVINO's forward pass, quantized after training.

The graph of EfficientNet-Lite0 is quantized with NNCF (pip install nncf, needed only here) on 150
images each of the 432 photographs of benchmarks/_sets.py and of scikit-learn's digits. Speed is
that of the forward pass only, the median of five passes over the photographs. Accuracy is that of
StandardScaler and LogisticRegression(C=0.03) on the embeddings, in 3 x 5 folds of the photographs
and 5 folds of the digits.

    python benchmarks/int8.py [--threads 2] [--json PATH]
"""

from __future__ import annotations

import statistics
import sys
import time
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from _common import command_line, cosines, finish, make_classifier
from _engines import headless, run_graph
from _sets import photographs
from sklearn.datasets import load_digits
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedKFold, cross_val_score

from sktransfer.backbones.loading import load_backbone
from sktransfer.data.decoding import decode

N_CALIBRATION = 150  # images of each data set


def prepared() -> dict[str, tuple[torch.Tensor, np.ndarray, Any]]:
    """Load both data sets: preprocessed images, labels, and folds."""
    preprocessing = load_backbone("efficientnet_lite0").preprocessing
    paths, y = photographs()
    digits = load_digits()
    scans = (digits.images * 15.9375).astype(np.uint8)
    images = {
        "photographs": [decode(path) for path in paths],
        "digits": [scan.repeat(8, 0).repeat(8, 1)[:, :, None].repeat(3, 2) for scan in scans],
    }
    folds = {
        "photographs": (y, RepeatedStratifiedKFold(n_splits=5, n_repeats=3, random_state=0)),
        "digits": (digits.target, StratifiedKFold(5, shuffle=True, random_state=0)),
    }
    return {
        name: (
            preprocessing.normalize(
                torch.stack([preprocessing.prepare(image) for image in images[name]])
            ),
            *folds[name],
        )
        for name in images
    }


def main() -> None:
    options = command_line(__doc__).parse_args()
    if missing := [name for name in ("nncf", "openvino") if find_spec(name) is None]:
        sys.exit(f"Install the missing packages first: pip install {' '.join(missing)}")
    import nncf
    import openvino

    torch.set_num_threads(options.threads)
    data = prepared()
    x = data["photographs"][0]
    graph = openvino.convert_model(torch.export.export(headless(), (x[:1],)))
    random = np.random.default_rng(0)
    calibration = [
        pixels[row : row + 1].numpy()
        for pixels, _, _ in data.values()
        for row in random.permutation(len(pixels))[:N_CALIBRATION]
    ]
    quantized = nncf.quantize(graph, nncf.Dataset(calibration), subset_size=len(calibration))
    result: dict[str, dict] = {}
    expected: np.ndarray | None = None
    probe = make_classifier()
    for name, (model, precision) in {
        "float32": (graph, "f32"),
        "bfloat16": (graph, "bf16"),
        "int8": (quantized, "f32"),
    }.items():
        run = run_graph(model, 1, precision)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - start)
        figures = result[name] = {
            "images_per_second": round(len(x) / statistics.median(seconds[1:]), 1)
        }
        for image_set, (pixels, y, folds) in data.items():
            embeddings = run(pixels)
            if image_set == "photographs":
                expected = embeddings if expected is None else expected
                similarities = cosines(embeddings, expected)
                figures["median_cosine"] = round(float(np.median(similarities)), 4)
                figures["min_cosine"] = round(float(similarities.min()), 4)
            accuracy = cross_val_score(probe, embeddings, y, cv=folds).mean()
            figures[image_set] = round(float(accuracy), 4)
        print(name, figures, flush=True)
    finish({"threads": options.threads, "precisions": result}, [], options.json)


if __name__ == "__main__":
    main()
