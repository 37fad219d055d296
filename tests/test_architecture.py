"""Imports point down the layers and form no circle, and few modules may mention a library."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sktransfer

PACKAGE = Path(sktransfer.__file__).parent

# From the bottom up: a layer imports only from earlier layers. A folder is one layer, and so is
# each module at the root.
LAYERS = [
    "_version",
    "utils",
    "store",
    "data",
    "transforms",
    "backbones",
    "engines",
    "adaptation",
    "embedding",
    "finetuning",
    "extractor",
    "classifier",
    "self_training",
    "export",
    "diagnostics",
    "inspection",
    "integrations",
    "cli",
    "__main__",
    "__init__",
]

# The only modules that may mention a pattern.
MENTIONED_IN = {
    r"torchvision\.models": {"backbones/torchvision_blocks"},
    r"torchvision\.transforms": {
        "transforms/preprocessing",
        "transforms/augmentation",
        "transforms/distortions",
    },
    r"requires_grad|\.eval\(\)": {"backbones/frozen", "finetuning/suffix"},
    r"import sqlite3": {"store/database"},
    r"from PIL|import PIL": {
        "data/decoding",
        "data/formats",
        "data/items",
        "data/containers",
        "data/pillow_settings",
    },
    r"safetensors\.": {"backbones/weights"},
    r"matplotlib": {"cli/demo", "utils/plotting"},
    r"import argparse": set(),
    r"import click|from click": {
        "cli/demo_command",
        "cli/diagnose",
        "cli/embed",
        "cli/evaluate",
        "cli/library",
        "cli/main",
        "cli/messages",
        "cli/model_files",
        "cli/options",
        "cli/outputs",
        "cli/predict",
        "cli/train",
    },
    r"import skorch|from skorch": {"finetuning/train_stage"},
    r"sklearn\.callback": {"utils/progress"},
    r"tqdm": {"utils/progress"},
    r"fsspec": {"data/remote"},
    r"import_onnx|onnxruntime": {
        "export/converter",
        "export/onnx",
        "export/onnx_graph",
        "export/onnx_writing",
        "export/resize",
    },
}


@functools.cache
def modules():
    """List all modules, such as "finetuning/head", without the `__init__` files of folders."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(
        path.as_posix() for path in paths if path.name != "__init__" or not path.parts[1:]
    )


def layer_of(module):
    return module.partition("/")[0]


def imported_modules(source):
    """Yield the modules of this package that a source imports, at any level of nesting."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.ImportFrom):
            raise ValueError("relative import")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        paths = {name.removeprefix("sktransfer.").replace(".", "/") for name in names}
        yield from sorted(paths.intersection(modules()))


def graph():
    return {
        module: set(imported_modules((PACKAGE / f"{module}.py").read_text()))
        for module in modules()
    }


def upward(edges):
    """List the imports from a layer to a later one."""
    order = {layer: position for position, layer in enumerate(LAYERS)}
    return [
        (module, imported)
        for module, imports in edges.items()
        for imported in imports
        if order[layer_of(imported)] > order[layer_of(module)]
    ]


def circles(edges):
    """List modules in circles: those that remain if modules without imports are removed."""
    remaining = dict(edges)
    while free := [module for module, imports in remaining.items() if not imports & set(remaining)]:
        for module in free:
            del remaining[module]
    return sorted(remaining)


@functools.cache
def code(module):
    """Return the source of a module without docstrings and comments."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


def test_every_module_belongs_to_a_layer():
    assert {layer_of(module) for module in modules()} == set(LAYERS)


def test_imports_point_down():
    assert upward(graph()) == []


def test_imports_form_no_circle():
    assert circles(graph()) == []


def summary(layer):
    """Return the first line of the docstring of a layer."""
    path = (
        PACKAGE / layer / "__init__.py" if (PACKAGE / layer).is_dir() else PACKAGE / f"{layer}.py"
    )
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


def test_architecture_page_lists_the_layers():
    layers = [layer for layer in LAYERS if not layer.startswith("_")]
    expected = "\n".join(f"{layer:<14} {summary(layer)}" for layer in layers)
    page = PACKAGE.parent.joinpath("docs", "architecture.md").read_text()
    listed = page.partition("<!-- layers -->")[2].partition("<!-- end of layers -->")[0]
    assert listed.strip() == f"```text\n{expected}\n```"


def test_upward_import_and_circle_are_detected():
    edges = graph()
    edges["utils/errors"] = edges["utils/errors"] | {"extractor"}
    assert ("utils/errors", "extractor") in upward(edges)
    assert {"extractor", "utils/errors"} <= set(circles(edges))


def test_root_holds_at_most_eight_modules():
    assert len([module for module in modules() if "/" not in module]) <= 8


@pytest.mark.parametrize("pattern", MENTIONED_IN)
def test_pattern_is_mentioned_only_in_its_modules(pattern):
    mentioned_in = {module for module in modules() if re.search(pattern, code(module))}
    assert mentioned_in == MENTIONED_IN[pattern]


def test_import_changes_nothing(tmp_path):
    """Importing creates no folder and changes no global setting."""
    script = (
        "import os, tempfile, torch, torchvision, sklearn.utils\n"
        "def state():\n"
        "    folders = os.listdir(tempfile.gettempdir())  # torch creates one\n"
        "    return torch.get_num_threads(), torch.initial_seed(), sorted(os.environ), folders\n"
        "before = state()\n"
        "import sktransfer\n"
        "assert state() == before\n"
    )
    environment = {"TMPDIR": str(tmp_path), "PATH": os.environ.get("PATH", "")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
