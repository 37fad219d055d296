"""make_card: a model card in Markdown, from the facts that a saved model has about itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from sktransfer.export.saving import describe_model
from sktransfer.export.show import read_summary, summarize
from sktransfer.finetuning.decision import REASONS, STRATEGIES
from sktransfer.utils.errors import import_optional
from sktransfer.utils.tables import counted, format_bytes, format_seconds

_CLASSIFIER, _SELF_TRAINED = "FineTunedImageClassifier", "SelfTrainedImageClassifier"
_EXTRACTOR = "PretrainedFeatureExtractor"
# Parts of models for which a file needs no skops.
_WITHOUT_SKOPS = {
    *(_CLASSIFIER, _SELF_TRAINED, _EXTRACTOR),
    *("Pipeline", "FrozenEstimator", "passthrough", "None"),
}
# A class with fewer training images is named as a limitation.
_FEW_IMAGES = 10
# So is a largest class with this many times the training images of the smallest.
_IMBALANCE = 10
# Longer tables are folded, longer lists of names are cut, larger confusion matrices left out.
_MAX_ROWS, _MAX_NAMES, _MAX_MATRIX = 20, 10, 10
# Parameters that say where and how a fit runs.
_NOT_OF_THE_MODEL = {
    *("cache", "callbacks", "checkpoint_dir", "device", "engine", "n_jobs", "verbose"),
}
# An underscore within a word has no meaning.
_SPECIAL = re.compile(r"([\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_]))")
_EVALUATION_KEYS = {"split", "images", "correct", "accuracy", "interval", "classes", "confusion"}
# Of shares in a file.
_ROUNDING = 1e-6
_REMEDY = "pass what `sktransfer evaluate MODEL DIR --json` prints"


def make_card(
    model: Any,
    *,
    evaluation: str | PathLike[str] | Mapping[str, Any] | None = None,
    license_id: str | None = None,
) -> str:
    r"""Build a model card: a description of a model in Markdown, as hubs of models show it.

    It has what the model knows about itself: how to load it, training images, network, training,
    preprocessing, limitations and versions. Facts that it does not have are left out. The metadata
    at the beginning are those of the Hugging Face Hub.

    Parameters
    ----------
    model : path or estimator
        A file that `save` has written, which is not loaded; or a fitted model that can be saved.
    evaluation : path, dict or None, default=None
        Scores on labeled images, as ``sktransfer evaluate MODEL DIR --json`` prints them: a file or
        its content.
    license_id : str or None, default=None
        License of the model, such as `"mit"` or `"apache-2.0"`.

    Returns
    -------
    str
        Markdown, with a final line break.

    Raises
    ------
    ImportError
        If skops is missing; install it with ``pip install 'sktransfer[skops]'``.
    FileNotFoundError, OSError
        If a file cannot be read.
    ModelFileError
        If the file is not a saved model, or damaged.
    NotFittedError, TypeError
        If the model is not fitted, or cannot be saved.
    ValueError
        If `evaluation` is something else, or of a model with other classes; or if `license_id` is
        not a line of text.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTunedImageClassifier, make_card
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> classifier = FineTunedImageClassifier(
    ...     image_shape=(8, 8), image_size=32, unfreeze=0, augment=None
    ... )
    >>> card = make_card(classifier.fit(X[:60], y[:60]), license_id="mit")
    >>> print(card.partition("\n## How to use")[0])
    ---
    library_name: sktransfer
    pipeline_tag: image-classification
    tags:
    - image-classification
    - transfer-learning
    license: "mit"
    ---
    <BLANKLINE>
    # FineTunedImageClassifier
    <BLANKLINE>
    An image classifier of 3 classes: 0, 1, 2.
    <BLANKLINE>
    """
    card_class = import_card_class()
    is_file = isinstance(model, str | PathLike)
    summary = read_summary(model) if is_file else summarize(describe_model(model))
    scores = None if evaluation is None else _read_evaluation(evaluation, summary["classes"])
    title = Path(model).stem if is_file else type(model).__name__
    card = _Card(card_class, _escape(title), _introduction(summary))
    _add_usage(card, summary, Path(model).name if is_file else "model.skt")
    if scores is not None:
        _add_evaluation(card, scores, summary["classes"])
    _add_training_images(card, summary)
    _add_networks(card, summary["networks"])
    _add_preprocessing(card, summary["networks"])
    card.add_text("Limitations", _as_list(_limitations(summary, scores)))
    _add_versions(card, summary)
    return _front_matter(summary, scores, license_id) + card.render()


def import_card_class() -> Any:
    """Import the class `Card` of skops.

    Raises
    ------
    ImportError
        If skops is missing.
    """
    return import_optional("skops.card", extra="skops", purpose="A model card").Card


class _Card:
    """A card of skops: a title, and sections below it. Empty sections are left out."""

    def __init__(self, card_class: Any, title: str, text: str) -> None:
        self._card = card_class(None, template=None, model_diagram=False)
        # skops divides the names of sections at slashes, and shows them unless they have a title.
        self._card.add(Card=text)
        self._card.select("Card").title = title

    def add_text(self, section: str, text: str) -> None:
        """Add a section of text."""
        if text:
            self._card.add(**{f"Card/{section}": text})

    def add_table(self, section: str, table: Mapping[str, Sequence[Any]], text: str = "") -> None:
        """Add a section with a table, which is folded if it is long."""
        n_rows = len(next(iter(table.values())))
        name = f"Card/{section}"
        self._card.add_table(description=text, folded=n_rows > _MAX_ROWS, **{name: table})
        self._card.select(name).title = section.rpartition("/")[2]

    def render(self) -> str:
        return str(self._card.render())


def _front_matter(
    summary: Mapping[str, Any], scores: Mapping[str, Any] | None, license_id: str | None
) -> str:
    """Build the metadata of the Hugging Face Hub, in YAML. skops.card has none."""
    task = _task(summary)
    lines = ["library_name: sktransfer"]
    lines += [f"pipeline_tag: {task}"] if task else []
    lines += ["tags:", *([f"- {task}"] if task else []), "- transfer-learning"]
    if license_id is not None:
        if not isinstance(license_id, str) or len(license_id.strip().splitlines()) != 1:
            raise ValueError(
                f"Got the license {license_id!r}, but expected a name such as mit or apache-2.0"
            )
        lines.append(f"license: {_quote(license_id.strip())}")
    lines += [] if scores is None else ["metrics:", "- accuracy"]
    return "\n".join(["---", *lines, "---", ""])


def _quote(text: str) -> str:
    """Quote text for JSON; YAML and Python read it too."""
    return json.dumps(text, ensure_ascii=False)


def _task(summary: Mapping[str, Any]) -> str | None:
    """Return the task, in the words of the Hub; None if the file does not tell."""
    if summary["classes"] is not None:
        return "image-classification"
    return "image-feature-extraction" if summary["model"] == _EXTRACTOR else None


def _introduction(summary: Mapping[str, Any]) -> str:
    classes = summary["classes"]
    if classes is not None:
        return f"An image classifier of {counted(len(classes), 'class')}: {_names(classes)}."
    if summary["model"] == _EXTRACTOR:
        return "A feature extractor: it computes an embedding of each image."
    return ""


def _add_usage(card: _Card, summary: Mapping[str, Any], file: str) -> None:
    networks = summary["networks"]
    own_code = [network["own_code"] for network in networks if network["own_code"]]
    backbone = f", backbone={own_code[0].rpartition('.')[2]}" if own_code else ""
    code = ["import sktransfer", "", f"model = sktransfer.load({_quote(file)}{backbone})"]
    if summary["classes"] is not None:
        code.append('labels = model.predict(["image.jpg"])')
        if summary["model"].startswith((_CLASSIFIER, _SELF_TRAINED)):
            code.append(
                'probabilities = model.predict_proba(["image.jpg"])  # a column for each class'
            )
    elif summary["model"] == _EXTRACTOR:
        code.append('embeddings = model.transform(["image.jpg"])')
    text = ["```bash", f"pip install {_requirement(summary)}", "```", "", "```python", *code, "```"]
    if own_code:
        text += ["", f"`{own_code[0]}` is the code of the network, which is not in the file."]
    elif summary.get("standalone") is False:
        text += ["", "The file has only the weights that were trained. The other ones are looked "]
        text[-1] += "up on the machine that loads it, by the name of the network."
    card.add_text("How to use", "\n".join(text))


def _requirement(summary: Mapping[str, Any]) -> str:
    """Return what pip installs so that the file can be loaded."""
    extras = ["skops"] if {*re.findall(r"\w+", summary["model"])} - _WITHOUT_SKOPS else []
    is_timm = any(network["backbone"].startswith("timm:") for network in summary["networks"])
    extras += ["timm"] if is_timm else []
    return f'"sktransfer[{",".join(extras)}]"' if extras else "sktransfer"


def _read_evaluation(
    evaluation: str | PathLike[str] | Mapping[str, Any], classes: Sequence[Any] | None
) -> Mapping[str, Any]:
    """Read and check scores."""
    scores: Any = evaluation
    source = "an evaluation" if isinstance(evaluation, Mapping) else repr(str(evaluation))
    if isinstance(evaluation, str | PathLike):
        try:
            scores = json.loads(Path(evaluation).expanduser().read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Got {source}, which is not JSON; {_REMEDY}") from error
    if not isinstance(scores, Mapping) or not scores.keys() >= _EVALUATION_KEYS:
        keys = set(scores) if isinstance(scores, Mapping) else set()
        missing = ", ".join(sorted(_EVALUATION_KEYS - keys))
        raise ValueError(f"Got {source} without {missing}; {_REMEDY}")
    if not _are_scores(scores):
        raise ValueError(f"Got {source} with values that no evaluation has; {_REMEDY}")
    scored = scores["confusion"]["labels"]
    unknown = [str(name) for name in classes or () if str(name) not in scored]
    if classes is None or unknown:
        names = "no classes" if classes is None else f"the classes {_cut(list(map(str, classes)))}"
        raise ValueError(
            f"Got {source} of a model with the classes {_cut(scored)}, but this one has {names}; "
            "evaluate this model"
        )
    return scores


def _are_scores(scores: Mapping[str, Any]) -> bool:
    """Return whether scores have the right types, and agree with their confusion matrix."""
    try:
        labels, rows = scores["confusion"]["labels"], scores["classes"]
        counts = np.array(scores["confusion"]["counts"])
        n_images, n_correct = counts.sum(), np.trace(counts)
        intervals = [scores["interval"]]
        for row in rows:
            for name in ("precision", "recall"):
                if row[f"{name}_interval"] is not None:
                    intervals.append((row[f"{name}_interval"][0], row[name]))
                    intervals.append((row[name], row[f"{name}_interval"][1]))
        return bool(
            counts.dtype.kind == "i"
            and counts.min() >= 0
            and counts.shape == (len(labels), len(labels))
            and all(isinstance(label, str) for label in labels)
            and [row["label"] for row in rows] == list(labels)
            and [row["images"] for row in rows] == counts.sum(axis=1).tolist()
            and (scores["images"], scores["correct"]) == (n_images, n_correct)
            and abs(scores["accuracy"] - n_correct / n_images) <= _ROUNDING
            and all(
                -_ROUNDING <= low <= high + _ROUNDING <= 1 + 2 * _ROUNDING
                for low, high in intervals
            )
            and scores["split"] in (None, "all", "train", "val", "test")
        )
    except (KeyError, IndexError, TypeError, ValueError):
        return False


def _add_evaluation(card: _Card, scores: Mapping[str, Any], classes: Sequence[Any]) -> None:
    low, high = scores["interval"]
    of_split = "" if scores["split"] in (None, "all") else f" of the split {scores['split']}"
    text = (
        f"Accuracy **{scores['accuracy']:.3f}**, with a 95% interval of {low:.3f} to {high:.3f}: "
        f"{scores['correct']:,} of {counted(scores['images'], 'labeled image')}{of_split}. "
        "Intervals are Wilson score intervals."
    )
    names = {str(name) for name in classes}
    if unknown := [row["label"] for row in scores["classes"] if row["label"] not in names]:
        text += f" Labels that the model does not know count as errors: {_names(unknown)}."
    rows = scores["classes"]
    table = {
        "Class": [_escape(row["label"]) for row in rows],
        "Images": [f"{row['images']:,}" for row in rows],
        "Precision (95% interval)": [_share(row, "precision") for row in rows],
        "Recall (95% interval)": [_share(row, "recall") for row in rows],
    }
    card.add_table("Evaluation", table, text)
    labels, counts = scores["confusion"]["labels"], scores["confusion"]["counts"]
    shown = [_escape(label) for label in labels]
    # Columns need different names, which spaces may not tell apart.
    if len({*shown}) == len(labels) <= _MAX_MATRIX:
        matrix = {"True class": shown}
        for label, column in zip(shown, zip(*counts, strict=True), strict=True):
            matrix[f"Predicted {label}"] = [f"{count:,}" for count in column]
        card.add_table("Evaluation/Confusion matrix", matrix)


def _share(row: Mapping[str, Any], name: str) -> str:
    if row[f"{name}_interval"] is None:
        return "-"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"


def _fitted_network(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the network that was fitted to the labels of the model; an empty dict if none was.

    Of self-training, it is the first one, which was fitted without pseudo-labels. A classifier
    inside a pipeline may have had other images and other labels.
    """
    fits = summary["model"].startswith((_CLASSIFIER, f"{_SELF_TRAINED}({_CLASSIFIER}"))
    return summary["networks"][0] if fits else {}


