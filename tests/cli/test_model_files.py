import json
import sys
import types

from cli_helpers import run

import sktransfer


def test_export_writes_the_model(model, tmp_path, monkeypatch):
    exported = []

    def export_onnx(classifier, path):
        exported.append(classifier.classes_.tolist())
        path.write_bytes(b"onnx")

    monkeypatch.setattr(sktransfer, "export_onnx", export_onnx, raising=False)
    result = run("export", model, "-o", tmp_path / "m.onnx")
    assert exported == [["cat", "dog", "owl"]]
    assert (tmp_path / "m.onnx").read_bytes() == b"onnx"
    assert (result.stdout, result.stderr) == ("", f"Wrote {tmp_path / 'm.onnx'} (4 bytes)\n")
    result = run("export", model, "-o", tmp_path / "m.bin", code=2)
    assert "expected a file that ends in .onnx" in result.stderr


SUMMARY = {
    "format": "skt",
    "classes": ["cat", "dog"],
    "image_size": [224, 224],
    "backbone": {"name": "resnet18", "digest": "ab12"},
    "inputs": [{"name": "image", "shape": ["N", 3]}],
    "note": None,
}


def test_show_prints_the_summary(model, monkeypatch):
    module = types.ModuleType("sktransfer.export.show")
    module.read_summary = lambda path: SUMMARY if path == model else None
    monkeypatch.setitem(sys.modules, "sktransfer.export", types.ModuleType("sktransfer.export"))
    monkeypatch.setitem(sys.modules, "sktransfer.export.show", module)
    assert run("show", model).stdout == (
        "format      skt\n"
        "classes     cat, dog\n"
        "image size  224, 224\n"
        "backbone\n"
        "  name    resnet18\n"
        "  digest  ab12\n"
        "inputs\n"
        "  name image, shape N, 3\n"
        "note\n"
    )
    assert json.loads(run("show", model, "--json").stdout) == SUMMARY


def test_missing_file_is_one_line(tmp_path):
    result = run("show", tmp_path / "m.skt", code=1)
    assert result.stderr.count("\n") == 1
