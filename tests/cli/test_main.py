import os
import re
import signal
import subprocess
import sys
import time
import warnings

import click
import pytest
from cli_helpers import run, save_classes
from click.shell_completion import ShellComplete

from sktransfer import __version__
from sktransfer.cli import library, messages
from sktransfer.cli.main import SECTIONS, cli, main
from sktransfer.cli.messages import Notes
from sktransfer.utils.progress import progress_bar

COMMANDS = [command.name for commands in SECTIONS.values() for command in commands]


def call(arguments, **options):
    """Run the command in a new process, without a terminal."""
    command = [sys.executable, "-m", "sktransfer", *map(str, arguments)]
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, **options
    )


def python(script):
    """Run a script in a new process, and return what it prints."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_commands_are_the_documented_ones():
    assert list(cli.commands) == COMMANDS
    assert set(COMMANDS) == {
        *("train", "predict", "evaluate", "embed", "recommend", "rank", "leaks", "export", "show"),
        *("card", "backbones", "cache", "demo"),
    }


def test_help_lists_commands_and_exit_statuses():
    text = run("--help").stdout
    assert all(re.search(rf"^  {name} ", text, re.M) for name in COMMANDS)
    assert "Exit status: 0 success, 1 failure, 2 invalid options or arguments, 130" in text
    assert "..." not in text.partition("Models:")[2].partition("Example")[0]


@pytest.mark.parametrize("command", [*COMMANDS, "cache info", "cache clear"])
def test_help_of_each_command_has_an_example(command):
    text = run(*command.split(), "--help").stdout
    assert re.search(rf"Examples?:\n(.*\n)*    sktransfer {command.split()[0]} ", text)
    assert max(map(len, text.splitlines())) <= 80


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sktransfer {__version__}\n"


def test_package_runs_as_a_command():
    assert call(["--version"]).stdout == f"sktransfer {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["backbones", "lite"], 0),
        (["backbones", "--help"], 0),
        (["backbones", "zzz"], 1),
        (["train", "nowhere", "-o", "m.skt"], 1),
        (["train", "nowhere"], 2),
        (["trian"], 2),
        (["backbones", "--colour"], 2),
    ],
)
def test_commands_return_the_documented_exit_statuses(arguments, status, capsys):
    assert main(arguments) == status
    assert (capsys.readouterr().err == "") is (status == 0)


def test_help_and_version_import_nothing_heavy():
    script = """
import sys
from sktransfer.cli.main import main
for arguments in (["--help"], ["--version"], ["train", "--help"]):
    assert main(arguments) == 0
print(sorted({"torch", "numpy", "sklearn", "PIL"} & set(sys.modules)))
"""
    assert python(script).splitlines()[-1] == "[]"


def test_show_does_without_torch(model):
    script = f"""
import sys
from sktransfer.cli.main import main
assert main(["show", {str(model)!r}]) == 0
print("torch" in sys.modules)
"""
    assert python(script).splitlines()[-1] == "False"


def test_subcommands_and_options_are_completed():
    complete = ShellComplete(cli, {}, "sktransfer", "_SKTRANSFER_COMPLETE").get_completions
    assert [item.value for item in complete([], "e")] == ["evaluate", "export", "embed"]
    assert [item.value for item in complete(["train"], "--str")] == ["--strategy"]
    values = [item.value for item in complete(["train", "--strategy"], "")]
    assert values == ["auto", "frozen", "staged", "full"]


def test_shells_get_their_completions():
    variables = {
        "_SKTRANSFER_COMPLETE": "bash_complete",
        "COMP_WORDS": "sktransfer pre",
        "COMP_CWORD": "1",
    }
    assert call([], env=variables).stdout == "plain,predict\n"
    source = call([], env={"_SKTRANSFER_COMPLETE": "zsh_source"}).stdout
    assert source.startswith("#compdef sktransfer")


def failing(monkeypatch, error):
    """Let the command backbones raise an error."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(library.backbones, "callback", fail)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("wrong"), "wrong"),
        (PermissionError(13, "Permission denied", "a.png"), "a.png: Permission denied"),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_take_one_line(error, message, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert main(["backbones"]) == 1
    assert capsys.readouterr() == ("", f"sktransfer: {message}\n")


def test_bugs_keep_their_traceback(monkeypatch):
    failing(monkeypatch, AttributeError("a bug"))
    with pytest.raises(AttributeError, match="a bug"):
        main(["backbones"])


def test_interruption_is_a_one_line_message(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["backbones"]) == 130
    assert capsys.readouterr().err == "sktransfer: interrupted; no file was written\n"


def test_interrupted_process_ends_with_130(tmp_path):
    root = save_classes(tmp_path / "photos")
    command = [sys.executable, "-m", "sktransfer", "train", root, "-o", tmp_path / "m.skt"]
    # Enough epochs that the fit is running when the signal comes.
    arguments = ["--image-size", "224", "--strategy", "full"]
    process = subprocess.Popen(
        [*map(str, command), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        lines = [process.stderr.readline(), process.stderr.readline()]
        assert lines[1] == "Training on 24 images ...\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "sktransfer: interrupted; no file was written"
    assert "Traceback" not in errors
    assert not (tmp_path / "m.skt").exists()


@pytest.mark.slow
def test_closed_pipe_ends_quietly(tmp_path):
    """As with `sktransfer backbones | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sktransfer", "backbones"]
    process = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(writing)
    assert process.stderr == ""
    assert process.returncode == 1


def test_warnings_take_one_line(monkeypatch, capsys):
    def warn(*arguments, **options):
        warnings.warn("few images", stacklevel=2)
        warnings.warn("few images", stacklevel=2)

    monkeypatch.setattr(library.backbones, "callback", warn)
    monkeypatch.setattr(sys, "warnoptions", [])
    showwarning = warnings.showwarning
    assert main(["backbones"]) == 0
    assert capsys.readouterr().err == "sktransfer: warning: few images\n" * 2
    assert warnings.showwarning is showwarning


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_become_lines_without_a_terminal(is_terminal, monkeypatch, capsys):
    def embed(*arguments, **options):
        click.echo("Embedding 3 images ...", err=True)
        with progress_bar(640, verbose=1, description="Embedding") as bar:
            for _ in range(10):
                clock[0] += 4
                bar.update(64)
                bar.refresh()

    clock = [0.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(library.backbones, "callback", embed)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: is_terminal)
    assert main(["backbones"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("Embedding 3 images ...\n")
    assert ("\r" in errors) is is_terminal
    if not is_terminal:
        shares = re.findall(r"^Embedding: +(\d+)%.* (\d+)/640 \[.*image/s\]\n", errors, re.M)
        assert shares == [("30", "192"), ("60", "384"), ("90", "576")]
        assert errors.count("\n") == 4


def test_quiet_commands_draw_no_bars():
    assert Notes(quiet=False).verbose == 1
    assert Notes(quiet=True).verbose == 0
