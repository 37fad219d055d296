"""From a folder of photographs to a file that other programs run, in a clean environment."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

pytest.importorskip("onnxruntime")

N_TRAIN, N_TEST = 30, 10


@pytest.fixture
def photographs(tmp_path):
    """Cut the sample photographs into classes that differ in place and in subject."""
    random = np.random.RandomState(0)
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for number in range(N_TRAIN + N_TEST):
            top, left = random.randint(0, 200), random.randint(0, 400)
            part = "train" if number < N_TRAIN else "test"
            path = tmp_path / "photos" / part / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[top : top + 220, left : left + 240]).save(path)
    return tmp_path


@pytest.fixture
def command(photographs):
    """Return a function that runs a command, with an empty home."""
    home = photographs / "home"
    home.mkdir()
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}

    def run(*arguments):
        full = [sys.executable, "-m", "sktransfer", *arguments]
        done = subprocess.run(
            full, cwd=photographs, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_train_evaluate_predict_show_and_export(command, photographs):
    import onnxruntime

    command("train", "photos", "-o", "model.skt")
    scores = json.loads(command("evaluate", "model.skt", "photos", "--split", "test", "--json"))
    assert scores["accuracy"] >= 0.9
    command("predict", "model.skt", "photos/test", "--probabilities", "-o", "labels.csv")
    with open(photographs / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * N_TEST
    assert np.mean([row["label"] in row["path"] for row in rows]) == pytest.approx(
        scores["accuracy"]
    )
    assert "flower, temple" in command("show", "model.skt")
    command("export", "model.skt", "-o", "model.onnx")
    session = onnxruntime.InferenceSession(photographs / "model.onnx")
    for row in rows[::5]:
        image = np.asarray(Image.open(photographs / row["path"]))
        label, probabilities = session.run(["label", "probabilities"], {"images": image[None]})
        assert label[0] == row["label"]
        assert probabilities[0].max() == pytest.approx(float(row["probability"]), abs=2e-3)
