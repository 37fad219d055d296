"""What `import sktransfer` costs beside the imports that it cannot do without.

Each import in a fresh process, in turn; the ratio is the median of those of the rounds. Fails where
it is above 1.15.

    python benchmarks/import_time.py [--rounds 9] [--json PATH]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from _common import command_line, finish

NEEDED = "import torch, torchvision, sklearn"
MOST = 1.15
CODE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Time a statement in a process of its own."""
    command = [sys.executable, "-c", CODE.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    options = parser.parse_args()
    seconds("import sktransfer")  # or the first one would pay for a cold disk
    rounds = [(seconds("import sktransfer"), seconds(NEEDED)) for _ in range(options.rounds)]
    ours, needed = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = round(statistics.median(one / other for one, other in rounds), 3)
    print(f"import sktransfer {ours:.2f} s, {NEEDED} {needed:.2f} s: {ratio} times")
    result = {"sktransfer": round(ours, 3), "needed": round(needed, 3), "ratio": ratio}
    finish(result, [f"the ratio is above {MOST}"] if ratio > MOST else [], options.json)


if __name__ == "__main__":
    main()
