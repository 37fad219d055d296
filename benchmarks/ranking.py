"""The two orders of rank_backbones, against the accuracy on images that were held back.

On the sets of benchmarks/_sets.py, the second size of each: candidates are ranked on the
training images, by the cross-validated accuracy of the linear probe and by LogME, and then
each one's probe is fitted to the same images and tested with up to 200 others. Kendall's rank
correlation says how alike two orders are, from -1 to 1.

EfficientNet-Lite0 is the only network whose pretrained weights come with the installation. The
candidates are therefore this one at two sizes, at three depths and with adapted BatchNorm, and it
and ResNet-18 with random weights. That is no evidence of how well LogME orders networks that were
pretrained apart from each other.

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

TESTED = 200
# What is pretrained, and what is random: to put these last is easy.
PRETRAINED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "half the size": {"image_size": 0.5},
    "after block 10": {"layer": "block10"},
    "after block 5": {"layer": "block5"},
    "adapted": {"batch_norm": "adapt"},
}
RANDOM: dict[str, dict[str, Any]] = {
    "random": {"weights": None},
    "random ResNet-18": {"weights": None, "backbone": "resnet18"},
}


def candidates(side: int) -> dict[str, PretrainedFeatureExtractor]:
    """Make extractors that see images of a size, or of half of it."""
    made = {}
    for name, parameters in (PRETRAINED | RANDOM).items():
        seen = round(side * parameters.get("image_size", 1))
        made[name] = PretrainedFeatureExtractor(
            **parameters | {"image_size": (seen, seen), "engine": "torch"}
        )
    return made


def measure(name: str) -> dict[str, dict[str, float]]:
    """Rank the candidates on a set, and test them."""
    X, y, _ = loaded(name)
    train, test = divide(name, SETS[name].sizes[1], 0)
    test = np.random.RandomState(0).permutation(test)[:TESTED]
    made = candidates(SETS[name].side)
    ranking = rank_backbones(take(X, train), y[train], list(made.values()))
    names = {repr(each): key for key, each in made.items()}
    found = {}
    for row, extractor in zip(ranking.rows, ranking.extractors, strict=True):
        probe = make_probe(**extractor.get_params(deep=False)).fit(take(X, train), y[train])
        found[names[repr(clone(extractor))]] = {
            "probe": round(row.accuracy, 4),
            "logme": round(row.logme, 4),
            "held back": round(probe.score(take(X, test), y[test]), 4),
        }
    return found


def agreement(rows: list[dict[str, float]], key: str) -> float:
    """Correlate one order with that of the accuracy on held-back images."""
    pairs = [[row[each] for row in rows] for each in (key, "held back")]
    return round(float(kendalltau(*pairs).statistic), 3)


def main() -> None:
    options = command_line(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"sets": {}}
    for name in SETS:
        found = measure(name)
        pretrained = [found[each] for each in PRETRAINED]
        best = max(row["held back"] for row in found.values())
        figures: dict[str, Any] = {"candidates": found}
        for key in ("probe", "logme"):
            first = max(found.values(), key=lambda row: row[key])
            figures[key] = {
                "tau": agreement(list(found.values()), key),
                "tau of pretrained": agreement(pretrained, key),
                "lost": round(best - first["held back"], 4),
            }
        result["sets"][name] = figures
        print(name, figures, flush=True)
    for key in ("probe", "logme"):
        result[key] = {
            each: round(float(np.mean([v[key][each] for v in result["sets"].values()])), 3)
            for each in ("tau", "tau of pretrained", "lost")
        }
    print(result["probe"], result["logme"])
    finish(result, [], options.json)


if __name__ == "__main__":
    main()
