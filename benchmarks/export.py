"""Compare models that were exported to ONNX with the originals, on all 432 photographs.

Three models: a pipeline on frozen embeddings, FineTunedImageClassifier() with its defaults, and a
tuned classifier with an image size of its own. `export_onnx` runs each graph in ONNX Runtime, and
raises an error if the most probable class of a photograph differs, or a probability by more than
0.001.

The run fails unless all three are exported.

    python benchmarks/export.py [--json PATH]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _common import command_line, finish
from _sets import THEMES, photographs
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor, export_onnx
from sktransfer.utils.errors import ExportError


def models() -> dict[str, Any]:
    """Build the models, unfitted."""
    linear = [StandardScaler(), LogisticRegression(C=0.03)]
    return {
        "pipeline": make_pipeline(PretrainedFeatureExtractor(), *linear),
        "default": FineTunedImageClassifier(random_state=0),
        "own size": FineTunedImageClassifier(
            image_size=(160, 200), unfreeze=(0, 2), max_epochs=2, random_state=0
        ),
    }


def main() -> None:
    options = command_line(__doc__).parse_args()
    paths, y = photographs()
    figures, failures = {}, []
    for name, model in models().items():
        model.fit(paths, [THEMES[theme] for theme in y])
        with tempfile.TemporaryDirectory() as folder:
            try:
                exported = export_onnx(model, Path(folder, "model.onnx"), images=paths)
            except ExportError as error:
                failures.append(f"{name}: {error}")
                continue
        figures[name] = {
            "images": exported.n_images,
            "max_difference": float(f"{exported.max_difference:.2g}"),
            "megabytes": round(exported.n_bytes / 1e6, 2),
        }
        print(name, figures[name], flush=True)
    finish(figures, failures, options.json)


if __name__ == "__main__":
    main()
