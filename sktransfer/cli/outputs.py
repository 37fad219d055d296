"""Outputs of commands: tables and JSON, on standard output or in files that appear as a whole."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sktransfer.cli.messages import Notes

Table = Mapping[str, Sequence[Any]]


def check_output(output: Path, suffixes: Sequence[str], inputs: Iterable[Path] = ()) -> None:
    """Check the file that a command will write, before it starts to work.

    Raises
    ------
    click.BadParameter
        If the file has another suffix, is an input of the command or a folder, or if its folder
        does not exist or cannot be written to.
    """
    problem = None
    if suffixes and output.suffix.lower() not in suffixes:
        problem = f"expected a file that ends in {' or '.join(suffixes)}"
    elif output.is_dir():
        problem = "it is a folder"
    elif not output.parent.is_dir():
        problem = f"there is no folder {str(output.parent)!r}"
    elif not os.access(output.parent, os.W_OK):
        problem = f"cannot write to the folder {str(output.parent)!r}"
    elif output.exists() and any(path.exists() and path.samefile(output) for path in inputs):
        problem = "it is an input of this command; choose another file"
    if problem:
        raise click.BadParameter(f"Got {str(output)!r}, but {problem}.", param_hint="'-o'")


@contextmanager
def replacing(output: Path, notes: Notes) -> Iterator[Path]:
    """Yield a path to write to; the file, and files next to it, then appear under `output`.

    If the block fails, nothing appears, and an existing file stays as it is.
    """
    existed = output.exists()
    # In the same folder, so that a rename moves them.
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder / output.name
        size = os.path.getsize(folder / output.name)
        # The file itself comes last: it may refer to the others.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == output.name):
            os.replace(path, output.parent / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    from sktransfer.utils.tables import format_bytes

    notes(f"{'Replaced' if existed else 'Wrote'} {output} ({format_bytes(size)})")


def write_table(table: Table, output: Path, notes: Notes) -> None:
    """Write columns to a `.csv`, `.json` or `.parquet` file.

    Raises
    ------
    ImportError
        If the file is `.parquet` and pyarrow is missing.
    """
    suffix = output.suffix.lower()
    with replacing(output, notes) as path:
        if suffix == ".parquet":
            pyarrow = import_pyarrow()
            pyarrow.parquet.write_table(pyarrow.table(dict(table)), path)
        else:
            path.write_bytes(encode(as_csv(table) if suffix == ".csv" else as_json(records(table))))


def import_pyarrow() -> Any:
    """Import pyarrow and its module `parquet`."""
    from sktransfer.utils.errors import import_optional

    import_optional("pyarrow.parquet", extra="parquet", purpose="Writing a .parquet file")
    return import_optional("pyarrow", extra="parquet", purpose="Writing a .parquet file")


def print_text(text: str) -> None:
    """Print a result to standard output; names of files need not be UTF-8."""
    # A stream that replaces standard output, such as a StringIO, may take text only.
    click.echo(encode(text) if hasattr(sys.stdout, "buffer") else text, nl=False)


def print_json(result: Any) -> None:
    """Print a result as JSON."""
    print_text(as_json(result))


def as_json(result: Any) -> str:
    """Format a result as JSON; NaN, which JSON lacks, is null.

    Examples
    --------
    >>> print(as_json({"accuracy": float("nan")}), end="")
    {
      "accuracy": null
    }
    """
    return json.dumps(_plain(result), indent=2) + "\n"


def as_csv(table: Table) -> str:
    r"""Format columns as CSV.

    Examples
    --------
    >>> as_csv({"path": ["a.png", "b,c.png"], "probability": [0.5, 1.0]})
    'path,probability\na.png,0.5\n"b,c.png",1.0\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue()


def records(table: Table) -> list[dict[str, Any]]:
    """Return one dict for each row of a table."""
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def encode(text: str) -> bytes:
    """Encode text as UTF-8; a name of a file that is not UTF-8 keeps its bytes."""
    return text.encode("utf-8", "surrogateescape")


def _plain(value: Any) -> Any:
    """Convert a value to types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numbers and arrays of numpy
        return _plain(value.tolist())
    if isinstance(value, float) and value != value:
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
