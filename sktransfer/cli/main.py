"""The command line: `sktransfer demo` and `sktransfer backbones`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sktransfer._version import __version__
from sktransfer.backbones.catalogue import BackboneTable, list_backbones
from sktransfer.cli.demo import run_demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str or None
        Command-line arguments without the program's name; `None` is `sys.argv[1:]`.

    Returns
    -------
    int
        The exit status: 0 for success, 1 for invalid input.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "backbones":
            print(_table(options.contains))
        else:
            run_demo(options.images, options.output, backbone=options.backbone, n_jobs=options.jobs)
    except (OSError, ValueError, ImportError) as error:
        print(f"sktransfer: {error}", file=sys.stderr)
        return 1
    return 0


def _table(contains: str) -> BackboneTable:
    table = list_backbones(contains)
    if not table:
        raise ValueError(
            f"no backbone has {contains!r} in its name; list all with: sktransfer backbones"
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sktransfer",
        description="Transfer learning for images that behaves like scikit-learn.",
    )
    parser.add_argument("--version", action="version", version=f"sktransfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="embed images, run a grid search on them, and show the accuracy"
    )
    demo.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="a folder with one folder of images per class (default: scikit-learn's digits)",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder in which the figure is saved (default: %(default)s)",
    )
    demo.add_argument("--backbone", default="efficientnet_lite0", help="default: %(default)s")
    demo.add_argument("--jobs", type=int, metavar="N", help="worker processes of the search")

    backbones = commands.add_parser("backbones", help="list the named backbones")
    backbones.add_argument("contains", nargs="?", default="", help="only names that contain this")
    return parser
