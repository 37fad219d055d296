"""Measure a grid search over a Pipeline, compared with embedding once and fitting the classifiers.

The search has six candidates and five folds, on the 432 photographs of benchmarks/_sets.py. Each
variant runs in a fresh process. Figures are medians over the rounds; the last two variants run only
once.

sktransfer  GridSearchCV over Pipeline([extractor, scaler, classifier])
parts       one pass of the extractor, then the same search on the embeddings: seconds of both
memory      sktransfer without its store, but with Pipeline(memory=), which caches the fitted steps
            of each fold
plain       sktransfer without its store or any other cache

All variants must find the same scores. The run fails if sktransfer takes more than 1.15 times as
long as its parts.

    python benchmarks/search.py [--variants sktransfer,parts] [--rounds 3] [--threads 2]
        [--json PATH]
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

VARIANTS = ["sktransfer", "parts", "memory", "plain"]
C_CANDIDATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
ONE_ROUND = ["memory", "plain"]  # slow, so they run only once
MAX_RATIO = 1.15


def search(extractor: PretrainedFeatureExtractor | None, memory: str | None = None) -> GridSearchCV:
    steps = [("scaler", StandardScaler()), ("classifier", LogisticRegression(max_iter=2000))]
    if extractor is not None:
        steps.insert(0, ("extractor", extractor))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    grid = {"classifier__C": C_CANDIDATES}
    return GridSearchCV(Pipeline(steps, memory=memory), grid, cv=folds)


def measure(variant: str) -> dict:
    """Measure a variant in this process."""
    paths, y = photographs()
    X = np.array(paths, dtype=object)
    warm_up = PretrainedFeatureExtractor(cache=None).fit(paths)
    warm_up.transform(paths[:130])  # builds the network's graph, which later processes reuse
    start = time.perf_counter()
    if variant == "parts":
        embeddings = PretrainedFeatureExtractor(cache=None).fit_transform(paths)
        embedded = time.perf_counter() - start
        fitted = search(None).fit(embeddings, y)
    elif variant == "memory":
        with tempfile.TemporaryDirectory() as folder:
            fitted = search(PretrainedFeatureExtractor(cache=None), folder).fit(X, y)
    else:
        cache = "auto" if variant == "sktransfer" else None
        fitted = search(PretrainedFeatureExtractor(cache=cache)).fit(X, y)
    figures = {"seconds": round(time.perf_counter() - start, 2)}
    if variant == "parts":
        figures["embedding"] = round(embedded, 2)
    return {**figures, "scores": fitted.cv_results_["mean_test_score"].round(4).tolist()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--measure", choices=VARIANTS, help="measure a variant in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    rounds: dict[str, list[dict]] = {name: [] for name in options.variants.split(",")}
    with tempfile.TemporaryDirectory() as caches:
        for number, (name, runs) in itertools.product(range(options.rounds), rounds.items()):
            if number == 0 or name not in ONE_ROUND:
                arguments = ("search.py", "--measure", name)
                runs.append(in_fresh_process(*arguments, threads=options.threads, caches=caches))
    scores = {tuple(figures["scores"]) for runs in rounds.values() for figures in runs}
    if len(scores) > 1:
        sys.exit(f"The scores of the variants differ: {scores}")
    result: dict = {"threads": options.threads, "scores": list(*scores)}
    for name, runs in rounds.items():
        result[name] = {
            key: round(statistics.median(figures[key] for figures in runs), 2)
            for key in ("seconds", "embedding")
            if key in runs[0]
        }
        print(f"{name:10} {result[name]['seconds']:8.2f} s")
    failures = []
    if {"sktransfer", "parts"} <= rounds.keys():
        ratios = [
            search_run["seconds"] / parts_run["seconds"]
            for search_run, parts_run in zip(rounds["sktransfer"], rounds["parts"], strict=True)
        ]
        result["times_parts"] = round(statistics.median(ratios), 3)
        print(f"The search takes {result['times_parts']} times as long as its parts")
        if result["times_parts"] > MAX_RATIO:
            failures.append(f"the search takes more than {MAX_RATIO} times as long as its parts")
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
