"""`sktransfer recommend`, `rank` and `leaks`: reports on labeled images, before any training."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sktransfer.cli import options
from sktransfer.cli.inputs import (
    check_exists,
    load_data,
    load_groups,
    load_images,
    make_extractor,
    training_images,
)
from sktransfer.cli.messages import Notes
from sktransfer.cli.outputs import print_json, print_text, records
from sktransfer.utils.tables import counted, text_table

if TYPE_CHECKING:
    from sktransfer.diagnostics.leaks import LeakReport
    from sktransfer.diagnostics.ranking import BackboneRanking
    from sktransfer.diagnostics.strategy import StrategyReport

_MAX_PAIRS = 20
# Options that `recommend` shares with `train`.
_OF_TRAIN = (
    *("backbone", "image_size", "groups", "path_column", "label_column", "split_column"),
    *("cache", "seed"),
)


@click.command(epilog=options.example("sktransfer recommend photos"))
@options.data_argument
@options.backbone_option
@options.image_size_option
@options.groups_option
@options.column_options
@options.cache_option
@options.seed_option
@options.json_option
@options.notes_option
def recommend(
    data: Path,
    backbone: str,
    image_size: Any,
    groups: Path | None,
    columns: Mapping[str, str | None],
    cache: str,
    seed: int,
    as_json: bool,
    notes: Notes,
) -> None:
    """Recommend what to train and why, and check the images.

    DIR is a folder or a table as for train. No network is trained.
    """
    from sktransfer import recommend_strategy

    images = training_images(load_data(data, columns, notes), notes)
    with notes.timed("Measuring", "Measured", len(images.data)):
        report = recommend_strategy(
            images.data,
            images.labels,
            extractor=make_extractor(backbone, image_size or "auto", cache, notes),
            groups=load_groups(groups, images.data, data),
            random_state=seed,
        )
    command = f"sktransfer train {' '.join(_options_given(['data', *_OF_TRAIN]))} -o model.skt"
    if as_json:
        print_json(_strategy_as_dict(report, command))
    else:
        report.estimator_.set_params(verbose=0)  # only this command draws bars
        print_text(f"{report}\n\nTo train it: {command}\n")


def _options_given(names: Sequence[str]) -> list[str]:
    """Return parameters of the current command as they were given, for another command."""
    context = click.get_current_context()
    words = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            option = [parameter.opts[-1]] if isinstance(parameter, click.Option) else []
            words += [*option, shlex.quote(text)]
    return words


def _strategy_as_dict(report: StrategyReport, command: str) -> dict[str, Any]:
    return {
        "strategy": report.strategy,
        "case": report.case,
        "reasons": report.reasons,
        "warnings": report.warnings,
        "counts": report.counts,
        "image_size": report.image_size,
        "measured": dataclasses.asdict(report.probe_results),
        "estimated_seconds": report.cost.seconds,
        "command": command,
    }


@click.command(
    epilog=options.example(
        "sktransfer rank photos",
        "sktransfer rank photos --backbones efficientnet_lite0,resnet18 --json",
    )
)
@options.data_argument
@click.option(
    "--backbones",
    metavar="NAME,NAME",
    help="Networks to compare.  [default: all whose weights are on this machine]",
)
@options.image_size_option
@options.groups_option
@options.column_options
@options.cache_option
@options.seed_option
@options.json_option
@options.notes_option
def rank(
    data: Path,
    backbones: str | None,
    image_size: Any,
    groups: Path | None,
    columns: Mapping[str, str | None],
    cache: str,
    seed: int,
    as_json: bool,
    notes: Notes,
) -> None:
    """Compare pretrained networks on labeled images.

    DIR is a folder or a table as for train. The networks are compared by the accuracy of a linear
    classifier on their embeddings; no network is trained.
    """
    from sktransfer import rank_backbones

    images = training_images(load_data(data, columns, notes), notes)
    names = None if backbones is None else [name for name in backbones.split(",") if name]
    with notes.timed("Embedding", "Embedded", len(images.data), " with each network"):
        ranking = rank_backbones(
            images.data,
            images.labels,
            names,
            extractor=make_extractor("efficientnet_lite0", image_size, cache, notes),
            groups=load_groups(groups, images.data, data),
            random_state=seed,
        )
    if as_json:
        print_json(_ranking_rows(ranking))
    else:
        print_text(f"{ranking}\n")


def _ranking_rows(ranking: BackboneRanking) -> list[dict[str, Any]]:
    return [
        {**row._asdict(), "image_size": extractor.preprocessing_.crop}
        for row, extractor in zip(ranking.rows, ranking.extractors, strict=True)
    ]


@click.command(
    epilog=options.example("sktransfer leaks photos", "sktransfer leaks train --other test --json")
)
@options.data_argument
@click.option("--other", metavar="DIR", type=options.PATH, help="Images to compare with.")
@options.backbone_option
@options.column_options
@options.cache_option
@options.json_option
@options.notes_option
def leaks(
    data: Path,
    other: Path | None,
    backbone: str,
    columns: Mapping[str, str | None],
    cache: str,
    as_json: bool,
    notes: Notes,
) -> None:
    """Report copies of images, also across train, val and test.

    DIR is a folder or a table as for train, or a folder of images without classes. With --other,
    images of DIR are compared with those of the other folder only.
    """
    from sktransfer import find_leaks

    first = _load(data, columns, notes)
    second = None if other is None else _load(other, columns, notes)
    n_images = len(first["X"]) + (0 if second is None else len(second["X"]))
    sets: dict[str, Any] = {"y": first["y"], "groups": first["split"]}
    if second is not None:
        sets = {"y": first["y"], "X_test": second["X"]}
        if first["y"] is not None and second["y"] is not None:
            sets["y_test"] = second["y"]
    with notes.timed("Comparing", "Compared", n_images):
        report = find_leaks(
            first["X"], **sets, extractor=make_extractor(backbone, None, cache, notes)
        )
    pairs = _pairs(report, first["X"], first["X"] if second is None else second["X"])
    if as_json:
        print_json({"images": report.n_images, "pairs": pairs})
    else:
        print_text(_format_pairs(report, pairs))


def _load(source: Path, columns: Mapping[str, str | None], notes: Notes) -> dict[str, Any]:
    """Load images and, if they have any, their labels and splits."""
    from sktransfer.data.folders import list_images

    check_exists(source, "folder or table")
    if source.is_dir():
        images, _ = list_images(source)
        if any(Path(path).parent == source for path in images):
            notes(f"{source} holds images itself, so they are compared without labels.")
            return {"X": load_images([source], notes), "y": None, "split": None}
    data = load_data(source, columns, notes)
    return {"X": data.data, "y": data.labels, "split": data.split}


def _pairs(report: LeakReport, first: Any, second: Any) -> list[dict[str, Any]]:
    """List the pairs of a report, the most similar one first."""
    i, j = report.pairs.T
    return records(
        {
            "first": [first[row] for row in i],
            "second": [second[row] for row in j],
            "kind": report.kinds.tolist(),
            "cosine": report.cosines.tolist(),
            "across": report.across.tolist(),
            "conflict": report.conflicts.tolist(),
        }
    )


def _format_pairs(report: LeakReport, pairs: list[dict[str, Any]]) -> str:
    lines = [report.summary[0]]
    if n_across := int(report.across.sum()):
        lines.append(
            f"{counted(n_across, 'pair')} on both sides of a split, so scores are too optimistic: "
            "remove one image of each."
        )
    if n_conflicts := int(report.conflicts.sum()):
        lines.append(f"{counted(n_conflicts, 'pair')} with different labels.")
    if pairs:
        lines += ["", _pair_table(pairs[:_MAX_PAIRS])]
    if len(pairs) > _MAX_PAIRS:
        lines.append(f"and {len(pairs) - _MAX_PAIRS:,} more; --json lists all of them")
    return "\n".join(lines) + "\n"


def _pair_table(pairs: list[dict[str, Any]]) -> str:
    """Format pairs as a table, without columns that have no entries."""
    columns = {
        "kind": [pair["kind"] for pair in pairs],
        "cosine": [f"{pair['cosine']:.3f}" for pair in pairs],
        "split": ["across" if pair["across"] else "" for pair in pairs],
        "labels": ["differ" if pair["conflict"] else "" for pair in pairs],
        "image": [pair["first"] for pair in pairs],
        "other image": [pair["second"] for pair in pairs],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    left = [i for i, title in enumerate(columns) if title != "cosine"]
    return text_table(list(columns), list(zip(*columns.values(), strict=True)), left)
