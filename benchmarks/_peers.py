"""The environment in which the peers run: beside the torch that runs this, and out of its way."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import torch
import torchvision
from _common import ROOT

PEERS = ["embetter>=0.9", "fastai>=2.8,<2.9", "timm>=1.0.9"]
FOLDER = ROOT / "benchmarks/.peers"


def environment_of_peers(folder: Path = FOLDER) -> Path:
    """Install the peers, unless they are there, and return their Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [*PEERS, *_torches(), *project["dependencies"]]
    python = folder / "bin" / "python"
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text().split("\n") != packages:
        print(f"installing {', '.join(PEERS)} into {folder}", file=sys.stderr)
        if not python.exists():
            venv.create(folder, with_pip=True, symlinks=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        stamp.write_text("\n".join(packages))
    return python


def why_missing(package: str) -> str:
    """Say why a peer does not install beside this torch, in pip's words."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", package, *_torches()]
    tried = subprocess.run(command, capture_output=True, text=True)
    reasons = [line for line in tried.stderr.splitlines() if line.startswith("ERROR: Cannot")]
    return " ".join(reasons) or "pip would install it, but this script has no code for it"


def _torches() -> list[str]:
    return [f"{module.__name__}=={_release(module)}" for module in (torch, torchvision)]


def _release(module: Any) -> str:
    """Drop the local part of a version, such as `+cpu`, which indexes do not know."""
    return module.__version__.split("+")[0]
