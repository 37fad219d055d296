"""Compare models that were exported to ONNX with the originals, on all 432 photographs.

Three models: a pipeline on frozen embeddings, FineTunedImageClassifier() with its defaults, and a
tuned classifier with an image size of its own. `export_onnx` runs each graph in ONNX Runtime, and
raises an error if the most probable class of a photograph differs, or a probability by more than
0.001, or 0.01 if the weights are stored as float16.

With --node, JavaScript runs the same graphs on the same pixels, with onnxruntime-node and with
onnxruntime-web (WebAssembly), and is compared in the same way. It also decodes the photographs with
sharp, and predicts from the pixels of sharp. FOLDER is where `npm install onnxruntime-node
onnxruntime-web sharp` was run.

The run fails unless all models are exported, and predict the same everywhere.

    python benchmarks/export.py [--node FOLDER] [--json PATH]
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _common import ROOT, command_line, finish
from _sets import THEMES, photographs
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor, export_onnx
from sktransfer.data.images import as_images
from sktransfer.utils.errors import ExportError

# Maximum difference of a probability, by the type of the stored weights.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2}
# Of the run on the pixels of sharp, which rounds translucent pixels differently.
SHARP, SHARP_TOLERANCE = "node_with_sharp", 0.05


def models() -> dict[str, Any]:
    """Build the models, unfitted."""
    linear = [StandardScaler(), LogisticRegression(C=0.03)]
    return {
        "pipeline": make_pipeline(PretrainedFeatureExtractor(), *linear),
        "default": FineTunedImageClassifier(random_state=0),
        "own_size": FineTunedImageClassifier(
            image_size=(160, 200), unfreeze=(0, 2), max_epochs=2, random_state=0
        ),
    }


def write_pixels(paths: list[str], folder: Path) -> None:
    """Write the pixels of all images, so that another program need not decode them."""
    listed = []
    for row, pixels in enumerate(as_images(paths)):
        (folder / f"{row}.rgb").write_bytes(pixels.tobytes())
        listed.append({"path": paths[row], "height": pixels.shape[0], "width": pixels.shape[1]})
    (folder / "images.json").write_text(json.dumps(listed))


def run_node(node: Path, folder: Path) -> dict[str, Any]:
    """Run the models of a folder in Node.js, and parse what it prints."""
    command = ["node", str(ROOT / "benchmarks" / "export_node.js"), str(folder)]
    environment = os.environ | {"NODE_PATH": str((node / "node_modules").resolve())}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def export_models(folder: Path, paths: list[str], y: np.ndarray) -> tuple[dict, dict, list[str]]:
    """Fit and export all models; return figures, fitted models, and failures."""
    figures, fitted, failures = {}, {}, []
    for name, model in models().items():
        model.fit(paths, [THEMES[theme] for theme in y])
        fitted[name] = model
        for weight_dtype in TOLERANCES:
            path = folder / f"{name}_{weight_dtype}.onnx"
            try:
                exported = export_onnx(model, path, images=paths, weight_dtype=weight_dtype)
            except ExportError as error:
                failures.append(f"{path.stem}: {error}")
                continue
            figures[path.stem] = {
                "images": exported.n_images,
                "max_difference": rounded(exported.max_difference),
                "megabytes": round(exported.n_bytes / 1e6, 2),
            }
            print(path.stem, figures[path.stem], flush=True)
    return figures, fitted, failures


def compare(outputs: dict[str, Any], expected: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """Count the images with the expected label, and compute the largest difference."""
    found, labels = np.array(outputs["probabilities"]), classes[expected.argmax(1)]
    same = (classes[found.argmax(1)] == labels) & (np.array(outputs["labels"]) == labels)
    return {
        "same_class": int(same.sum()),
        "max_difference": rounded(np.abs(found - expected).max()),
    }


def rounded(difference: float) -> float:
    return float(f"{difference:.2g}")


def failures_in_node(figures: dict[str, Any], run: str, graph: str) -> list[str]:
    """Check the figures of a graph in a JavaScript runtime."""
    result, n_images = figures[graph][run], figures[graph]["images"]
    tolerance = SHARP_TOLERANCE if run == SHARP else TOLERANCES[graph.rpartition("_")[2]]
    if result["same_class"] == n_images and result["max_difference"] < tolerance:
        return []
    return [f"{graph} in {run}: {result}, but expected {n_images} and less than {tolerance}"]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--node", type=Path, metavar="FOLDER", help="run the graphs in Node.js")
    options = parser.parse_args()
    paths, y = photographs()
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        figures, fitted, failures = export_models(folder, paths, y)
        if options.node:
            write_pixels(paths, folder)
            figures["node"] = run_node(options.node, folder)
    for graph, runs in figures.get("node", {}).pop("outputs", {}).items():
        model = fitted[graph.rpartition("_")[0]]
        expected = model.predict_proba(paths)
        for run, outputs in runs.items():
            figures[graph][run] = compare(outputs, expected, model.classes_)
            failures += failures_in_node(figures, run, graph)
            print(graph, run, figures[graph][run], flush=True)
    finish(figures, failures, options.json)


if __name__ == "__main__":
    main()
