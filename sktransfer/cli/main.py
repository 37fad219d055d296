"""The command `sktransfer`: its subcommands, exit statuses and messages of errors.

Modules of this folder import the rest of the package only inside commands, because torch takes
seconds to import: `sktransfer --help` and `sktransfer show` do without it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any

import click

from sktransfer._version import __version__
from sktransfer.cli.demo_command import demo
from sktransfer.cli.diagnose import leaks, rank, recommend
from sktransfer.cli.embed import embed
from sktransfer.cli.evaluate import evaluate
from sktransfer.cli.library import backbones, cache
from sktransfer.cli.messages import (
    EXPECTED_ERRORS,
    Failure,
    Interruption,
    PlainLines,
    describe,
    show_warning,
)
from sktransfer.cli.model_files import card, export, show
from sktransfer.cli.predict import predict
from sktransfer.cli.train import train

SECTIONS = {
    "Models": (train, predict, evaluate, export, show, card),
    "Images": (recommend, rank, leaks, embed),
    "Other": (backbones, cache, demo),
}

_PROGRAM = "sktransfer"
_EPILOG = f"""\b
Example, with the images photos/cat/*.jpg, photos/dog/*.jpg, ...:
  sktransfer train photos -o pets.skt
  sktransfer predict pets.skt new -o new.csv

\b
Results go to standard output; progress, notes, warnings and errors to standard error.
Exit status: 0 success, 1 failure, 2 invalid options or arguments, 130 interrupted.

\b
Completion of subcommands and options in bash (zsh and fish: docs/command_line.md):
  eval "$(_{_PROGRAM.upper()}_COMPLETE=bash_source {_PROGRAM})"
"""


class _Group(click.Group):
    """Subcommands in sections; errors of users are one message each, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                rows = [
                    (str(command.name).ljust(width), command.get_short_help_str(limit))
                    for command in commands
                ]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        stderr = sys.stderr  # None if it is closed
        if stderr is not None and not stderr.isatty():  # a terminal draws the bars itself
            stderr = PlainLines(stderr)
        with warnings.catch_warnings(), redirect_stderr(stderr):
            if not sys.warnoptions:
                warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show_warning
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise Interruption from None
            # click's own ways to end a command, and a closed pipe, with which click deals.
            except (click.exceptions.Exit, click.Abort, BrokenPipeError):
                raise
            except EXPECTED_ERRORS as error:
                command = self.commands[str(ctx.invoked_subcommand)]
                can_skip = any(option.name == "skip_broken" for option in command.params)
                raise Failure(describe(error, can_skip)) from error


@click.group(
    cls=_Group,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="sktransfer %(version)s")
def cli() -> None:
    """Transfer learning for images: train a classifier on a folder of images, and use it."""


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str or None
        Command-line arguments without the program's name; `None` is `sys.argv[1:]`.

    Returns
    -------
    int
        The exit status: 0 for success, 1 for a failure, 2 for invalid options or arguments, 130
        after an interruption from the keyboard.
    """
    words = None if arguments is None else list(arguments)
    try:
        status = cli.main(words, prog_name=_PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # interrupted while options were parsed
        Interruption().show()
        return Interruption.exit_code
    return status if isinstance(status, int) else 0
