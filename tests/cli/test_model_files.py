import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from cli_helpers import run, save_splits
from PIL import Image

from sktransfer.export import show as export_show


def test_exported_model_predicts_the_same(model, photos, tmp_path):
    result = run("export", model, "-o", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    image = sorted((photos / "owl").iterdir())[0]
    with Image.open(image) as opened:
        label = session.run(["label"], {"images": np.asarray(opened.convert("RGB"))[None]})[0]
    assert label.tolist() == ["owl"]
    assert result.stdout == ""
    assert f"Wrote {tmp_path / 'm.onnx'}" in result.stderr
    assert re.search(r"Largest difference from the model: \S+ on 12 images\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.slow
def test_export_stores_most_weights_as_float16_on_request(model, tmp_path):
    run("export", model, "-o", tmp_path / "m.onnx", "--weight-dtype", "float16")
    constants = onnx.load(tmp_path / "m.onnx").graph.initializer
    halves = [each for each in constants if each.data_type == onnx.TensorProto.FLOAT16]
    size = (tmp_path / "m.onnx").stat().st_size
    assert sum(len(each.raw_data) for each in halves) > 0.9 * size


def test_export_checks_the_name_of_the_file(model, tmp_path):
    result = run("export", model, "-o", tmp_path / "m.bin", code=2)
    assert "expected a file that ends in .onnx" in result.stderr


SUMMARY = {
    "model": "FineTunedImageClassifier",
    "classes": ["cat", "dog"],
    "networks": [
        {
            "backbone": "resnet18",
            "adapted_batch_norm": False,
            "preprocessing": {"crop": (224, 192), "mean": (0.48512345,)},
            "strategy": None,
            "stages": [
                {"stage": "head", "trainable": 3843, "valid_acc": None},
                {"stage": "all", "trainable": 1200000, "valid_acc": 0.98765},
            ],
        }
    ],
    "bytes": 12_345_678,
    "versions": {},
    "labels": [str(number) for number in range(1000)],
}


def test_summary_is_printed_as_text(tmp_path, monkeypatch):
    path = tmp_path / "m.skt"
    path.touch()
    monkeypatch.setattr(export_show, "read_summary", lambda path: SUMMARY)
    assert run("show", path).stdout == (
        "model     FineTunedImageClassifier\n"
        "classes   cat, dog\n"
        "networks\n"
        "  backbone            resnet18\n"
        "  adapted batch norm  no\n"
        "  preprocessing\n"
        "    crop  224, 192\n"
        "    mean  0.4851\n"
        "  stages\n"
        "    stage  trainable  valid acc\n"
        "    head       3,843          -\n"
        "    all    1,200,000     0.9877\n"
        "bytes     12 MB\n"
        "labels    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (1,000)\n"
    )


def test_show_reads_a_model_of_train(model):
    printed = json.loads(run("show", model, "--json").stdout)
    assert printed["model"] == "FineTunedImageClassifier"
    assert printed["classes"] == ["cat", "dog", "owl"]
    assert printed["networks"][0]["backbone"] == "efficientnet_lite0"
    assert printed["networks"][0]["parameters"]["image_size"] == 32
    text = run("show", model).stdout
    assert "image size" not in text
    assert re.search(r"^classes +cat, dog, owl$", text, re.M)
    assert re.search(r"^ +backbone +efficientnet_lite0$", text, re.M)


def test_card_shows_the_scores_of_evaluate(model, photos, tmp_path):
    output = tmp_path / "README.md"
    result = run("card", model, "--data", photos, "--license", "mit", "-o", output)
    assert result.stdout == ""
    assert re.search(rf"^Wrote {output} \(\S+ kB\)$", result.stderr, re.M)
    text = output.read_text()
    assert '\nlicense: "mit"\n' in text
    assert "Accuracy **1.000**, with a 95% interval of 0.862 to 1.000: 24 of 24 labeled" in text
    scores = tmp_path / "scores.json"
    scores.write_text(run("evaluate", model, photos, "--json").stdout)
    result = run("card", model, "--evaluation", scores, "--license", "mit")
    assert result.stdout == text
    assert result.stderr == ""


def test_card_scores_the_test_images_of_a_folder_with_splits(model, tmp_path):
    text = run("card", model, "--data", save_splits(tmp_path / "photos"), "--quiet").stdout
    assert "of 12 labeled images of the split test." in text


def test_card_replaces_a_file_and_says_so(model, tmp_path):
    output = tmp_path / "README.md"
    output.write_text("old")
    assert f"Replaced {output} (" in run("card", model, "-o", output).stderr
    assert output.read_text().startswith("---\nlibrary_name: sktransfer\n")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_failed_card_leaves_an_existing_file_unchanged(model, tmp_path):
    output, scores = tmp_path / "README.md", tmp_path / "scores.json"
    output.write_text("old")
    scores.write_text("[]")
    result = run("card", model, "--evaluation", scores, "-o", output, code=1)
    assert "pass what `sktransfer evaluate MODEL DIR --json` prints\n" in result.stderr
    assert output.read_text() == "old"


def test_card_checks_its_arguments(model, tmp_path):
    result = run("card", model, "-o", tmp_path / "card.html", code=2)
    assert "expected a file that ends in .md" in result.stderr
    both = ("--data", tmp_path, "--evaluation", tmp_path / "scores.json")
    assert "but expected one of them" in run("card", model, *both, code=2).stderr
    result = run("card", model, "--evaluation", tmp_path / "scores.json", code=1)
    assert result.stderr == f"sktransfer: {tmp_path / 'scores.json'}: No such file or directory\n"
    result = run("card", tmp_path / "m.skt", code=1)
    assert result.stderr == f"sktransfer: there is no model '{tmp_path / 'm.skt'}'\n"
    (tmp_path / "m.skt").write_bytes(b"no model")
    result = run("card", tmp_path / "m.skt", code=1)
    assert result.stderr.startswith(f"sktransfer: Got '{tmp_path / 'm.skt'}', but ")
    assert result.stderr.count("\n") == 1


def test_card_without_skops_fails_before_images_are_scored(model, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "skops.card", None)
    result = run("card", model, "--data", photos, code=1)
    assert result.stderr == (
        "sktransfer: A model card needs 'skops.card', which is not installed. Install it with: "
        "pip install 'sktransfer[skops]'\n"
    )


def test_file_without_a_model_is_a_one_line_error(tmp_path):
    (tmp_path / "m.skt").write_bytes(b"no model")
    result = run("show", tmp_path / "m.skt", code=1)
    assert result.stderr.startswith(f"sktransfer: Got '{tmp_path / 'm.skt'}', but ")
    assert result.stderr.count("\n") == 1


def test_missing_file_is_a_one_line_error(tmp_path):
    result = run("show", tmp_path / "m.skt", code=1)
    assert result.stderr.count("\n") == 1
