"""`sktransfer export`, `show` and `card`: convert and describe saved models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from sktransfer.cli import options
from sktransfer.cli.evaluate import score_file
from sktransfer.cli.inputs import check_exists, load_model
from sktransfer.cli.messages import Notes
from sktransfer.cli.outputs import check_output, encode, print_json, print_text, replacing
from sktransfer.utils.tables import counted, format_bytes, text_table

_MAX_ENTRIES = 10
# Of a table of labeled images.
_COLUMNS = {"path_column": "path", "label_column": "label", "split_column": None}


@click.command(
    options_metavar="-o FILE [OPTIONS]",
    epilog=options.example("sktransfer export pets.skt -o pets.onnx"),
)
@options.model_argument
@options.output_option("An .onnx file, which is replaced if it exists.", required=True)
@click.option(
    "--weight-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="How weights are stored; float16 halves the size of the file.",
)
@options.notes_option
def export(model: Path, output: Path, weight_dtype: str, notes: Notes) -> None:
    """Export a model to ONNX, for programs without Python.

    The file takes an image and returns its label and probabilities. It is compared with the model
    before it is written.
    """
    import sktransfer

    check_output(output, (".onnx",), [model])
    classifier = load_model(model, notes)
    notes("Exporting, and comparing the file with the model ...")
    with replacing(output, notes) as path:
        exported = sktransfer.export_onnx(classifier, path, weight_dtype=weight_dtype)
    images = counted(exported.n_images, "image")
    notes(f"Largest difference from the model: {exported.max_difference:.1e} on {images}")


@click.command(epilog=options.example("sktransfer show pets.skt"))
@click.argument("file", metavar="FILE", type=options.PATH)
@options.json_option
def show(file: Path, as_json: bool) -> None:
    """Show what a saved model contains, without loading it."""
    from sktransfer.export.show import read_summary

    check_exists(file, "file")
    summary = read_summary(file)
    if as_json:
        print_json(summary)
    else:
        for network in summary["networks"]:
            network.pop("parameters", None)  # some thirty lines
        print_text("\n".join(_lines(summary)) + "\n")


@click.command(
    epilog=options.example(
        "sktransfer card pets.skt --data photos --license mit -o README.md",
        "sktransfer card pets.skt --evaluation scores.json",
    )
)
@options.model_argument
@options.output_option("An .md file, which is replaced if it exists.")
@click.option(
    "--evaluation",
    metavar="JSON",
    type=options.PATH,
    help="Scores to show: a file of evaluate --json.",
)
@click.option(
    "--data",
    metavar="DIR",
    type=options.PATH,
    help="Labeled images to score, as evaluate does.",
)
@click.option("--license", "license_id", metavar="NAME", help="License, such as mit.")
@options.notes_option
def card(
    model: Path,
    output: Path | None,
    evaluation: Path | None,
    data: Path | None,
    license_id: str | None,
    notes: Notes,
) -> None:
    """Write a model card: a description of a model for its users.

    It is in Markdown, with the metadata of the Hugging Face Hub, and has what the file knows:
    classes, training images, network, training, preprocessing, limitations and versions.
    """
    from sktransfer.export.card import import_card_class, make_card

    if evaluation is not None and data is not None:
        raise click.UsageError("Got --evaluation and --data, but expected one of them at most.")
    if output is not None:
        check_output(output, (".md",), [path for path in (model, evaluation) if path is not None])
    check_exists(model, "model")
    import_card_class()  # before images are scored
    scores: Any = evaluation
    if data is not None:
        scores = score_file(model, data, _COLUMNS, notes)
    text = make_card(model, evaluation=scores, license_id=license_id)
    if output is None:
        print_text(text)
        return
    with replacing(output, notes) as path:
        path.write_bytes(encode(text))


def _lines(summary: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Format nested dicts: a name and its value in a line, aligned; lists of dicts as tables."""
    simple = [key for key, value in summary.items() if not _is_nested(value)]
    width = max((len(_words(key)) for key in simple), default=0)
    for key, value in summary.items():
        if value is None or value == {}:
            continue
        if not _is_nested(value):
            text = format_bytes(value) if key == "bytes" else _text(value)
            yield f"{indent}{_words(key):<{width}}  {text}".rstrip()
            continue
        yield f"{indent}{_words(key)}"
        below = f"{indent}  "
        if isinstance(value, Mapping):
            yield from _lines(value, below)
        elif any(_is_nested(entry) for row in value for entry in row.values()):
            for row in value:
                yield from _lines(row, below)
        else:
            names = list(dict.fromkeys(name for row in value for name in row))
            cells = [[_text(row.get(name)) or "-" for name in names] for row in value]
            table = text_table(list(map(_words, names)), cells, left=[0])
            yield from (f"{below}{line}" for line in table.splitlines())


def _is_nested(value: Any) -> bool:
    """Return whether a value is a dict with entries, or a list of dicts."""
    rows = value if isinstance(value, list | tuple) else [value]
    return bool(value) and all(isinstance(row, Mapping) for row in rows)


def _words(key: object) -> str:
    return str(key).replace("_", " ").strip()


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        more = f", ... ({len(value):,})" if len(value) > _MAX_ENTRIES else ""
        return ", ".join(map(_text, value[:_MAX_ENTRIES])) + more
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
