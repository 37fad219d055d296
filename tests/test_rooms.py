"""The rooms: imports only point upward, and every concern has one owner."""

import ast
import re
from pathlib import Path

import pytest

import sktransfer

PACKAGE = Path(sktransfer.__file__).parent

# A room may import from the rooms above it.
ROOMS = [
    "_version",
    "_errors",
    "_config",
    "decoding",
    "device_decoding",
    "report",
    "items",
    "containers",
    "images",
    "validation",
    "datasets",
    "transforms",
    "distortions",
    "augmentation",
    "views",
    "reading",
    "copies",
    "efficientnet_lite",
    "progress",
    "schedule",
    "anatomy",
    "architectures",
    "adversary",
    "split",
    "weights",
    "backbones",
    "catalogue",
    "domain",
    "likeness",
    "openvino_engine",
    "fusion",
    "engines",
    "database",
    "space",
    "store",
    "session",
    "machine",
    "features",
    "activations",
    "display",
    "extractor",
    "leaks",
    "labels",
    "logme",
    "ranking",
    "examples",
    "head",
    "feeds",
    "checkpoint",
    "training",
    "network",
    "tuning",
    "parameters",
    "tuned",
    "prediction",
    "classifier",
    "self_training",
    "cost",
    "evidence",
    "caveats",
    "strategy",
    "demo",
    "cli",
]

# What only its owners may mention.
OWNERS = {
    r"torchvision\.models": {"architectures"},
    r"torchvision\.transforms": {"transforms", "augmentation", "distortions"},
    r"requires_grad|\.eval\(\)": {"split"},
    r"import sqlite3": {"database"},
    r"from PIL|import PIL": {"decoding", "items", "containers"},
    r"safetensors\.": {"weights"},
    r"matplotlib": {"demo", "display"},
    r"import argparse": {"cli"},
    r"import skorch|from skorch": {"training"},
    r"sklearn\.callback": {"progress"},
    r"tqdm": {"_config", "progress"},
}


def rooms():
    return sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__"))


def imported_rooms(room):
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sktransfer."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and (node.module == "sktransfer" or node.level):
            yield from (alias.name for alias in node.names)


def code(room):
    """Give a room's source without docstrings and comments."""
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


def test_every_room_has_its_place():
    assert rooms() == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_upward(room):
    below = [other for other in imported_rooms(room) if ROOMS.index(other) >= ROOMS.index(room)]
    assert not below, f"{room} imports {below}, which are not above it"


@pytest.mark.parametrize("pattern", OWNERS)
def test_one_owner_per_concern(pattern):
    assert {room for room in rooms() if re.search(pattern, code(room))} == OWNERS[pattern]


def test_no_room_outgrows_its_walls():
    lengths = {room: len((PACKAGE / f"{room}.py").read_text().splitlines()) for room in rooms()}
    assert {room: length for room, length in lengths.items() if length > 400} == {}


def test_importing_the_package_changes_nothing(tmp_path):
    """No folder is made and no global setting is touched at import."""
    import subprocess
    import sys

    script = (
        "import os, tempfile, torch, torchvision, sklearn.utils\n"
        "def state():\n"
        "    folders = os.listdir(tempfile.gettempdir())  # torch makes one of its own\n"
        "    return torch.get_num_threads(), torch.initial_seed(), sorted(os.environ), folders\n"
        "before = state()\n"
        "import sktransfer\n"
        "assert state() == before\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"TMPDIR": str(tmp_path), "PATH": ""}
    )
