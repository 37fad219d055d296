"""Messages of the command line: notes, warnings and errors, all on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import click

from sktransfer.utils.tables import counted

# Errors of users, data or the machine. Others are bugs, whose traceback is wanted.
EXPECTED_ERRORS = (OSError, ValueError, ImportError, ArithmeticError, RuntimeError, MemoryError)

MAX_LISTED = 10
_SECONDS_BETWEEN_BARS = 10.0
_CURSOR_UP = "\x1b[A"


class PlainLines:
    r"""A stream that turns bars into plain lines, at most one in ten seconds.

    A terminal overwrites a bar with its next state; in a file, each state would stay.

    Parameters
    ----------
    stream : text stream
        Standard error. Everything but bars is passed on unchanged.

    Examples
    --------
    >>> import io
    >>> stream = io.StringIO()
    >>> lines = PlainLines(stream)
    >>> for text in ("Training ...\n", "\r 0%", "\n", "\x1b[A", "Trained\n"):
    ...     _ = lines.write(text)
    >>> stream.getvalue()
    'Training ...\nTrained\n'
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._last_bar = time.monotonic()
        self._in_line = False

    def write(self, text: str) -> int:
        """Write a text; a bar begins with a carriage return."""
        if text.startswith("\r"):
            self._write_bar(text.strip())
        # Between bars there are only line breaks and moves of the cursor.
        elif self._in_line or text.replace(_CURSOR_UP, "").strip("\n"):
            self._stream.write(text)
            self._in_line = not text.endswith("\n")
        return len(text)

    def _write_bar(self, bar: str) -> None:
        now = time.monotonic()
        if bar and now - self._last_bar >= _SECONDS_BETWEEN_BARS:
            self._stream.write(f"{bar}\n")
            self._last_bar = now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Failure(click.ClickException):
    """A command that failed: status 1, and a message without a traceback."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message."""
        click.echo(f"sktransfer: {self.format_message()}", file=file, err=file is None)


class Interruption(Failure):
    """A command that was interrupted from the keyboard: status 130, as in shells."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted; no file was written")


@dataclass
class Job:
    """The number of images that are processed; those that turn out to be broken are subtracted."""

    n_images: int


class Notes:
    """Lines on standard error that say what a command does, unless it is quiet.

    Parameters
    ----------
    quiet : bool
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    @property
    def verbose(self) -> int:
        """`verbose` of estimators: 1, which draws bars, or 0."""
        return int(not self.quiet)

    def __call__(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            click.echo(text, err=True)

    def list(self, text: str, items: Sequence[str]) -> None:
        """Print a line, and the first items below it."""
        self(listed(text, items))

    @contextmanager
    def timed(self, verb: str, past: str, n_images: int, what: str = "") -> Iterator[Job]:
        """Print a line before and after some images are processed, with the images per second."""
        job = Job(n_images)
        self(f"{verb} {counted(n_images, 'image')}{what} ...")
        start = time.perf_counter()
        yield job
        seconds = max(time.perf_counter() - start, 1e-3)
        rate, count = job.n_images / seconds, counted(job.n_images, "image") + what
        self(f"{past} {count} in {seconds:,.1f} s ({rate:,.{0 if rate >= 10 else 1}f} images/s)")


def listed(text: str, items: Sequence[str]) -> str:
    """Return a line, and the first items in lines of their own; a single item in the same line.

    Examples
    --------
    >>> print(listed("2 files left out", ["a.txt", "b.txt"]))
    2 files left out:
      a.txt
      b.txt
    >>> listed("1 file left out", ["a.txt"])
    '1 file left out: a.txt'
    """
    if len(items) == 1:
        return f"{text}: {items[0]}"
    first = f"; the first {MAX_LISTED}" if len(items) > MAX_LISTED else ""
    return "\n  ".join([f"{text}{first}:", *items[:MAX_LISTED]])


def describe(error: BaseException, can_skip: bool) -> str:
    """Return the message of an error: one line, or a line for each of the first broken images.

    Parameters
    ----------
    error : Exception
    can_skip : bool
        Whether the command has the option `--skip-broken`.
    """
    from sktransfer.utils.errors import ImageError

    if isinstance(error, ImageError):
        text, problems = broken_images(error)
        return listed(f"{text} (see --skip-broken)" if can_skip else text, problems)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def broken_images(error: Any) -> tuple[str, list[str]]:
    """Return how many images an `ImageError` names, and each image with its problem."""
    problems = [f"{each.source or f'image {each.row}'}: {each.reason}" for each in error.errors]
    return f"{counted(len(problems), 'image')} cannot be read", problems


def show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    """Print a warning in one line, without the line of code that raised it."""
    click.echo(f"sktransfer: warning: {message}", err=True)
