"""What is inside the file of a saved model, without loading it, and without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from sktransfer.export.archive import read_archive
from sktransfer.export.encoding import decode
from sktransfer.utils.errors import ModelFileError


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Summarize a saved model.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict
        The facts of `summarize`, `"standalone"` (bool), `"bytes"` (int) and `"sha256"` (dict of str
        to str).

    Raises
    ------
    FileNotFoundError, OSError
        If it cannot be read.
    ModelFileError
        If it is not a saved model, or damaged.
    """
    archive = read_archive(path, description_only=True)
    head = archive.description
    try:
        summary = summarize(head)
        versions = summary.pop("versions")
        return {
            **summary,
            "standalone": bool(head["standalone"]),
            "bytes": archive.path.stat().st_size,
            "versions": versions,
            "sha256": dict(head["sha256"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        problem = f"its description is not that of a model ({type(error).__name__}: {error})"
        raise ModelFileError(archive.path, problem) from error


def summarize(description: dict[str, Any]) -> dict[str, Any]:
    """Summarize the description of a model.

    Parameters
    ----------
    description : dict
        As a file has it.

    Returns
    -------
    dict
        `"model"` (str, such as `"Pipeline(PretrainedFeatureExtractor, LogisticRegression)"`),
        `"classes"` (list, or None), `"networks"` (one dict for each estimator of this package:
        backbone, weights, preprocessing, parameters, training images, what was trained and why,
        stages), `"versions"` (dict of str to str).

    Raises
    ------
    KeyError, TypeError, ValueError, AttributeError, RecursionError
        If it does not describe a model.
    """
    return {
        "model": _name(description["model"]),
        "classes": _listed(decode(description["classes"])),
        "networks": [_describe(node) for node in _estimators(description["model"])],
        "versions": dict(description["versions"]),
    }


def _name(node: dict[str, Any]) -> str:
    """Return the type of a model, with the types of its parts."""
    parts = [node["estimator"]] if "estimator" in node else node.get("estimators", [])
    parts = [step for _, step in node["steps"]] if "steps" in node else parts
    name = str(node.get("class", node.get("value", node["type"])))
    return f"{name}({', '.join(map(_name, parts))})" if parts else name


def _estimators(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the descriptions of the estimators that have a network."""
    if "network" in node:
        yield node
    below = [node["estimator"]] if "estimator" in node else node.get("estimators", [])
    for child in [*below, *(step for _, step in node.get("steps", []))]:
        yield from _estimators(child)


def _describe(node: dict[str, Any]) -> dict[str, Any]:
    network, attributes = node["network"], node["attributes"]
    backbone = network["backbone"]
    if isinstance(backbone, dict):
        backbone = backbone.get("own") or f"tuned {_name(backbone['estimator'])}"
    described = {
        "estimator": node["type"],
        "backbone": backbone,
        "own_code": _own_code(network["backbone"]),
        "weights": network["weights"],
        "digest": network["digest"],
        "adapted_batch_norm": "batch_norm" in network,
        "preprocessing": decode(node["preprocessing"]),
        "pixel_range": decode(attributes["pixel_range_"]),
        "parameters": {name: decode(value) for name, value in node["parameters"].items()},
    }
    if "decision" not in node:
        return {**described, "layers": _listed(decode(node["layers"])), "pooling": node["pooling"]}
    decision = decode(node["decision"])
    columns = ("stage", "trainable", "epochs", "best_epoch", "valid_loss", "valid_acc", "seconds")
    return {
        **described,
        "decided": decision["parameters"],
        "strategy": decision["strategy"],
        "images_per_class": decision["images_per_class"],
        "class_counts": decision.get("class_counts"),
        "mean_interclass_cosine": decision["mean_interclass_cosine"],
        "interrupted": attributes["interrupted_"],
        "averaging": attributes["averaging_"],
        "temperature": attributes["temperature_"],
        "stages": [
            {key: stage[key] for key in columns if key in stage}
            for stage in decode(attributes["stages_"])
        ],
    }


def _own_code(backbone: Any) -> str | None:
    """Return the name of a user's own network, which may be that of a tuned backbone."""
    if not isinstance(backbone, dict):
        return None
    if "own" in backbone:
        return str(backbone["own"])
    nodes = _estimators(backbone["estimator"])
    return next(filter(None, (_own_code(node["network"]["backbone"]) for node in nodes)), None)


def _listed(values: Any) -> list[Any] | None:
    return None if values is None else list(getattr(values, "tolist", lambda: values)())
