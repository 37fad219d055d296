"""A grid search over a Pipeline: what it costs beyond embedding once and fitting the classifiers.

The 432 photographs of benchmarks/_sets.py, six candidates, five folds. Each variant runs in a
fresh process; figures are medians of the rounds, of which the two last variants run one.

ours      GridSearchCV over Pipeline([extractor, scaler, classifier])
parts     one pass of the extractor, then the same search on the embeddings, and the seconds of both
memory    ours without its store, with Pipeline(memory=) instead, which keeps what a fold has fitted
plain     ours without its store: what scikit-learn does by itself

All of them have to find the same scores. Fails unless ours takes at most 1.15 times as long as its
parts.

    python benchmarks/search.py [--variants ours,parts] [--rounds 3] [--threads 2] [--json PATH]
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time

import numpy as np
from _common import command_line, finish, in_fresh_process
from _sets import photographs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

VARIANTS = ["ours", "parts", "memory", "plain"]
STRENGTHS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
ONCE = ["memory", "plain"]  # so slow that one round says enough
MOST = 1.15


def search(extractor: PretrainedFeatureExtractor | None, memory: str | None = None) -> GridSearchCV:
    steps = [("scaler", StandardScaler()), ("classifier", LogisticRegression(max_iter=2000))]
    if extractor is not None:
        steps.insert(0, ("extractor", extractor))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    grid = {"classifier__C": STRENGTHS}
    return GridSearchCV(Pipeline(steps, memory=memory), grid, cv=folds)


def measure(variant: str) -> dict:
    """Search in this process."""
    paths, y = photographs()
    X = np.array(paths, dtype=object)
    warm_up = PretrainedFeatureExtractor(cache=None).fit(paths)
    warm_up.transform(paths[:130])  # the graph of the network is there, as in every later process
    start = time.perf_counter()
    if variant == "parts":
        embeddings = PretrainedFeatureExtractor(cache=None).fit_transform(paths)
        embedded = time.perf_counter() - start
        found = search(None).fit(embeddings, y)
    elif variant == "memory":
        with tempfile.TemporaryDirectory() as folder:
            found = search(PretrainedFeatureExtractor(cache=None), folder).fit(X, y)
    else:
        cache = "auto" if variant == "ours" else None
        found = search(PretrainedFeatureExtractor(cache=cache)).fit(X, y)
    figures = {"seconds": round(time.perf_counter() - start, 2)}
    if variant == "parts":
        figures["embedding"] = round(embedded, 2)
    return {**figures, "scores": found.cv_results_["mean_test_score"].round(4).tolist()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--measure", choices=VARIANTS, help="measure this one, in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    rounds: dict[str, list[dict]] = {name: [] for name in options.variants.split(",")}
    with tempfile.TemporaryDirectory() as caches:
        for number, (name, found) in itertools.product(range(options.rounds), rounds.items()):
            if number == 0 or name not in ONCE:
                arguments = ("search.py", "--measure", name)
                found.append(in_fresh_process(*arguments, threads=options.threads, caches=caches))
    scores = {tuple(each["scores"]) for found in rounds.values() for each in found}
    if len(scores) > 1:
        sys.exit(f"the scores differ: {scores}")
    result: dict = {"threads": options.threads, "scores": list(*scores)}
    for name, found in rounds.items():
        result[name] = {
            key: round(statistics.median(each[key] for each in found), 2)
            for key in ("seconds", "embedding")
            if key in found[0]
        }
        print(f"{name:7} {result[name]['seconds']:8.2f} s")
    failures = []
    if {"ours", "parts"} <= rounds.keys():
        ratios = [
            one["seconds"] / other["seconds"]
            for one, other in zip(rounds["ours"], rounds["parts"], strict=True)
        ]
        result["times_parts"] = round(statistics.median(ratios), 3)
        print(f"ours takes {result['times_parts']} times as long as its parts")
        if result["times_parts"] > MOST:
            failures.append(f"the search takes more than {MOST} times as long as its parts")
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
