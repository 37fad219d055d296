"""Measure how often recommend_strategy chooses a strategy that is as good as the best one.

Four strategies, configured as by `recommend_strategy`, are fitted on the eleven data sets of
benchmarks/_sets.py: a linear classifier on frozen embeddings, the last two blocks tuned, all blocks
tuned, and all blocks trained from random weights. For comparison, the linear classifier is also
fitted on embeddings scaled by their standard deviation instead of to length 1.

The same images of a data set are held out for testing at all sizes. Of the others, 5 to 500 images
per class are drawn for training, twice if the number is 5; `recommend_strategy` receives only
these. A choice is good if its accuracy is within one standard error of the best strategy's. The
standard error is that of the held-out images: sqrt(p (1 - p) / n).

The thresholds of `recommend_strategy` and its table of choices were developed on the data sets
animals, themes, digits and textures; the other data sets test them. The mean inter-class cosine of
the test sets was known before the threshold was set; the accuracy of the strategies on them was
not.

The run fails if the choices on the test sets are good in less than 3 of 4 cases, or less often than
one fixed strategy would be.

    python benchmarks/strategies.py [--jobs 2] [--keep] [--json PATH]
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import joblib
import numpy as np
import torch
from _common import command_line, finish, make_probe
from _sets import SETS, divide, loaded, take

from sktransfer import PretrainedFeatureExtractor, recommend_strategy
from sktransfer.diagnostics.strategy import STRATEGIES, make_estimator

MIN_GOOD = 0.75
STANDARDIZED = "frozen, standardized"
Case = tuple[str, int, int]


def cases() -> Iterator[Case]:
    """Yield data set, size and seed of each case."""
    for name, image_set in SETS.items():
        for size in image_set.sizes:
            yield from ((name, size, seed) for seed in range(2 if size < 10 else 1))


def training_part(name: str, size: int, seed: int) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """Return the training images, their labels, and the parameters that all strategies share."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about few images, as intended
    X, y, _ = loaded(name)
    rows, _ = divide(name, size, seed)
    return take(X, rows), y[rows], {"image_size": (SETS[name].side,) * 2}


def fit(name: str, size: int, seed: int, strategy: str) -> dict[str, Any]:
    """Fit a strategy, and count the test images that it classifies correctly."""
    X, y, common = training_part(name, size, seed)
    different = not SETS[name].mirrored
    model = (
        make_probe(**common)
        if strategy == STANDARDIZED
        else make_estimator(
            strategy,
            PretrainedFeatureExtractor(**common),
            augment="light" if different else "standard",
            random_state=seed,
        )
    )
    start = time.perf_counter()
    model.fit(X, y)
    seconds = round(time.perf_counter() - start, 1)
    all_images, labels, _ = loaded(name)
    _, test = divide(name, size, seed)
    correct = int((model.predict(take(all_images, test)) == labels[test]).sum())
    case = {"set": name, "size": size, "seed": seed, "strategy": strategy}
    return case | {"tested": len(test), "correct": correct, "seconds": seconds}


def choose(name: str, size: int, seed: int) -> dict[str, Any]:
    """Call recommend_strategy on a case."""
    X, y, common = training_part(name, size, seed)
    report = recommend_strategy(
        X, y, extractor=PretrainedFeatureExtractor(**common), random_state=seed
    )
    keys = ("accuracy", "neighbor", "pixels", "mean_interclass_cosine")
    figures = {key: round(getattr(report.probe_results, key), 3) for key in keys}
    chosen = {"strategy": report.strategy, "many": report.many, "different": report.different}
    return {"set": name, "size": size, "seed": seed} | chosen | figures


def run(jobs: int, action: Any, tasks: list[tuple]) -> Iterator[dict[str, Any]]:
    """Run tasks in processes, and yield their results in the order of completion."""
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    for row in parallel(joblib.delayed(action)(*task) for task in tasks):
        print(row, flush=True)
        yield row


def compare(fits: list[dict], choices: list[dict]) -> list[dict[str, Any]]:
    """Compare, for each data set and size, the choices with the accuracy of all strategies."""
    rows = []
    for name, size in dict.fromkeys(case[:2] for case in cases()):
        case_fits = [row for row in fits if (row["set"], row["size"]) == (name, size)]
        n_tested = case_fits[0]["tested"]
        scores = {(row["strategy"], row["seed"]): row["correct"] / n_tested for row in case_fits}
        seeds = {seed for _, seed in scores}
        means = {
            strategy: float(np.mean([scores[strategy, seed] for seed in seeds]))
            for strategy in [*STRATEGIES, STANDARDIZED]
        }
        case_choices = [row for row in choices if (row["set"], row["size"]) == (name, size)]
        chosen = float(np.mean([scores[row["strategy"], row["seed"]] for row in case_choices]))
        best = max(means[strategy] for strategy in STRATEGIES)
        error = float(np.sqrt(best * (1 - best) / n_tested))
        rows.append(
            {
                "set": name,
                "size": size,
                "development": SETS[name].development,
                "tested": n_tested,
                "accuracy": {strategy: round(mean, 4) for strategy, mean in means.items()},
                "standard_error": round(error, 4),
                "choices": sorted({row["strategy"] for row in case_choices}),
                "chosen": round(chosen, 4),
                "good": chosen >= best - error,
                "good_always": {key: means[key] >= best - error for key in STRATEGIES},
                "mean_interclass_cosine": round(
                    float(np.mean([row["mean_interclass_cosine"] for row in case_choices])), 3
                ),
            }
        )
    return rows


def summary(rows: list[dict]) -> dict[str, Any]:
    """Count how often the choice was good, and how often each strategy would have been."""
    figures: dict[str, Any] = {"cases": len(rows), "good": sum(row["good"] for row in rows)}
    figures["always"] = {
        strategy: sum(row["good_always"][strategy] for row in rows) for strategy in STRATEGIES
    }
    lost = [max(row["accuracy"][name] for name in STRATEGIES) - row["chosen"] for row in rows]
    return figures | {"lost": round(float(np.mean(lost)), 4)}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--jobs", type=int, default=joblib.cpu_count(), help="processes; default: number of cores"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="reuse the fits and choices in the file of --json, and run only the missing ones",
    )
    options = parser.parse_args()
    if options.keep and not options.json:
        parser.error("Got --keep without --json, expected the file with the results to keep")
    earlier = json.loads(options.json.read_text()) if options.keep else {"fits": [], "choices": []}
    fits, choices = earlier["fits"], earlier["choices"]
    chosen = {tuple(row[key] for key in ("set", "size", "seed")) for row in choices}
    fitted = {tuple(row[key] for key in ("set", "size", "seed", "strategy")) for row in fits}
    tasks = [(*case, strategy) for case in cases() for strategy in [*STRATEGIES, STANDARDIZED]]
    fits += run(options.jobs, fit, [task for task in tasks if task not in fitted])
    choices += run(options.jobs, choose, [case for case in cases() if case not in chosen])
    rows = compare(fits, choices)
    result: dict[str, Any] = {
        "development": summary([row for row in rows if row["development"]]),
        "test": summary([row for row in rows if not row["development"]]),
        "rows": rows,
        "choices": choices,
        "fits": fits,
    }
    test = result["test"]
    share = test["good"] / test["cases"]
    failures = []
    if share < MIN_GOOD:
        failures.append(f"the choice is good in {share:.2f} of the cases, expected {MIN_GOOD}")
    failures += [
        f"always choosing {strategy!r} would be good more often"
        for strategy, good in test["always"].items()
        if good > test["good"]
    ]
    print(json.dumps({key: result[key] for key in ("development", "test")}, indent=2))
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