def _add_training_images(card: _Card, summary: Mapping[str, Any]) -> None:
    classes, network = summary["classes"], _fitted_network(summary)
    if classes is None:
        return
    table = {"Class": [_escape(name) for name in classes]}
    if not network:
        card.add_table("Classes", table)
        return
    counts = network["class_counts"]
    if counts is None:
        per_class = f"{network['images_per_class']:.3g} of each class on average"
    else:
        table["Images"] = [f"{count:,}" for count in counts]
        range_of_counts = dict.fromkeys(f"{count:,}" for count in (min(counts), max(counts)))
        per_class = f"{' to '.join(range_of_counts)} of each class"
    n_images = round(network["images_per_class"] * len(classes))
    text = f"{counted(n_images, 'labeled image')}, {per_class}."
    card.add_table("Training images", table, text)


def _add_networks(card: _Card, networks: Sequence[Mapping[str, Any]]) -> None:
    shown = []
    for number, network in enumerate(networks, 1):
        which = f" {number}" if len(networks) > 1 else ""
        rows = {key: value for key, value in _network_rows(network).items() if value is not None}
        table = {"Property": list(rows), "Value": list(rows.values())}
        reason = REASONS.get(network.get("strategy") or "", "")
        card.add_table(f"Network{which}", table, reason)
        if "stages" in network:
            _add_stages(card, f"Network{which}/Training{which}", network["stages"])
        values = {**network["parameters"], **network.get("decided", {})}
        names = [name for name in values if name not in _NOT_OF_THE_MODEL]
        parameters = {
            "Parameter": [_escape(name) for name in names],
            "Value": [_escape(repr(values[name])) for name in names],
        }
        if parameters not in shown:  # those of self-training are usually equal
            card.add_table(f"Network{which}/Parameters{which}", parameters)
            shown.append(parameters)


