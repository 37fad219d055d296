"""Measure how well the orders of rank_backbones agree with the accuracy on held-out images.

On each data set of benchmarks/_sets.py, at its second size, the candidates are ranked on the
training images by the cross-validated accuracy of the linear probe and by LogME. Then the probe of
each candidate is fitted to the training images and tested on up to 200 other images. Kendall's rank
correlation measures the agreement of two orders, from -1 to 1.

Only EfficientNet-Lite0 is installed with pretrained weights. The candidates are this network at two
sizes, at three depths and with adapted BatchNorm, and, with random weights, the same network and
ResNet-18. The figures do not show how well LogME ranks different pretrained networks.

    python benchmarks/ranking.py [--json PATH]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _common import command_line, finish, make_probe
from _sets import SETS, divide, loaded, take
from scipy.stats import kendalltau
from sklearn.base import clone

from sktransfer import PretrainedFeatureExtractor, rank_backbones

MAX_TEST_IMAGES = 200
PRETRAINED: dict[str, dict[str, Any]] = {
    "default": {},
    "half the size": {"image_size": 0.5},
    "after block 10": {"layer": "block10"},
    "after block 5": {"layer": "block5"},
    "adapted": {"batch_norm": "adapt"},
}
# Random weights are easy to rank last.
RANDOM: dict[str, dict[str, Any]] = {
    "random": {"weights": None},
    "random ResNet-18": {"weights": None, "backbone": "resnet18"},
}


def candidates(side: int) -> dict[str, PretrainedFeatureExtractor]:
    """Build the extractors for images of a given side; "half the size" uses half of it."""
    extractors = {}
    for name, parameters in (PRETRAINED | RANDOM).items():
        input_side = round(side * parameters.get("image_size", 1))
        extractors[name] = PretrainedFeatureExtractor(
            **parameters | {"image_size": (input_side, input_side), "engine": "torch"}
        )
    return extractors


def measure(name: str) -> dict[str, dict[str, float]]:
    """Rank the candidates on a data set, and test them."""
    X, y, _ = loaded(name)
    train, test = divide(name, SETS[name].sizes[1], 0)
    test = np.random.RandomState(0).permutation(test)[:MAX_TEST_IMAGES]
    extractors = candidates(SETS[name].side)
    ranking = rank_backbones(take(X, train), y[train], list(extractors.values()))
    names = {repr(extractor): key for key, extractor in extractors.items()}
    scores = {}
    for row, extractor in zip(ranking.rows, ranking.extractors, strict=True):
        probe = make_probe(**extractor.get_params(deep=False)).fit(take(X, train), y[train])
        scores[names[repr(clone(extractor))]] = {
            "probe": round(row.accuracy, 4),
            "logme": round(row.logme, 4),
            "test_accuracy": round(probe.score(take(X, test), y[test]), 4),
        }
    return scores


def agreement(rows: list[dict[str, float]], key: str) -> float:
    """Compute the rank correlation of a score with the accuracy on held-out images."""
    pairs = [[row[column] for row in rows] for column in (key, "test_accuracy")]
    return round(float(kendalltau(*pairs).statistic), 3)


def main() -> None:
    options = command_line(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"sets": {}}
    for name in SETS:
        scores = measure(name)
        pretrained = [scores[candidate] for candidate in PRETRAINED]
        best = max(row["test_accuracy"] for row in scores.values())
        figures: dict[str, Any] = {"candidates": scores}
        for key in ("probe", "logme"):
            first = max(scores.values(), key=lambda row: row[key])
            figures[key] = {
                "tau": agreement(list(scores.values()), key),
                "tau_pretrained": agreement(pretrained, key),
                "lost": round(best - first["test_accuracy"], 4),
            }
        result["sets"][name] = figures
        print(name, figures, flush=True)
    for key in ("probe", "logme"):
        result[key] = {
            figure: round(float(np.mean([row[key][figure] for row in result["sets"].values()])), 3)
            for figure in ("tau", "tau_pretrained", "lost")
        }
    print(result["probe"], result["logme"])
    finish(result, [], options.json)


if __name__ == "__main__":
    main()
