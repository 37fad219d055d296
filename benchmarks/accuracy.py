"""Measure accuracy, log loss and calibration of the defaults, and of what people use instead.

Each data set of benchmarks/_sets.py is drawn several times: the same images are held out for
testing, and some of the others are drawn for training. Two cases are special: the 432 photographs
are cross-validated in three times five folds, at 288 x 288, and of the scanned digits 1,000 are
trained on. All variants get the same images at the same input size.

default  FineTunedImageClassifier() with its defaults
probe    a logistic regression on frozen embeddings of unit length (C=30)
loop     a plain torch loop: 10 epochs of Adam at 1e-3 for the head, then 10 at 1e-4 for the head
         and the last three stages; random augmentation, frozen BatchNorm
fastai   fastai's vision_learner and fine_tune(5, freeze_epochs=3) with its fastest settings, in
         smaller batches if there are few images
pixels   a logistic regression on the pixels, on digits only

Development sets are those on which defaults were chosen; the others only test them. Each fit has
one thread, and no cache; by default as many run side by side as there are cores. The fits in the
file of --json are kept, so a run that was stopped goes on.

The run fails unless the default is the best or within one standard error of the best in 9 of 10
cases of the test sets, and nowhere more than 1.5 standard errors below the probe.

    python benchmarks/accuracy.py [--sets "digits;mnist"] [--variants default,probe] [--jobs 2]
        [--json PATH]
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from _common import ChildError, command_line, finish, in_fresh_process
from _peers import FastaiPeer, environment_of_peers
from _sets import SETS, divide, loaded, photographs, take
from PIL import Image
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer
from tuning import TextbookLoop

VARIANTS = ["default", "probe", "loop", "fastai", "pixels"]
# The special cases, in addition to the data sets: both are development data.
PHOTOGRAPHS, SCANS = "photographs, 5 folds", "digits, 1,000 images"
N_FOLDS, N_REPEATS, N_SCANS = 5, 3, 1000
# Draws with few training images per class, and with more.
N_DRAWS_OF_FEW, N_DRAWS, FEW = 3, 2, 10
# Larger training sets are drawn once.
LARGE = 60
N_BINS = 10
MIN_SHARE_GOOD, MAX_BELOW_PROBE = 0.9, 1.5


class Case(NamedTuple):
    """A data set, a number of training images per class (0: the special cases), and a draw."""

    name: str
    size: int
    draw: int


class Data(NamedTuple):
    """Images and class numbers to train on and to test on, input size, and whether to mirror."""

    X: Any
    y: np.ndarray
    X_test: Any
    y_test: np.ndarray
    side: int
    mirrored: bool


def cases_of(name: str) -> list[Case]:
    """List the cases of a data set."""
    if name == PHOTOGRAPHS:
        return [Case(name, 0, fold) for fold in range(N_FOLDS * N_REPEATS)]
    if name == SCANS:
        return [Case(name, 0, 0)]
    return [
        Case(name, size, draw)
        for size in SETS[name].sizes
        for draw in range(N_DRAWS_OF_FEW if size <= FEW else N_DRAWS if size <= LARGE else 1)
    ]


def is_development(name: str) -> bool:
    return name in (PHOTOGRAPHS, SCANS) or SETS[name].development


def variants_of(case: Case) -> list[str]:
    """List the variants of a case: fastai has its own benchmark on photographs, tuning.py."""
    is_digits = case.name.startswith("digits")
    skipped = {"fastai"} if case.name == PHOTOGRAPHS else set()
    return [name for name in VARIANTS if name not in skipped and (name != "pixels" or is_digits)]


def load(case: Case) -> Data:
    """Load the images of a case."""
    if case.name == PHOTOGRAPHS:
        X, y = photographs()
        folds = RepeatedStratifiedKFold(n_splits=N_FOLDS, n_repeats=N_REPEATS, random_state=0)
        train, test = list(folds.split(X, y))[case.draw]
        return Data(take(X, train), y[train], take(X, test), y[test], 288, True)
    if case.name == SCANS:
        X, y = load_digits(return_X_y=True)
        X = (X.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        order = np.random.RandomState(0).permutation(len(X))
        train, test, side, mirrored = order[:N_SCANS], order[N_SCANS:], 96, False
    else:
        X, labels, _ = loaded(case.name)
        y = np.unique(labels, return_inverse=True)[1]
        train, test = divide(case.name, case.size, case.draw)
        side, mirrored = SETS[case.name].side, SETS[case.name].mirrored
    return Data(take(X, train), y[train], take(X, test), y[test], side, mirrored)


def make(variant: str, data: Data, seed: int) -> Any:
    """Build the unfitted classifier of a variant."""
    if variant == "pixels":
        return make_pipeline(MinMaxScaler(), LogisticRegression(max_iter=2000))
    if variant == "loop":
        return TextbookLoop(data.side, mirrored=data.mirrored)
    if variant == "fastai":
        return FastaiPeer(fast=True, side=data.side, mirrored=data.mirrored)
    from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor

    settings: dict[str, Any] = {"image_size": (data.side, data.side), "cache": None}
    if variant == "default":
        return FineTunedImageClassifier(random_state=seed, **settings)
    classifier = LogisticRegression(C=30, max_iter=2000)
    return make_pipeline(PretrainedFeatureExtractor(**settings), Normalizer(), classifier)


def measure(case: Case, variant: str) -> dict[str, Any]:
    """Fit and test a variant in this process."""
    warnings.simplefilter("ignore")  # about few images, as intended
    data = load(case)
    model = make(variant, data, case.draw)
    with tempfile.TemporaryDirectory() as folder:
        X, X_test = data.X, data.X_test
        if variant == "pixels":
            X, X_test = X.reshape(len(X), -1), X_test.reshape(len(X_test), -1)
        elif variant in ("loop", "fastai") and isinstance(X, np.ndarray):
            X, X_test = (
                write(images, Path(folder, name)) for images, name in ((X, "a"), (X_test, "b"))
            )
        start = time.perf_counter()
        model.fit(X, data.y)
        seconds = time.perf_counter() - start
        probabilities = np.asarray(model.predict_proba(X_test), dtype=np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    result = {
        "tested": len(data.y_test),
        "correct": int((probabilities.argmax(1) == data.y_test).sum()),
        "log_loss": round(log_loss(data.y_test, probabilities, labels=np.unique(data.y)), 4),
        "calibration_error": round(calibration_error(probabilities, data.y_test), 4),
        "seconds": round(seconds, 2),
    }
    if variant == "default":
        result |= {
            "strategy": model.decision_.strategy,
            "cosine": round(model.decision_.mean_interclass_cosine, 3),
            "averaging": model.averaging_,
            "temperature": round(model.temperature_, 3),
        }
    return result


def write(images: np.ndarray, folder: Path) -> list[str]:
    """Write images as PNG files, since the peers read files."""
    folder.mkdir()
    paths = [str(folder / f"{row}.png") for row in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    return paths


def calibration_error(probabilities: np.ndarray, y: np.ndarray) -> float:
    """Compute the expected calibration error of the most probable class, in ten equal bins."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    chosen = [bins == index for index in np.unique(bins)]
    gaps = [abs(correct[rows].mean() - confidence[rows].mean()) * rows.mean() for rows in chosen]
    return float(sum(gaps))