def _network_rows(network: Mapping[str, Any]) -> dict[str, str | None]:
    weights, strategy = network["weights"], network.get("strategy")
    cosine, share = network.get("mean_interclass_cosine"), network.get("averaging")
    temperature = network.get("temperature")
    return {
        "Estimator": f"`{network['estimator']}`",
        "Backbone": _escape(network["backbone"]),
        # A path is one of the machine that saved the model.
        "Weights": "random" if weights is None else _escape(PureWindowsPath(weights).name),
        "Digest of the backbone": f"`{network['digest']}`",
        "BatchNorm": "adapted statistics" if network["adapted_batch_norm"] else None,
        "Layers": _layers(network),
        "Pooling": network.get("pooling"),
        "Strategy": f"{strategy}: {STRATEGIES[strategy]}" if strategy else None,
        "Cosine between classes": None if cosine is None else f"{cosine:.2f}",
        "Share of the tuned weights": None if share in (None, 1) else f"{share:.2f}",
        "Temperature": None if temperature in (None, 1) else f"{temperature:.3g}",
    }


def _layers(network: Mapping[str, Any]) -> str | None:
    names = network.get("layers")
    if not names:
        return None
    return ", ".join("last layer" if name is None else _escape(name) for name in names)


def _add_stages(card: _Card, section: str, stages: Sequence[Mapping[str, Any]]) -> None:
    columns: dict[str, list[str]] = {
        "Stage": [_escape(stage["stage"]) for stage in stages],
        "Trained parameters": [f"{stage['trainable']:,}" for stage in stages],
        # The head is fitted by an optimizer that has no epochs.
        "Epochs": [f"{stage['epochs']:,}" if stage["epochs"] else "-" for stage in stages],
        "Time": [format_seconds(stage["seconds"]) for stage in stages],
    }
    for title, key in (("Validation loss", "valid_loss"), ("Validation accuracy", "valid_acc")):
        values = [stage.get(key) for stage in stages]
        if any(value is not None for value in values):
            columns[title] = ["-" if value is None else f"{value:.3f}" for value in values]
    text = ""
    if "Validation loss" in columns:
        best = [f"{stage['best_epoch']:,}" if stage["epochs"] else "-" for stage in stages]
        columns["Best epoch"] = best
        text = "Validation images choose the best epoch, so their accuracy is optimistic."
    card.add_table(section, columns, text)


