"""The ONNX graph of a fitted model.

The preprocessing is written in ONNX's own operators; networks are exported by torch, and the steps
of a pipeline by skl2onnx. All parts are then joined to one graph.

Shapes: N images of h x w pixels, H x W after the crop, D features, K classes.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

from sktransfer._version import __version__
from sktransfer.embedding.image_module import ImageModule
from sktransfer.export.module import MeanModule, split_pipeline, to_module
from sktransfer.export.onnx_writing import (
    OPSETS,
    import_onnx,
    joined,
    mean_graph,
    renamed,
    with_half_weights,
    with_label,
)
from sktransfer.export.resize import crop_graph
from sktransfer.utils.errors import ExportError


def build_graph(model: Any, weight_dtype: str = "float32") -> Any:
    """Build the ONNX graph of a fitted model.

    Parameters
    ----------
    model : fitted estimator
        One that `export_onnx` accepts.
    weight_dtype : {"float32", "float16"}
        How the weights of networks are stored.

    Returns
    -------
    onnx.ModelProto
        With the input "images", uint8 (N, h, w, 3), and the outputs "probabilities", float32
        (N, K), and "label" (N,); or "embeddings", float32 (N, D).

    Raises
    ------
    TypeError
        If the model cannot be exported.
    ExportError
        If a part of it cannot be exported.
    """
    builder = _Builder(weight_dtype)
    graph = builder.build(model)
    graph.producer_name, graph.producer_version = "sktransfer", __version__
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    classes = getattr(model, "classes_", None)
    properties = {
        "classes": None if classes is None else np.asarray(classes).tolist(),
        "preprocessing": builder.preprocessings,
        "sktransfer_version": __version__,
    }
    as_json = {name: json.dumps(value) for name, value in properties.items()}
    import_onnx().helper.set_model_props(graph, as_json)
    return graph


class _Builder:
    """Builds graphs, and collects the preprocessing of each network."""

    def __init__(self, weight_dtype: str) -> None:
        self.weight_dtype = weight_dtype
        self.preprocessings: list[dict[str, Any]] = []

    def build(self, model: Any) -> Any:
        if isinstance(model, FrozenEstimator):
            return self.build(model.estimator)
        if isinstance(model, Pipeline):
            embed, tail = split_pipeline(model)
            if tail:
                features = self.image_graph(embed, "features")
                last = _tail_graph(tail, features.graph.output[0])
                return joined({"image": features, "tail": last})
        module = to_module(model)
        classes: Any = module.classes
        if isinstance(module, MeanModule):
            return with_label(mean_graph([*map(self.build, model.estimators_)]), classes)
        assert isinstance(module, ImageModule)
        if classes is None:
            return self.image_graph(module, "embeddings")
        return with_label(self.image_graph(module, "probabilities"), classes)

    def image_graph(self, module: ImageModule, output: str) -> Any:
        """Build the graph of images, uint8 (N, h, w, 3), to the output of a module."""
        self.preprocessings.append(asdict(module.preprocessing))
        network = _network_graph(module, output)
        if self.weight_dtype == "float16":
            network = with_half_weights(network)
        return joined({"crop": crop_graph(module.preprocessing), "network": network})


def _network_graph(module: ImageModule, output: str) -> Any:
    """Export the network of a module: pixels, uint8 (N, 3, H, W), to an output."""
    import_onnx("onnxscript")
    # Two images, because torch takes a dimension of one as fixed.
    example = torch.zeros(2, 3, *module.preprocessing.crop, dtype=torch.uint8)
    any_number = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The graph is compared with the model, which is more than any warning says.
            warnings.simplefilter("ignore")
            program = torch.export.export(module.network, (example,), dynamic_shapes=any_number)
            exported = torch.onnx.export(
                program,
                input_names=["pixels"],
                output_names=[output],
                opset_version=OPSETS[""],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"Got a network that torch cannot export ({_cause(error)}), but expected one of torch "
            "operations without branches that depend on values, for any number of images"
        ) from error
    assert exported is not None
    return exported.model_proto


def _tail_graph(tail: list[tuple[str, Any]], features: Any) -> Any:
    """Export the steps of a pipeline after the first one, from its features on."""
    skl2onnx = import_onnx("skl2onnx")
    steps = Pipeline(tail)
    is_classifier = hasattr(steps, "predict_proba")
    if not is_classifier and not hasattr(steps, "transform"):
        raise TypeError(
            f"Got a Pipeline that ends with {tail[-1][0]!r}, {tail[-1][1]!r}, but expected a "
            "classifier with predict_proba or a transformer; wrap a classifier in a "
            "sklearn.calibration.CalibratedClassifierCV"
        )
    data_types = import_onnx("skl2onnx.common.data_types")
    width = features.type.tensor_type.shape.dim[1].dim_value
    inputs = [("features", data_types.FloatTensorType([None, width]))]
    options = {id(steps): {"zipmap": False}} if is_classifier else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = skl2onnx.to_onnx(
                steps, initial_types=inputs, options=options, target_opset=OPSETS
            )
    except Exception as error:
        listed = ", ".join(f"{name!r} ({type(step).__name__})" for name, step in tail)
        raise ExportError(
            f"Got a Pipeline with the steps {listed}, which skl2onnx cannot export "
            f"({_cause(error)}); replace the step that it names, or export the first step only"
        ) from error
    names = ["label", "probabilities"] if is_classifier else ["embeddings"]
    ours = {value.name: name for value, name in zip(graph.graph.output, names, strict=True)}
    return renamed(joined({"steps": graph}), ours)


def _cause(error: BaseException) -> str:
    """Return the type and the first line of the first of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