def run(case: Case, variant: str) -> dict[str, Any]:
    """Measure a variant; fastai in a process of the environment of the peers."""
    row = {**case._asdict(), "variant": variant}
    if variant != "fastai":
        torch.set_num_threads(1)
        return row | measure(case, variant)
    arguments = ("accuracy.py", "--measure", *map(str, case), variant)
    try:
        return row | in_fresh_process(*arguments, threads=1, python=environment_of_peers())
    except ChildError as error:
        return row | {"missing": str(error)}


def tabulate(fits: list[dict]) -> list[dict[str, Any]]:
    """Average the draws of each data set and size."""
    rows = []
    names = [PHOTOGRAPHS, SCANS, *SETS]
    cases = {(fit["name"], fit["size"]) for fit in fits}
    for name, size in sorted(cases, key=lambda case: (names.index(case[0]), case[1])):
        row: dict[str, Any] = {"name": name, "size": size, "development": is_development(name)}
        for variant in VARIANTS:
            chosen = [
                fit
                for fit in fits
                if (fit["name"], fit["size"], fit["variant"]) == (name, size, variant)
                and "correct" in fit
            ]
            if not chosen:
                continue
            scores = [fit["correct"] / fit["tested"] for fit in chosen]
            row[variant] = {"accuracy": round(float(np.mean(scores)), 4), "fits": len(chosen)}
            for key in ("log_loss", "calibration_error", "seconds"):
                row[variant][key] = round(float(np.mean([fit[key] for fit in chosen])), 3)
            # Every draw tests on the same images, but each repeat of the folds on all photographs.
            row["tested"] = len(photographs()[1]) if name == PHOTOGRAPHS else chosen[0]["tested"]
        best = max(row[variant]["accuracy"] for variant in VARIANTS if variant in row)
        row["standard_error"] = round(float(np.sqrt(best * (1 - best) / row["tested"])), 4)
        if "default" in row:
            row["below_best"] = round((best - row["default"]["accuracy"]), 4)
            row["good"] = row["below_best"] <= row["standard_error"]
        if "default" in row and "probe" in row:
            lost = row["probe"]["accuracy"] - row["default"]["accuracy"]
            row["below_probe_in_errors"] = round(lost / max(row["standard_error"], 1e-9), 2)
        rows.append(row)
    return rows


