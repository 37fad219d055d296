"""Measure the accuracy of fine-tuning and of a linear probe, on photographs and on scanned digits.

photographs  FineTunedImageClassifier() and the probe on the 432 photographs of benchmarks/_sets.py,
             in the same 3 x 5 repeated stratified folds (seed 0). Folds share images, so the
             standard error for 15 independent differences is too small. The corrected standard
             error follows Nadeau and Bengio, "Inference for the generalization error", 2003.
digits       A logistic regression on raw pixels, the probe, and FineTunedImageClassifier with its
             last 12 blocks trained, each in a fresh process: 1,000 of scikit-learn's digits to
             train on, 797 to test on. All trained blocks use the same learning rate, three times
             the default. It was chosen on the training digits, split into 700 and 300.

The probe is StandardScaler and LogisticRegression(C=0.03) on frozen embeddings. `--image-size auto`
and `--backbone` change the probe on the photographs; `--variants probe` runs only the probe.

The run fails if fine-tuning is less than 0.01 more accurate than the probe on the photographs, or
if it is below 0.985 or takes more than 600 s on the digits.

    python benchmarks/accuracy.py {photographs,digits} [--variants probe,tuned] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from _common import command_line, finish, in_fresh_process, make_probe, measure
from _sets import photographs
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

N_SPLITS, N_REPEATS = 5, 3
MIN_GAIN = 0.01
N_TRAINING = 1000
MIN_ACCURACY_ON_DIGITS, MAX_SECONDS = 0.985, 600
IMAGES = {"image_shape": (8, 8), "image_size": (96, 96)}  # a pair of sizes disables cropping
VARIANTS = {"photographs": ["probe", "tuned"], "digits": ["pixels", "probe", "tuned"]}


def tuned(**parameters: Any) -> Any:
    from sktransfer import FineTunedImageClassifier

    return FineTunedImageClassifier(**parameters, random_state=0)


def make_for_digits(variant: str) -> Any:
    """Build the estimator of a variant on the digits."""
    if variant == "pixels":
        return make_pipeline(MinMaxScaler(), LogisticRegression(max_iter=2000))
    if variant == "probe":
        return make_probe(**IMAGES)
    schedule = {"unfreeze": (0, 12), "max_epochs": 30, "lr": 3e-3, "lr_decay": 1.0}
    return tuned(**IMAGES, augment="light", **schedule)


def measure_on_digits(variant: str) -> dict:
    """Fit and test a variant on the digits, in this process."""
    X, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(X))
    train, test = order[:N_TRAINING], order[N_TRAINING:]
    return measure(make_for_digits(variant), X[train], y[train], X[test], y[test])


def compare(tuned: np.ndarray, probe: np.ndarray) -> dict:
    """Compute the mean of the paired differences and its standard errors."""
    difference = tuned - probe
    variance = difference.var(ddof=1)
    test_ratio = 1 / (N_SPLITS - 1)  # test images per training image
    return {
        "difference": round(float(difference.mean()), 4),
        "standard_error": round(float(np.sqrt(variance / len(difference))), 4),
        "corrected_error": round(float(np.sqrt(variance * (1 / len(difference) + test_ratio))), 4),
        "folds_won": int((difference > 0).sum()),
        "folds_lost": int((difference < 0).sum()),
    }


def on_photographs(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Cross-validate the variants on the same folds."""
    paths, y = photographs()
    folds = RepeatedStratifiedKFold(n_splits=N_SPLITS, n_repeats=options.repeats, random_state=0)
    probe = make_probe(backbone=options.backbone, image_size=options.image_size)
    scores, result = {}, {}
    for name in options.variants:
        model = probe if name == "probe" else tuned()
        start = time.perf_counter()
        scores[name] = cross_val_score(model, paths, y, cv=folds, error_score="raise")
        result[name] = {
            "accuracy": round(scores[name].mean(), 4),
            "std": round(scores[name].std(), 4),
            "folds": scores[name].round(4).tolist(),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print("{}: {accuracy:.4f} +- {std:.4f} in {seconds:.0f} s".format(name, **result[name]))
    if len(scores) < len(VARIANTS["photographs"]):
        return result, []
    result |= compare(scores["tuned"], scores["probe"])
    print(
        "difference: {difference:+.4f}, standard error {standard_error:.4f} (corrected for shared "
        "images: {corrected_error:.4f}), {folds_won} folds won, {folds_lost} lost".format(**result)
    )
    failed = result["difference"] < MIN_GAIN
    return result, [f"the difference is below {MIN_GAIN}"] if failed else []


def on_digits(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Measure the variants in fresh processes."""
    result: dict = {}
    for name in options.variants:
        arguments = ("accuracy.py", "digits", "--measure", name)
        result[name] = in_fresh_process(*arguments, threads=options.threads)
        print("{:6} {accuracy:.4f} in {fit_seconds:.1f} s".format(name, **result[name]))
    figures = result.get("tuned")
    failures = []
    if figures and figures["accuracy"] < MIN_ACCURACY_ON_DIGITS:
        failures.append(f"the accuracy of fine-tuning is below {MIN_ACCURACY_ON_DIGITS}")
    if figures and figures["fit_seconds"] > MAX_SECONDS:
        failures.append(f"fine-tuning took more than {MAX_SECONDS} s")
    return result, failures


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("data", choices=VARIANTS)
    parser.add_argument("--variants", type=lambda names: names.split(","), help="default: all")
    parser.add_argument(
        "--repeats",
        type=int,
        default=N_REPEATS,
        help="repeats of the five folds of photographs; default: %(default)s",
    )
    parser.add_argument(
        "--backbone",
        default="efficientnet_lite0",
        help="backbone of the probe on photographs; default: %(default)s",
    )
    parser.add_argument(
        "--image-size", choices=["auto"], help="use whole images, larger than by default"
    )
    parser.add_argument(
        "--measure", choices=VARIANTS["digits"], help="measure a variant on digits in this process"
    )
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_on_digits(options.measure)))
        return
    names = VARIANTS[options.data]
    options.variants = options.variants or names
    if unknown := set(options.variants) - set(names):
        parser.error(f"Got {sorted(unknown)} in --variants, expected some of {names}")
    run = on_photographs if options.data == "photographs" else on_digits
    finish(*run(options), options.json)


if __name__ == "__main__":
    main()
