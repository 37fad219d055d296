"""Whether int8 would pay: OpenVINO's forward, quantized after training, and its accuracy.

The 432 photographs of benchmarks/_sets.py and scikit-learn's digits, EfficientNet-Lite0. The
graph is quantized with NNCF (pip install nncf, which nothing else here needs) on 150 images of
each. Speed is that of the forward alone, the median of five passes over the photographs; accuracy
that of StandardScaler and LogisticRegression(C=0.03), 3 x 5 folds for the photographs and 5 for the
digits.

It judges nothing: the figures are the reason for what the documentation says.

    python benchmarks/int8.py [--threads 2] [--json PATH]
"""

from __future__ import annotations

import statistics
import time
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

CALIBRATED = 150


def prepared() -> dict[str, tuple[torch.Tensor, np.ndarray, Any]]:
    """Give both sets as the network takes them, with labels and folds."""
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
            preprocessing.normalize(torch.stack([preprocessing.prepare(each) for each in chosen])),
            *folds[name],
        )
        for name, chosen in images.items()
    }


def main() -> None:
    import nncf
    import openvino

    options = command_line(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    data = prepared()
    x = data["photographs"][0]
    graph = openvino.convert_model(torch.export.export(headless(), (x[:1],)))
    random = np.random.default_rng(0)
    calibration = [
        pixels[row : row + 1].numpy()
        for pixels, _, _ in data.values()
        for row in random.permutation(len(pixels))[:CALIBRATED]
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
        for each, (pixels, y, folds) in data.items():
            embeddings = run(pixels)
            if each == "photographs":
                expected = embeddings if expected is None else expected
                likeness = cosines(embeddings, expected)
                figures["median_cosine"] = round(float(np.median(likeness)), 4)
                figures["least_cosine"] = round(float(likeness.min()), 4)
            accuracy = cross_val_score(probe, embeddings, y, cv=folds).mean()
            figures[each] = round(float(accuracy), 4)
        print(name, figures, flush=True)
    finish({"threads": options.threads, "precisions": result}, [], options.json)


if __name__ == "__main__":
    main()
