"""`sktransfer export` and `show`: convert saved models, and say what a file holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from sktransfer.cli import options
from sktransfer.cli.inputs import check_exists, load_model
from sktransfer.cli.messages import Notes
from sktransfer.cli.outputs import check_output, print_json, print_text, replacing


@click.command(
    options_metavar="-o FILE [OPTIONS]",
    epilog=options.example("sktransfer export pets.skt -o pets.onnx"),
)
@options.model_argument
@options.output_option("An .onnx file, which is replaced if it exists.", required=True)
@options.notes_option
def export(model: Path, output: Path, notes: Notes) -> None:
    """Export a model to ONNX, for programs without Python."""
    import sktransfer

    check_output(output, (".onnx",), [model])
    classifier = load_model(model, notes)
    with replacing(output, notes) as path:
        sktransfer.export_onnx(classifier, path)


@click.command(epilog=options.example("sktransfer show pets.skt", "sktransfer show pets.onnx"))
@click.argument("file", metavar="FILE", type=options.PATH)
@options.json_option
def show(file: Path, as_json: bool) -> None:
    """Show what the file of a model contains, without loading it."""
    from sktransfer.export.show import read_summary

    check_exists(file, "file")
    summary = read_summary(file)
    if as_json:
        print_json(summary)
    else:
        print_text("\n".join(_lines(summary)) + "\n")


def _lines(summary: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Format nested dicts: a name and its value in a line, aligned."""
    width = max((len(_words(key)) for key in summary), default=0)
    for key, value in summary.items():
        name = _words(key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
            yield f"{indent}{name}"
            for entry in value:
                yield f"{indent}  {_one_line(entry)}"
        else:
            yield f"{indent}{name:<{width}}  {_one_line(value)}".rstrip()


def _words(key: object) -> str:
    return str(key).replace("_", " ").strip()


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {_one_line(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_one_line, value))
    return "" if value is None else str(value)
