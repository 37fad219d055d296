"""Fine-tuning against a linear probe on the same folds of real photographs.

The 432 photographs of benchmarks/photographs.py in 3 x 5 repeated stratified folds (seed 0): the
accuracy of FineTunedImageClassifier(), its defaults, less that of StandardScaler and
LogisticRegression(C=0.03) on frozen embeddings, fold by fold. Folds share images, so the standard
error of 15 independent differences is too small; the corrected one is that of Nadeau and Bengio,
"Inference for the generalization error", 2003.

Fails where the mean difference is below 0.01.

    python benchmarks/tuned_photographs.py [--json PATH]
"""

from __future__ import annotations

import time

import numpy as np
from _common import command_line, finish, make_probe
from photographs import photographs
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score

from sktransfer import FineTunedImageClassifier

SPLITS, REPEATS = 5, 3
FLOOR = 0.01


def compare(tuned: np.ndarray, probe: np.ndarray) -> dict:
    """Give the mean of the paired differences and its standard errors."""
    difference = tuned - probe
    variance = difference.var(ddof=1)
    tested = 1 / (SPLITS - 1)  # images tested with, for each one trained on
    return {
        "difference": round(float(difference.mean()), 4),
        "standard_error": round(float(np.sqrt(variance / len(difference))), 4),
        "corrected_error": round(float(np.sqrt(variance * (1 / len(difference) + tested))), 4),
        "folds_won": int((difference > 0).sum()),
        "folds_lost": int((difference < 0).sum()),
    }


def main() -> None:
    options = command_line(__doc__).parse_args()
    paths, y = photographs()
    folds = RepeatedStratifiedKFold(n_splits=SPLITS, n_repeats=REPEATS, random_state=0)
    scores, result = {}, {}
    for name, model in [
        ("probe", make_probe()),
        ("tuned", FineTunedImageClassifier(random_state=0)),
    ]:
        start = time.perf_counter()
        scores[name] = cross_val_score(model, paths, y, cv=folds, error_score="raise")
        result[name] = {
            "accuracy": round(scores[name].mean(), 4),
            "std": round(scores[name].std(), 4),
            "folds": scores[name].round(4).tolist(),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print("{}: {accuracy:.4f} +- {std:.4f} in {seconds:.0f} s".format(name, **result[name]))
    result |= compare(scores["tuned"], scores["probe"])
    print(
        "difference: {difference:+.4f}, standard error {standard_error:.4f} (corrected for shared "
        "images {corrected_error:.4f}), {folds_won} folds won, {folds_lost} lost".format(**result)
    )
    missed = result["difference"] < FLOOR
    failures = [f"the difference is below {FLOOR}"] if missed else []
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
