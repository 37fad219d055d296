"""Files of earlier releases are loaded, and predict what they predicted then.

Run this file as a script to write the files of a new format version; never replace the old ones.
"""

from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from helpers import X, Y, images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.fixes import parse_version
from torch import nn

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor, load, save
from sktransfer.backbones.sources import SOURCES, LoadedNetwork, register_source
from sktransfer.export.archive import VERSION
from sktransfer.export.show import read_summary
from sktransfer.transforms.preprocessing import Preprocessing

FOLDER = Path(__file__).parent / "saved"
TEST = images(5, seed=3)


def toy(name, weights):
    """Build a network so small that its weights can be kept with the tests."""
    torch.manual_seed(int(weights != "default"))
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:]))
    return LoadedNetwork(f"toy:{name}", model, Preprocessing(16, (16, 16)), pretrained=True)


@pytest.fixture(autouse=True)
def source(monkeypatch):
    monkeypatch.setattr("sktransfer.backbones.sources.SOURCES", {**SOURCES})
    register_source("toy", toy)


def models():
    """Fit the models whose files are kept, by name, and say whether all weights are in the file."""
    settings = {"cache": None, "random_state": 0, "engine": "torch"}
    tuned = {"unfreeze": (0, 1, 2), "max_epochs": 2, "batch_norm": "adapt", "n_views": 1}
    extractor = PretrainedFeatureExtractor(image_size=32, cache=None, engine="torch")
    return {
        "classifier": (FineTunedImageClassifier("toy:net", **tuned, **settings), True),
        "head": (FineTunedImageClassifier(image_size=32, unfreeze=0, **settings), False),
        "pipeline": (make_pipeline(extractor, StandardScaler(), LogisticRegression()), False),
    }


FILES = sorted(FOLDER.glob("*.skt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_earlier_file_predicts_as_before(path):
    if "pipeline" in path.stem:
        saved_with = read_summary(path)["versions"]["scikit-learn"]
        if parse_version(sklearn.__version__) < parse_version(saved_with):
            pytest.skip("scikit-learn reads no files of later releases")
    expected = np.load(path.with_suffix(".npy"))
    np.testing.assert_allclose(load(path).predict_proba(TEST), expected, atol=1e-4)


def test_each_format_version_has_files():
    assert {path.stem for path in FILES} >= {
        f"{name} {version}" for name in models() for version in range(1, VERSION + 1)
    }


if __name__ == "__main__":
    register_source("toy", toy)
    FOLDER.mkdir(exist_ok=True)
    for name, (model, standalone) in models().items():
        path = FOLDER / f"{name} {VERSION}.skt"
        save(model.fit(X, Y), path, standalone=standalone)
        np.save(path.with_suffix(".npy"), model.predict_proba(TEST))
        print(path, path.stat().st_size)
