"""Measure the time of importing the estimators, relative to importing their main dependencies.

`import sktransfer` alone imports almost nothing, so its time says little: it is reported, too.
Each round runs both imports in fresh processes, one after the other. The ratio is the median over
the rounds. The run fails if it is above 1.15.

    python benchmarks/import_time.py [--rounds 9] [--json PATH]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from _common import command_line, finish

ESTIMATORS = "from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor"
DEPENDENCIES = "import torch, torchvision, skorch, sklearn.linear_model"
MAX_RATIO = 1.15
CODE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Measure the duration of a statement in a fresh process."""
    command = [sys.executable, "-c", CODE.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    options = parser.parse_args()
    seconds(ESTIMATORS)  # warms up the disk cache
    statements = (ESTIMATORS, DEPENDENCIES, "import sktransfer")
    rounds = [[seconds(statement) for statement in statements] for _ in range(options.rounds)]
    estimators, dependencies, package = (
        statistics.median(column) for column in zip(*rounds, strict=True)
    )
    ratio = round(statistics.median(row[0] / row[1] for row in rounds), 3)
    print(f"estimators {estimators:.2f} s, {DEPENDENCIES} {dependencies:.2f} s: ratio {ratio}")
    print(f"import sktransfer {package:.3f} s")
    result = {
        "sktransfer": round(package, 3),
        "estimators": round(estimators, 3),
        "dependencies": round(dependencies, 3),
        "ratio": ratio,
    }
    failures = [f"the ratio is above {MAX_RATIO}"] if ratio > MAX_RATIO else []
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
