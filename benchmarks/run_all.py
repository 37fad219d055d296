"""Run every benchmark of the CPU, one after the other, and write the page of the documentation.

Takes about five hours on two cores, and nothing else should run beside it. A benchmark that misses
its bar says so, and the others go on. What a CUDA device can do, benchmarks/gpu.py measures.

    python benchmarks/run_all.py [--only embedding,search]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from _common import ROOT

# Names of results, in the order in which they run, with the arguments of the script.
BENCHMARKS: dict[str, list[str]] = {
    "import_time": [],
    "embedding": [],
    "networks": [],
    "large_jpegs": [],
    "search": [],
    "growth": [],
    "store_read": [],
    "tuning": ["--folds", "0,1,2,3,4"],
    "accuracy_photographs": ["photographs"],
    "accuracy_digits": ["digits"],
    "epoch": [],
    "leaks": [],
    "strategies": [],
    "ranking": [],
    "domain_shift": [],
    "industrial": [],
}

SCRIPTS = dict.fromkeys(["accuracy_photographs", "accuracy_digits"], "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="default: all of them")
    names = parser.parse_args().only.split(",")
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"Got {sorted(unknown)}, but there are only {[*BENCHMARKS]}")
    missed = []
    for name in names:
        print(f"\n{name}", flush=True)
        script = ROOT / "benchmarks" / f"{SCRIPTS.get(name, name)}.py"
        result = ROOT / "benchmarks" / "results" / f"{name}.json"
        command = [sys.executable, str(script), "--json", str(result), *BENCHMARKS[name]]
        if subprocess.run(command).returncode:
            missed.append(name)
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "page.py")], check=True)
    sys.exit(f"these missed a bar: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
