"""`sktransfer evaluate`: score a saved model on labeled images."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sktransfer.cli import options
from sktransfer.cli.inputs import load_classifier, load_data, take
from sktransfer.cli.messages import Notes, listed
from sktransfer.cli.outputs import print_json, print_text
from sktransfer.cli.predict import predict_probabilities

if TYPE_CHECKING:
    from sklearn.utils import Bunch

SPLITS = ("train", "val", "test")
_QUANTILE = 1.959964  # of the normal distribution, for an interval of 95 %
_MAX_CONFUSIONS = 10


@click.command(
    epilog=options.example(
        "sktransfer evaluate pets.skt photos",
        "sktransfer evaluate pets.skt labels.csv --json > scores.json",
    )
)
@options.model_argument
@options.data_argument
@options.column_options
@click.option(
    "--split",
    metavar="NAME",
    type=click.Choice([*SPLITS, "all"]),
    help="Images to score: train, val, test or all.  [default: test, else val, else all]",
)
@options.skip_broken_option
@options.cache_option
@options.json_option
@options.notes_option
def evaluate(
    model: Path,
    data: Path,
    columns: Mapping[str, str | None],
    split: str | None,
    skip_broken: bool,
    cache: str,
    as_json: bool,
    notes: Notes,
) -> None:
    """Score a model on labeled images.

    Prints the accuracy with its 95% interval, precision and recall of each class, and confusions.

    DIR is a folder with one folder of images for each class, with or without train, val and test
    above them, or a CSV table with the columns path and label.
    """
    scores = score_file(
        model, data, columns, notes, split=split, skip_broken=skip_broken, cache=cache
    )
    if as_json:
        print_json(scores)
    else:
        print_text(format_scores(scores))


def score_file(
    model: Path,
    data: Path,
    columns: Mapping[str, str | None],
    notes: Notes,
    *,
    split: str | None = None,
    skip_broken: bool = False,
    cache: str = "auto",
) -> dict[str, Any]:
    """Compute the scores of a saved model on the labeled images of a folder or table.

    Returns
    -------
    dict
        Those of `score`, and the `split` they are of: "train", "val", "test", "all", or None if
        the images have no splits.
    """
    images, split = _choose_split(load_data(data, columns, notes), split, data, notes)
    classifier = load_classifier(model, cache, notes)
    return {"split": split, **score(classifier, images, skip_broken, notes)}


def _choose_split(
    data: Bunch, split: str | None, source: Path, notes: Notes
) -> tuple[Bunch, str | None]:
    splits = [] if data.split is None else [name for name in SPLITS if name in set(data.split)]
    if split is None and splits:
        split = next((name for name in ("test", "val") if name in splits), "all")
        notes(f"Scoring the split {split}; --split chooses another one.")
    if split is None or split == "all":
        return data, split if splits else None
    if split not in splits:
        present = ", ".join(splits) or "none"
        raise ValueError(f"{source} has no images for the split {split}; its splits: {present}")
    return take(data, data.split == split), split


def score(classifier: Any, data: Bunch, skip_broken: bool, notes: Notes) -> dict[str, Any]:
    """Compute the scores of a classifier on labeled images.

    Returns
    -------
    dict
        `images`, `correct`, `accuracy` (0-1) and its 95 % `interval`; `classes`, with `label`,
        `images`, `precision` and `recall` of each (NaN if undefined) and their 95 % intervals
        `precision_interval` and `recall_interval` (None if undefined); and `confusion`, with
        `labels` and the `counts` of predicted labels (columns) for each true label (rows).

    Raises
    ------
    ValueError
        If no label is a class of the classifier.
    """
    import numpy as np
    from sklearn.metrics import confusion_matrix

    names = [str(name) for name in classifier.classes_]
    unknown = sorted(set(data.labels) - set(names))
    if len(unknown) == len(set(data.labels)):
        raise ValueError(
            f"the classes of the model ({', '.join(names[:5])}) and the labels of the images "
            f"({', '.join(unknown[:5])}) have nothing in common"
        )
    if unknown:
        notes(listed("The model does not know these labels, so they count as errors", unknown))
    rows, probabilities = predict_probabilities(
        classifier, data.data, skip_broken, notes, verb="Scor"
    )
    y = data.labels[rows]
    predicted = np.array(names)[probabilities.argmax(axis=1)]
    labels = sorted({*names, *unknown})
    counts = confusion_matrix(y, predicted, labels=labels)
    hits, n_true, n_predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return {
        "images": len(y),
        "correct": int(hits.sum()),
        "accuracy": hits.sum() / len(y),
        "interval": wilson_interval(int(hits.sum()), len(y)),
        "classes": [
            {
                "label": label,
                "images": int(n_true[row]),
                "precision": _share(hits[row], n_predicted[row]),
                "recall": _share(hits[row], n_true[row]),
                "precision_interval": _interval(hits[row], n_predicted[row]),
                "recall_interval": _interval(hits[row], n_true[row]),
            }
            for row, label in enumerate(labels)
        ],
        "confusion": {"labels": labels, "counts": counts.tolist()},
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _interval(part: int, whole: int) -> tuple[float, float] | None:
    return wilson_interval(int(part), int(whole)) if whole else None


def wilson_interval(n_correct: int, n: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share, by Wilson's score method.

    Parameters
    ----------
    n_correct, n : int
        Counts, with 0 <= n_correct <= n and n > 0.

    Returns
    -------
    tuple of float
        Lower and upper limit, 0-1.

    References
    ----------
    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.

    Examples
    --------
    >>> [round(limit, 3) for limit in wilson_interval(9, 10)]
    [0.596, 0.982]
    >>> wilson_interval(70, 70)[1], wilson_interval(0, 70)[0]
    (1.0, 0.0)
    """
    share, spread = n_correct / n, _QUANTILE**2 / n
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # At both ends, rounding would leave a limit beside 0 or 1.
    return center - half if n_correct else 0.0, center + half if n_correct < n else 1.0


def format_scores(scores: Mapping[str, Any]) -> str:
    """Format the result of `score` as text."""
    from sktransfer.utils.tables import counted, text_table

    low, high = scores["interval"]
    rows = [
        [entry["label"], f"{entry['images']:,}", *map(_three_digits, _shares(entry))]
        for entry in scores["classes"]
    ]
    parts = [
        f"accuracy {scores['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}): "
        f"{scores['correct']:,} of {counted(scores['images'], 'image')}",
        text_table(["class", "images", "precision", "recall"], rows, left=[0]),
        *_format_confusions(scores["confusion"]["labels"], scores["confusion"]["counts"]),
    ]
    return "\n\n".join(parts) + "\n"


def _shares(entry: Mapping[str, Any]) -> tuple[float, float]:
    return entry["precision"], entry["recall"]


def _three_digits(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _format_confusions(labels: list[str], counts: list[list[int]]) -> list[str]:
    """Format the confusion matrix, or the most frequent confusions if it is too wide."""
    from sktransfer.utils.tables import text_table

    rows = [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    matrix = text_table(["true \\ predicted", *labels], rows, left=[0])
    if max(map(len, matrix.splitlines())) <= shutil.get_terminal_size().columns:
        return [matrix]
    confusions = sorted(
        (-count, labels[i], labels[j])
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    )
    if not confusions:
        return []
    cells = [[true, predicted, f"{-n:,}"] for n, true, predicted in confusions[:_MAX_CONFUSIONS]]
    return [text_table(["true", "predicted", "images"], cells, left=[0, 1])]
