"""`sktransfer backbones` and `cache`: what is on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from sktransfer.cli import options
from sktransfer.cli.messages import Notes
from sktransfer.cli.outputs import print_json, print_text
from sktransfer.utils.config import CACHE
from sktransfer.utils.tables import counted


@click.command(epilog=options.example("sktransfer backbones resnet"))
@click.argument("contains", default="")
@options.json_option
def backbones(contains: str, as_json: bool) -> None:
    """List pretrained networks, or those with a text in the name."""
    from sktransfer import list_backbones

    table = list_backbones(contains)
    if not table:
        raise ValueError(
            f"no backbone has {contains!r} in its name; list all with: sktransfer backbones"
        )
    if as_json:
        print_json([row._asdict() for row in table])
    else:
        print_text(f"{table}\n")


_cache_option = click.option(
    "--cache",
    metavar="FOLDER",
    type=options.PATH,
    envvar=CACHE.name,
    required=True,
    help=f"The folder; also ${CACHE.name}.",
)


@click.group(
    epilog=options.example(
        f"export {CACHE.name}=~/.cache/sktransfer",
        "sktransfer cache info",
        "sktransfer cache export photos.embeddings",
    )
)
def cache() -> None:
    """Show, clear or carry a folder of embeddings, kept with --cache."""


@cache.command(epilog=options.example("sktransfer cache info --cache embeddings"))
@_cache_option
@options.json_option
def info(cache: Path, as_json: bool) -> None:
    """Show the number and size of the embeddings in a folder."""
    contents = _open(cache).info()
    if as_json:
        print_json(dataclasses.asdict(contents))
    else:
        print_text(f"{contents}\n")


@cache.command(epilog=options.example("sktransfer cache clear --cache embeddings"))
@_cache_option
@options.notes_option
def clear(cache: Path, notes: Notes) -> None:
    """Remove the embeddings; later commands compute them again."""
    store = _open(cache)
    n_images = sum(table.images for table in store.info().tables)
    store.clear()
    notes(f"Removed {counted(n_images, 'embedding')} from {cache}")


@cache.command(epilog=options.example("sktransfer cache export photos.embeddings --cache kept"))
@click.argument("file", metavar="FILE", type=options.PATH)
@_cache_option
@options.notes_option
def export(file: Path, cache: Path, notes: Notes) -> None:
    """Write the embeddings to one file, which another machine absorbs.

    FILE is replaced if it exists.
    """
    n_images = _open(cache).export(file)
    notes(f"Wrote {counted(n_images, 'embedding')} to {file}")


@cache.command(epilog=options.example("sktransfer cache absorb photos.embeddings --cache kept"))
@click.argument("file", metavar="FILE", type=options.PATH)
@_cache_option
@options.notes_option
def absorb(file: Path, cache: Path, notes: Notes) -> None:
    """Add the embeddings of a file that `cache export` wrote.

    Commands on copies of the same images then compute none of them, wherever the copies are. FILE
    is checked before anything is added.
    """
    from sktransfer.store.store import EmbeddingStore

    n_images = EmbeddingStore(cache).absorb(file)
    notes(f"Added {counted(n_images, 'embedding')} to {cache}")


def _open(folder: Path) -> Any:
    from sktransfer.store.store import EmbeddingStore

    store = EmbeddingStore(folder)
    if not store.path.is_file():
        raise FileNotFoundError(f"there are no embeddings in {str(folder)!r}")
    return store