def _add_preprocessing(card: _Card, networks: Sequence[Mapping[str, Any]]) -> None:
    texts = list(dict.fromkeys(_as_list(_preprocessing(network)) for network in networks))
    text = "A loaded model prepares images itself:"
    card.add_text("Preprocessing", "\n\n".join([text, *texts]) if texts else "")


def _preprocessing(network: Mapping[str, Any]) -> list[str]:
    steps, pixel_range = network["preprocessing"], network["pixel_range"]
    height, width = steps["crop"]
    method = steps["interpolation"]
    if isinstance(steps["resize"], int):
        resize = f"The shorter side is resized to {steps['resize']} pixels ({method})."
        crop = f"The center crop has {height} x {width} pixels (height x width)."
    else:
        size = "{} x {}".format(*steps["resize"])
        resize = f"Images are resized to {size} pixels (height x width, {method}); their aspect "
        resize += "ratio is not kept."
        crop = "" if tuple(steps["resize"]) == (height, width) else f"Crop: {height} x {width}."
    mean, std = (", ".join(f"{value:.4g}" for value in steps[key]) for key in ("mean", "std"))
    black_and_white = (
        "" if pixel_range is None else "{:g} is black, {:g} is white".format(*pixel_range)
    )
    lines = [
        "Images become RGB with values of 0 to 255"
        + (f"; of images that are not 8-bit, {black_and_white}." if black_and_white else "."),
        resize,
        crop,
        f"Values x become (x / 255 - mean) / std, with the mean {mean} and the standard deviation "
        f"{std} of red, green and blue.",
    ]
    return list(filter(None, lines))


