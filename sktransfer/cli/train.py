"""`sktransfer train`: train a classifier on labeled images, and save it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from sktransfer.cli import options
from sktransfer.cli.evaluate import format_scores, score
from sktransfer.cli.inputs import load_data, load_groups, take
from sktransfer.cli.messages import Notes, broken_images, listed, show_warning
from sktransfer.cli.outputs import check_output, print_json, print_text, replacing
from sktransfer.utils.tables import counted

if TYPE_CHECKING:
    from sklearn.utils import Bunch

STRATEGIES = ("auto", "frozen", "staged", "full")


class _Sets(NamedTuple):
    train: Bunch
    val: Bunch | None
    test: Bunch | None


@click.command(
    options_metavar="-o FILE [OPTIONS]",
    epilog=options.example(
        "sktransfer train photos -o pets.skt",
        "sktransfer train labels.csv --split-column part --strategy full -o pets.skt",
    ),
)
@options.data_argument
@options.output_option("The model, which is replaced if it exists.", required=True)
@click.option(
    "--strategy",
    metavar="NAME",
    type=click.Choice(STRATEGIES),
    default="auto",
    help="frozen trains a linear classifier, staged also the last blocks, full all blocks, and "
    "auto decides it from the images.  [default: auto]",
)
@options.backbone_option
@options.image_size_option
@options.groups_option
@options.column_options
@options.skip_broken_option
@options.cache_option
@options.seed_option
@options.json_option
@options.notes_option
def train(
    data: Path,
    output: Path,
    strategy: str,
    backbone: str,
    image_size: Any,
    groups: Path | None,
    columns: Mapping[str, str | None],
    skip_broken: bool,
    cache: str,
    seed: int,
    as_json: bool,
    notes: Notes,
) -> None:
    """Train a classifier on labeled images, and save it.

    DIR is a folder with one folder of images for each class, or a CSV table with the columns path
    and label. Folders for train, val and test may lie above those of the classes: images for val
    choose the best model, and images for test are scored at the end.
    """
    check_output(output, (), [path for path in (data, groups) if path is not None])
    sets = _split(load_data(data, columns, notes), data, groups, seed, notes)
    _tell_sets(sets, notes)
    classifier = _make_classifier(strategy, backbone, image_size, skip_broken)
    classifier.set_params(cache=cache, random_state=seed, verbose=notes.verbose)
    start = time.perf_counter()
    _fit(classifier, sets)
    seconds = time.perf_counter() - start
    _tell_fit(classifier, seconds, notes)
    _save(classifier, output, notes)
    scores = None if sets.test is None else score(classifier, sets.test, skip_broken, notes)
    if as_json:
        print_json(_as_dict(classifier, sets, output, seconds, scores))
    elif scores is not None:
        print_text("Test images: " + format_scores(scores))


def _split(data: Bunch, source: Path, groups: Path | None, seed: int, notes: Notes) -> _Sets:
    """Divide the images by their folders, and hold out groups if there are no images for val."""
    import numpy as np

    group_of = load_groups(groups, data.data, source)
    if group_of is not None and data.split is not None:
        _warn_of_divided_groups(group_of, data.split)
    if data.split is None:
        sets = _Sets(data, None, None)
    else:
        parts = {name: take(data, data.split == name) for name in ("train", "val", "test")}
        filled = {name: part for name, part in parts.items() if len(part.data)}
        others = ~np.isin(data.split, list(parts))
        if others.any():
            names = ", ".join(sorted(set(data.split[others])))
            notes(f"Left out {counted(int(others.sum()), 'image')} of other splits: {names}")
        if "train" not in filled:
            raise ValueError(f"{source} has images for {', '.join(filled)}, but none for train")
        sets = _Sets(filled["train"], filled.get("val"), filled.get("test"))
    if group_of is None or sets.val is not None:
        return sets
    by_path = dict(zip(data.data, group_of, strict=True))
    return _hold_out_groups(sets, [by_path[path] for path in sets.train.data], seed)


def _warn_of_divided_groups(groups: list[str], split: Any) -> None:
    splits_of: dict[str, set[str]] = {}
    for group, name in zip(groups, split, strict=True):
        splits_of.setdefault(group, set()).add(name)
    divided = [group for group, names in splits_of.items() if len(names) > 1]
    if divided:
        more = ", ..." if len(divided) > 3 else ""
        warnings.warn(
            f"{counted(len(divided), 'group')} with images in several of train, val and test "
            f"({', '.join(divided[:3])}{more}), so scores are too optimistic",
            stacklevel=2,
        )


def _hold_out_groups(sets: _Sets, groups: list[str], seed: int) -> _Sets:
    """Use a fifth of the training images, in whole groups, as validation images."""
    import numpy as np

    from sktransfer.diagnostics.ranking import make_folds

    classes, codes = np.unique(sets.train.labels, return_inverse=True)
    train, val = make_folds(codes, np.array(groups), seed, classes)[0]
    return _Sets(take(sets.train, train), take(sets.train, val), sets.test)


def _make_classifier(strategy: str, backbone: str, image_size: Any, skip_broken: bool) -> Any:
    from sktransfer import FineTunedImageClassifier
    from sktransfer.backbones.loading import load_backbone
    from sktransfer.finetuning.decision import stages_of

    classifier = FineTunedImageClassifier(backbone)
    if image_size is not None:
        classifier.set_params(image_size=image_size)
    if strategy != "auto":
        blocks = load_backbone(backbone, "default").block_list.blocks
        classifier.set_params(unfreeze=stages_of(strategy, blocks))
    if skip_broken:
        classifier.set_params(on_error="skip")
    return classifier


def _fit(classifier: Any, sets: _Sets) -> None:
    from sktransfer.utils.errors import ImageError

    validation = {}
    if sets.val is not None:
        validation = {"X_val": sets.val.data, "y_val": sets.val.labels}
    with warnings.catch_warnings():
        # These are reported below, in the words of the command line.
        warnings.filterwarnings("ignore", "The fit was interrupted", UserWarning)
        warnings.filterwarnings("ignore", "Left out .* cannot be read", UserWarning)
        classifier.fit(sets.train.data, sets.train.labels, **validation)
    if classifier.interrupted_:  # the fit ends early instead of raising it
        raise KeyboardInterrupt
    if classifier.errors_:
        text, problems = broken_images(ImageError.of(classifier.errors_))
        show_warning(listed(f"{text}, left out", problems))


def _save(classifier: Any, output: Path, notes: Notes) -> None:
    import sktransfer

    with replacing(output, notes) as path:
        sktransfer.save(classifier, path)


def _tell_sets(sets: _Sets, notes: Notes) -> None:
    names = sorted(set(sets.train.labels))
    others = {"validation": sets.val, "test": sets.test}
    counts = [counted(len(sets.train.data), "training image")]
    counts += [
        counted(len(part.data), f"{name} image")
        for name, part in others.items()
        if part is not None
    ]
    more = ", ..." if len(names) > 5 else ""
    notes(f"{', '.join(counts)}; {counted(len(names), 'class')}: {', '.join(names[:5])}{more}")
    notes(f"Training on {counted(len(sets.train.data), 'image')} ...")


def _tell_fit(classifier: Any, seconds: float, notes: Notes) -> None:
    stages = ", ".join(
        f"{stage['stage']} ({counted(stage['epochs'], 'epoch')})" if stage["epochs"] else "head"
        for stage in classifier.stages_
    )
    notes(f"Trained in {seconds:,.1f} s: {stages}")


def _as_dict(
    classifier: Any, sets: _Sets, output: Path, seconds: float, scores: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "model": output,
        "classes": classifier.classes_,
        "training_images": len(sets.train.data),
        "validation_images": 0 if sets.val is None else len(sets.val.data),
        "seconds": seconds,
        "decision": dict(classifier.decision_.parameters),
        "stages": classifier.stages_,
        "test": scores,
    }
