"""Options that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sktransfer.cli.messages import Notes
from sktransfer.utils.config import CACHE

Function = Callable[..., Any]
PATH = click.Path(path_type=Path)


class _ImageSize(click.ParamType):
    """The `image_size` of estimators: "auto", a number, or height and width as in 192x256."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | tuple[int, int] | str:
        if not isinstance(value, str) or value == "auto":
            return value
        if match := re.fullmatch(r"(\d+)(?:x(\d+))?", value):
            height, width = match.groups()
            return int(height) if width is None else (int(height), int(width))
        return self.fail(
            f"Got {value!r}, but expected auto, a side such as 224, or 192x256", param, ctx
        )


data_argument = click.argument("data", metavar="DIR", type=PATH)
model_argument = click.argument("model", metavar="MODEL", type=PATH)
images_argument = click.argument("images", metavar="PATHS...", type=PATH, nargs=-1, required=True)

backbone_option = click.option(
    "--backbone",
    metavar="NAME",
    default="efficientnet_lite0",
    show_default=True,
    help="Pretrained network.",
)
image_size_option = click.option(
    "--image-size",
    metavar="SIZE",
    type=_ImageSize(),
    help="Input of the network in pixels: a side, HEIGHTxWIDTH, or auto.",
)
seed_option = click.option(
    "--seed", metavar="N", type=int, default=0, show_default=True, help="Random seed."
)
groups_option = click.option(
    "--groups",
    metavar="CSV",
    type=PATH,
    help="Table with the columns path and group. No split divides a group, such as the images of "
    "one patient.",
)
cache_option = click.option(
    "--cache",
    metavar="FOLDER",
    envvar=CACHE.name,
    default="auto",
    help=f"Folder that keeps embeddings for later commands; also ${CACHE.name}.",
)
skip_broken_option = click.option(
    "--skip-broken",
    is_flag=True,
    help="Leave out images that cannot be read, and name them, instead of failing.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")


def column_options(function: Function) -> Function:
    """Add the names of the columns of a table of images; they arrive as the dict `columns`."""

    @click.option(
        "--path-column",
        metavar="NAME",
        default="path",
        help="Column of paths in a table.  [default: path]",
    )
    @click.option(
        "--label-column",
        metavar="NAME",
        default="label",
        help="Column of labels.  [default: label]",
    )
    @click.option(
        "--split-column",
        metavar="NAME",
        help="Column of train, val, test.  [default: split]",
    )
    @functools.wraps(function)
    def run(
        *, path_column: str, label_column: str, split_column: str | None, **options: Any
    ) -> Any:
        columns = {
            "path_column": path_column,
            "label_column": label_column,
            "split_column": split_column,
        }
        return function(columns=columns, **options)

    return run


def notes_option(function: Function) -> Function:
    """Add `--quiet`; it arrives as the object `notes`."""

    @click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notes.")
    @functools.wraps(function)
    def run(*, quiet: bool, **options: Any) -> Any:
        return function(notes=Notes(quiet), **options)

    return run


def output_option(help_text: str, *, required: bool = False) -> Callable[[Function], Function]:
    """Build the option of the file that a command writes."""
    return click.option(
        "-o", "--output", metavar="FILE", type=PATH, required=required, help=help_text
    )


def example(*lines: str) -> str:
    """Build the end of a help text: examples, one a line."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])
