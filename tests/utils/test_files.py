import os
import subprocess
import sys

import pytest

from sktransfer.utils.files import complete_file, locked_file

fcntl = pytest.importorskip("fcntl")


def test_lock_of_a_process_ends_with_it(tmp_path):
    script = (
        "import os, sys, pathlib\n"
        "from sktransfer.utils.files import locked_file\n"
        "with locked_file(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
        "    os._exit(9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(BlockingIOError), locked_file(tmp_path / "lock"):
            pass
    with locked_file(tmp_path / "lock"):
        pass


def test_file_system_without_locks_does_not_lock(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked_file(tmp_path / "lock"), locked_file(tmp_path / "lock"):
        pass


def test_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def fail():
        with complete_file(tmp_path / "a.txt") as unfinished:
            unfinished.write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
