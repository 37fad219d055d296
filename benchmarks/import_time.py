"""Measure the time of `import sktransfer`, relative to importing its main dependencies.

Each round runs both imports in fresh processes, one after the other. The ratio is the median over
the rounds. The run fails if it is above 1.15.

    python benchmarks/import_time.py [--rounds 9] [--json PATH]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from _common import command_line, finish

DEPENDENCIES = "import torch, torchvision, sklearn"
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
    seconds("import sktransfer")  # warms up the disk cache
    rounds = [(seconds("import sktransfer"), seconds(DEPENDENCIES)) for _ in range(options.rounds)]
    package, dependencies = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = round(statistics.median(a / b for a, b in rounds), 3)
    print(f"import sktransfer {package:.2f} s, {DEPENDENCIES} {dependencies:.2f} s: ratio {ratio}")
    result = {
        "sktransfer": round(package, 3),
        "dependencies": round(dependencies, 3),
        "ratio": ratio,
    }
    failures = [f"the ratio is above {MAX_RATIO}"] if ratio > MAX_RATIO else []
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