def paired(fits: list[dict], variant: str) -> dict[str, Any]:
    """Compare the default with a variant on the folds of the photographs.

    The interval is corrected for the training images that folds share (Nadeau and Bengio, 2003).
    """
    scores = {
        name: {
            fit["draw"]: fit["correct"] / fit["tested"]
            for fit in fits
            if fit["name"] == PHOTOGRAPHS and fit["variant"] == name and "correct" in fit
        }
        for name in ("default", variant)
    }
    folds = sorted(scores["default"].keys() & scores[variant].keys())
    if len(folds) < N_FOLDS:
        return {}
    difference = np.array([scores["default"][fold] - scores[variant][fold] for fold in folds])
    variance = difference.var(ddof=1)
    error = float(np.sqrt(variance / len(folds)))
    corrected = float(np.sqrt(variance * (1 / len(folds) + 1 / (N_FOLDS - 1))))
    reach = float(student.ppf(0.975, len(folds) - 1))
    mean = float(difference.mean())
    return {
        "folds": len(folds),
        "difference": round(mean, 4),
        "standard_error": round(error, 4),
        "interval_95": [round(mean - reach * error, 4), round(mean + reach * error, 4)],
        "corrected_interval_95": [
            round(mean - reach * corrected, 4),
            round(mean + reach * corrected, 4),
        ],
        "folds_won": int((difference > 0).sum()),
        "folds_lost": int((difference < 0).sum()),
    }


def check_defaults(rows: list[dict]) -> tuple[dict[str, Any], list[str]]:
    """Count the cases of the test sets in which the default is good, and list failures."""
    complete = [row for row in rows if not row["development"] and "loop" in row and "good" in row]
    good = sum(row["good"] for row in complete)
    worst = max((row.get("below_probe_in_errors", 0.0) for row in rows), default=0.0)
    figures = {"cases": len(complete), "good": good, "most_below_probe_in_errors": worst}
    failures = []
    if complete and good < MIN_SHARE_GOOD * len(complete):
        failures.append(f"the default is good in {good} of {len(complete)} cases of the test sets")
    if worst > MAX_BELOW_PROBE:
        failures.append(f"the default is {worst} standard errors below the probe")
    return figures, failures


def print_table(rows: list[dict]) -> None:
    cell = "{accuracy:.3f} {log_loss:.3f} {calibration_error:.3f} {seconds:.0f}s"
    print(f"{'':28}{'size':>5}" + "".join(f"{name:>25}" for name in VARIANTS))
    for row in rows:
        mark = "*" if row["development"] else " "
        cells = [cell.format(**row[name]) if name in row else "-" for name in VARIANTS]
        print(f"{mark}{row['name']:27}{row['size']:>5}" + "".join(f"{cell:>25}" for cell in cells))
    print("accuracy, log loss, calibration error, seconds; * chose defaults")


def main() -> None:
    names = [PHOTOGRAPHS, SCANS, *SETS]
    parser = command_line(__doc__)
    parser.add_argument("--sets", help="separated by semicolons; default: all")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count(), help="default: all cores")
    parser.add_argument("--measure", nargs=4, metavar=("SET", "SIZE", "DRAW", "VARIANT"))
    options = parser.parse_args()
    if options.measure:
        name, size, draw, variant = options.measure
        print(json.dumps(measure(Case(name, int(size), int(draw)), variant)))
        return
    chosen = options.sets.split(";") if options.sets else names
    if unknown := set(chosen) - set(names):
        parser.error(f"Got {sorted(unknown)} in --sets, expected some of {names}")
    fits = []
    if options.json and options.json.is_file():
        fits = [fit for fit in json.loads(options.json.read_text())["fits"] if "correct" in fit]
    done = {(fit["name"], fit["size"], fit["draw"], fit["variant"]) for fit in fits}
    tasks = [
        (case, variant)
        for variant in options.variants.split(",")
        for name in chosen
        for case in cases_of(name)
        if variant in variants_of(case) and (*case, variant) not in done
    ]
    if any(variant == "fastai" for _, variant in tasks):
        environment_of_peers()
    parallel = joblib.Parallel(options.jobs, return_as="generator_unordered")
    for fit in parallel(joblib.delayed(run)(*task) for task in tasks):
        print(fit, flush=True)
        fits.append(fit)
        if options.json:  # after every fit, so that a run can be stopped
            options.json.write_text(json.dumps({"fits": fits}, indent=1) + "\n")
    rows = tabulate(fits)
    figures, failures = check_defaults(rows)
    print_table(rows)
    result = {"test": figures, "versus_loop": paired(fits, "loop")}
    result |= {"versus_probe": paired(fits, "probe")}
    special = {"photographs": PHOTOGRAPHS, "digits": SCANS}
    result |= {key: row for key, name in special.items() for row in rows if row["name"] == name}
    print(json.dumps(result, indent=2))
    missing = [fit for fit in fits if "missing" in fit]
    failures += [f"{fit['variant']} is missing: {fit['missing']}" for fit in missing]
    finish(result | {"rows": rows, "fits": fits}, failures, options.json)


if __name__ == "__main__":
    main()
