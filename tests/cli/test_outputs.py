import json
import os

import click
import numpy as np
import pytest

from sktransfer.cli.messages import Notes
from sktransfer.cli.outputs import as_json, check_output, replacing, write_table

QUIET = Notes(quiet=True)


def test_files_appear_at_the_end_only(tmp_path):
    output = tmp_path / "out.csv"
    with replacing(output, QUIET) as path:
        path.write_text("half")
        assert not output.exists()
        path.write_text("whole")
    assert output.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [output]


def test_files_next_to_the_output_appear_too(tmp_path):
    """Large ONNX files have their weights in a second file."""
    with replacing(tmp_path / "m.onnx", QUIET) as path:
        path.write_text("graph")
        path.with_name("m.onnx.data").write_text("weights")
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_keeps_the_existing_file(error, tmp_path):
    output = tmp_path / "out.csv"
    output.write_text("earlier")

    def write():
        with replacing(output, QUIET) as path:
            path.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert output.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [output]


def test_permissions_are_those_of_other_new_files(tmp_path):
    (tmp_path / "other").write_text("")
    write_table({"a": [1]}, tmp_path / "out.csv", QUIET)
    modes = {os.stat(tmp_path / name).st_mode for name in ("other", "out.csv")}
    assert len(modes) == 1


def test_inputs_are_never_outputs(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n")
    (tmp_path / "link.csv").symlink_to(table)
    for name in ("labels.csv", "link.csv", "../labels.csv"):
        output = (tmp_path / "folder" / name) if name.startswith("..") else tmp_path / name
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(click.BadParameter, match="it is an input of this command"):
            check_output(output, (".csv",), [tmp_path / "gone", table])
    check_output(tmp_path / "other.csv", (".csv",), [table])


def test_output_needs_a_folder_and_a_suffix(tmp_path):
    with pytest.raises(click.BadParameter, match=r"but there is no folder '.*x'\."):
        check_output(tmp_path / "x" / "out.csv", (".csv",))
    with pytest.raises(click.BadParameter, match=r"expected a file that ends in \.csv or \.npy"):
        check_output(tmp_path / "out.txt", (".csv", ".npy"))
    with pytest.raises(click.BadParameter, match="but it is a folder"):
        check_output(tmp_path, ())
    check_output(tmp_path / "OUT.CSV", (".csv",))


def test_json_has_plain_types():
    value = {
        "array": np.arange(2),
        "nan": np.float64("nan"),
        "pair": (1, np.int64(2)),
        "path": os.path,
        3: np.bool_(True),
    }
    printed = json.loads(as_json(value))
    assert printed.pop("path") == str(os.path)
    assert printed == {"array": [0, 1], "nan": None, "pair": [1, 2], "3": True}
