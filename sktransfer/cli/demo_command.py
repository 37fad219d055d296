"""`sktransfer demo`."""

from __future__ import annotations

from pathlib import Path

import click

from sktransfer.cli import options


@click.command(epilog=options.example("sktransfer demo --images photos"))
@click.option(
    "--images",
    metavar="DIR",
    type=options.PATH,
    help="A folder with one folder of images for each class.  [default: scikit-learn's digits]",
)
@click.option(
    "--output",
    metavar="DIR",
    type=options.PATH,
    default="demo-output",
    help="Folder of the figure.  [default: demo-output]",
)
@options.backbone_option
@click.option("--jobs", metavar="N", type=int, help="Worker processes of the search.")
def demo(images: Path | None, output: Path, backbone: str, jobs: int | None) -> None:
    """Embed images, run a grid search on them, and show the accuracy."""
    from sktransfer.cli.demo import run_demo

    run_demo(images, output, backbone=backbone, n_jobs=jobs)
