"""Cross-validated accuracy of a linear probe on 432 real photographs in 8 classes.

The images are those of the Debian package `tuxpaint-stamps-default` (apt install
tuxpaint-stamps-default): eight themes, PNG, transparency composited on white. The classifier is
`StandardScaler` and `LogisticRegression(C=0.03)` on frozen embeddings, in 5 shuffled folds, seed 0.

    python benchmarks/photographs.py [--backbone NAME] [--image-size auto] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor
from sktransfer.store.session import session_store

STAMPS = Path("/usr/share/tuxpaint/stamps")
THEMES = ["animals", "food", "plants", "vehicles", "household", "clothes", "town", "space"]
FLOOR = 0.815


def photographs(root: Path = STAMPS) -> tuple[list[str], np.ndarray]:
    """List the paths, theme by theme, and their labels."""
    if not root.is_dir():
        sys.exit(f"{root} is not there; install it with: apt install tuxpaint-stamps-default")
    paths, labels = [], []
    for label, theme in enumerate(THEMES):
        for path in sorted(map(str, (root / theme).rglob("*.png"))):
            if not any(mark in Path(path).name for mark in ("_mirror", "_flip", "photo_")):
                paths.append(path)
                labels.append(label)
    return paths, np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--image-size", choices=["auto"], help="larger, and whole")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    paths, y = photographs()
    pipeline = make_pipeline(
        PretrainedFeatureExtractor(options.backbone, image_size=options.image_size),
        StandardScaler(),
        LogisticRegression(C=0.03, max_iter=2000),
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    start = time.perf_counter()
    scores = cross_val_score(pipeline, paths, y, cv=folds)
    result = {
        "backbone": options.backbone,
        "image_size": options.image_size,
        "images": len(paths),
        "embedded": session_store().info().computed,
        "accuracy": round(scores.mean(), 4),
        "folds": scores.round(4).tolist(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(result["accuracy"] < FLOOR)


if __name__ == "__main__":
    main()
