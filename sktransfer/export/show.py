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
        `"model"` (str, such as `"Pipeline(PretrainedFeatureExtractor, LogisticRegression)"`),
        `"classes"` (list, or None), `"networks"` (one dict for each estimator of this package:
        backbone, weights, preprocessing, what was trained and why, stages), `"standalone"` (bool),
        `"bytes"` (int), `"versions"` (dict of str to str), `"sha256"` (dict of str to str).

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
        return {
            "model": _name(head["model"]),
            "classes": _listed(decode(head["classes"])),
            "networks": [_describe(node) for node in _estimators(head["model"])],
            "standalone": bool(head["standalone"]),
            "bytes": archive.path.stat().st_size,
            "versions": dict(head["versions"]),
            "sha256": dict(head["sha256"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        problem = f"its description is not that of a model ({type(error).__name__}: {error})"
        raise ModelFileError(archive.path, problem) from error


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
        "weights": network["weights"],
        "digest": network["digest"],
        "adapted_batch_norm": "batch_norm" in network,
        "preprocessing": decode(node["preprocessing"]),
    }
    if "decision" not in node:
        return {**described, "layers": _listed(decode(node["layers"])), "pooling": node["pooling"]}
    decision = decode(node["decision"])
    kept = ("stage", "trainable", "epochs", "best_epoch", "valid_loss", "valid_acc", "seconds")
    return {
        **described,
        "decided": decision["parameters"],
        "strategy": decision["strategy"],
        "images_per_class": decision["images_per_class"],
        "averaging": attributes["averaging_"],
        "temperature": attributes["temperature_"],
        "stages": [
            {key: stage[key] for key in kept if key in stage}
            for stage in decode(attributes["stages_"])
        ],
    }


def _listed(values: Any) -> list[Any] | None:
    return None if values is None else list(getattr(values, "tolist", lambda: values)())