def _limitations(summary: Mapping[str, Any], scores: Mapping[str, Any] | None) -> list[str]:
    """List limitations that follow from the facts."""
    classes, networks = summary["classes"], summary["networks"]
    lines = []
    if classes is not None:
        lines.append(
            f"An image of something else is also given one of the {counted(len(classes), 'class')}."
        )
        lines += _limits_of_training(classes, _fitted_network(summary).get("class_counts"))
        lines += _limits_of_evaluation(classes, scores)
    if any(network["weights"] is None for network in networks):
        lines.append("The network was not pretrained.")
    if any(network.get("interrupted") for network in networks):
        lines.append("The training was interrupted before its end.")
    if summary["model"].startswith(_SELF_TRAINED) and len(networks) > 1:
        lines.append("It was also trained on its own predictions for images without labels.")
    return lines


def _limits_of_training(classes: Sequence[Any], counts: Sequence[int] | None) -> list[str]:
    if counts is None:
        return []
    lines = []
    small = [
        f"{name} ({count})"
        for name, count in zip(classes, counts, strict=True)
        if count < _FEW_IMAGES
    ]
    if small:
        has = "has" if len(small) == 1 else "have"
        lines.append(
            f"{counted(len(small), 'class')} {has} fewer than {_FEW_IMAGES} training images: "
            f"{_names(small)}."
        )
    ratio = max(counts) / max(1, min(counts))
    if ratio >= _IMBALANCE:
        lines.append(
            f"The largest class has {ratio:.0f} times as many training images as the smallest."
        )
    return lines


def _limits_of_evaluation(classes: Sequence[Any], scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
        return ["There is no evaluation, so the accuracy on new images is not known."]
    lines = []
    counts = {row["label"]: row["images"] for row in scores["classes"]}
    if missing := [name for name in map(str, classes) if not counts[name]]:
        lines.append(f"The evaluation has no images of {_names(missing)}.")
    if scores["split"] == "train":
        lines.append("The accuracy is that on training images, so it is too optimistic.")
    elif scores["split"] == "val":
        lines.append(
            "The accuracy is that on validation images. If they have chosen the best epoch, it is "
            "too optimistic."
        )
    elif scores["split"] == "all":
        lines.append(
            "The evaluation does not leave out images for training, so the accuracy is too "
            "optimistic if the model was trained on them."
        )
    return lines


def _add_versions(card: _Card, summary: Mapping[str, Any]) -> None:
    versions = summary["versions"]
    table = {"Package": list(versions), "Version": list(versions.values())}
    text = "The card was written with these versions."
    if "bytes" in summary:
        size = format_bytes(summary["bytes"])
        text = f"The file has {size}. The model was saved with these versions."
    card.add_table("Versions", table, text)


def _escape(value: Any) -> str:
    r"""Escape characters that have a meaning in Markdown or in its tables.

    Examples
    --------
    >>> print(_escape("a|b_c *"))
    a\|b_c \*
    """
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def _cut(names: Sequence[str]) -> str:
    more = f", ... ({len(names):,})" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _names(values: Sequence[Any]) -> str:
    return _cut([_escape(value) for value in values])


def _as_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
