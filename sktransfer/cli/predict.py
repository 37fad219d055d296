"""`sktransfer predict`: label images with a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sktransfer.cli import options
from sktransfer.cli.inputs import load_classifier, load_images, set_options
from sktransfer.cli.messages import Notes, broken_images, listed
from sktransfer.cli.outputs import (
    Table,
    as_csv,
    check_output,
    import_pyarrow,
    print_json,
    print_text,
    records,
    write_table,
)
from sktransfer.utils.tables import counted

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".csv", ".parquet", ".json")


@click.command(
    epilog=options.example(
        "sktransfer predict pets.skt new -o new.csv",
        "sktransfer predict pets.skt cat1.jpg --json",
    )
)
@options.model_argument
@options.images_argument
@options.output_option("A .csv, .parquet or .json file, which is replaced if it exists.")
@click.option("--probabilities", is_flag=True, help="Add the probability of each class.")
@options.skip_broken_option
@options.cache_option
@options.json_option
@options.notes_option
def predict(
    model: Path,
    images: tuple[Path, ...],
    output: Path | None,
    probabilities: bool,
    skip_broken: bool,
    cache: str,
    as_json: bool,
    notes: Notes,
) -> None:
    """Label images with a model that train has saved.

    PATHS are images and folders; folders are searched with all of their subfolders. The result is a
    table with the columns path, label and probability, printed as CSV unless -o is given.
    """
    if output is not None:
        check_output(output, SUFFIXES, [model, *images])
        if output.suffix.lower() == ".parquet":
            import_pyarrow()
    paths = load_images(images, notes)
    classifier = load_classifier(model, cache, notes)
    rows, values = predict_probabilities(classifier, paths, skip_broken, notes)
    table = _table([paths[row] for row in rows], values, classifier.classes_, probabilities)
    if output is not None:
        write_table(table, output, notes)
    elif as_json:
        print_json(records(table))
    else:
        print_text(as_csv(table))


def predict_probabilities(
    classifier: Any, paths: Sequence[str], skip_broken: bool, notes: Notes, verb: str = "Predict"
) -> tuple[list[int], np.ndarray]:
    """Compute the probabilities of all classes, of the images that can be read.

    Parameters
    ----------
    classifier : fitted classifier
    paths : sequence of N str
    skip_broken : bool
        Leave out images that cannot be read, and name them.
    notes : Notes
    verb : str
        Stem of the verb in the notes.

    Returns
    -------
    rows : list of int
        Rows of the images that were read: all of them unless `skip_broken`.
    probabilities : ndarray of shape (len(rows), K)

    Raises
    ------
    ImageError
        If images cannot be read and `skip_broken` is false, or if none can be read.
    """
    import numpy as np

    from sktransfer.utils.errors import ImageError

    # A model that was trained with --skip-broken would return rows of NaN.
    set_options(classifier, on_error="raise")
    paths, rows = list(paths), list(range(len(paths)))
    with notes.timed(f"{verb}ing", f"{verb}ed", len(paths)) as job:
        try:
            probabilities = classifier.predict_proba(paths)
        except ImageError as error:
            broken = {each.row for each in error.errors}
            rows = [row for row in rows if row not in broken]
            if not skip_broken or None in broken:
                raise
            text, problems = broken_images(error)
            if not rows:
                raise ValueError(listed("no image can be read", problems)) from error
            notes.list(f"{text}, left out", problems)
            job.n_images = len(rows)
            probabilities = classifier.predict_proba([paths[row] for row in rows])
    if np.isnan(probabilities).any():
        unread = [paths[row] for row in np.flatnonzero(np.isnan(probabilities).any(axis=1))]
        raise ValueError(listed(f"no probabilities of {counted(len(unread), 'image')}", unread))
    return rows, probabilities


def _table(
    paths: Sequence[str], probabilities: np.ndarray, classes: np.ndarray, all_classes: bool
) -> Table:
    rounded = probabilities.astype("float64").round(6)
    table: dict[str, list[Any]] = {
        "path": list(paths),
        "label": classes[probabilities.argmax(axis=1)].tolist(),
        "probability": rounded.max(axis=1).tolist(),
    }
    if all_classes:
        columns = zip(classes.tolist(), rounded.T.tolist(), strict=True)
        table |= {f"probability_{label}": values for label, values in columns}
    return table
