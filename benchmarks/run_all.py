"""Run all CPU benchmarks one after the other, and write the pages of figures.

This takes about five hours on two cores, on which nothing else should run. If a benchmark fails,
the others still run. benchmarks/gpu.py measures the speed on a CUDA device.

The benchmark `export` needs Node.js, and `npm install onnxruntime-node onnxruntime-web sharp` in
the current folder.

    python benchmarks/run_all.py [--only embedding,search]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from _common import ROOT

# Names of the results in the order of the runs, with the arguments of the scripts.
BENCHMARKS: dict[str, list[str]] = {
    "import_time": [],
    "embedding": [],
    "networks": [],
    "large_jpegs": [],
    "feed": [],
    "search": [],
    "growth": [],
    "store_read": [],
    "clusters": [],
    "scaling": [],
    "tuning": ["--folds", "0,1,2,3,4"],
    "accuracy": [],
    "epoch": [],
    "leaks": [],
    "strategies": [],
    "ranking": [],
    "domain_shift": [],
    "industrial": [],
    "export": ["--node", "."],
    "serving": [],
    "out_of_core": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="default: all")
    names = parser.parse_args().only.split(",")
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"Got {sorted(unknown)} in --only, expected some of {[*BENCHMARKS]}")
    failed = []
    for name in names:
        print(f"\n{name}", flush=True)
        script = ROOT / "benchmarks" / f"{name}.py"
        result = ROOT / "benchmarks" / "results" / f"{name}.json"
        command = [sys.executable, str(script), "--json", str(result), *BENCHMARKS[name]]
        if subprocess.run(command).returncode:
            failed.append(name)
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "page.py")], check=True)
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
