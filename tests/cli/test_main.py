import subprocess
import sys

from sktransfer import __version__
from sktransfer.cli.main import main


def test_backbones_command_lists_matching_backbones(capsys):
    assert main(["backbones", "lite"]) == 0
    assert "efficientnet_lite0       4.7 M    0.41      1280" in capsys.readouterr().out


def test_backbones_command_fails_without_a_match(capsys):
    assert main(["backbones", "zzz"]) == 1
    message = "no backbone has 'zzz' in its name; list all with: sktransfer backbones"
    assert capsys.readouterr() == ("", f"sktransfer: {message}\n")


def test_package_runs_as_a_command():
    command = [sys.executable, "-m", "sktransfer", "--version"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output == f"sktransfer {__version__}\n"
