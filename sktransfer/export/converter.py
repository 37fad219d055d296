"""A converter, with which `skl2onnx.to_onnx` exports pipelines that begin with an extractor."""

from __future__ import annotations

from typing import Any

from sktransfer.export.onnx_graph import build_graph
from sktransfer.export.onnx_writing import import_onnx
from sktransfer.extractor import PretrainedFeatureExtractor


def register_onnx_converter() -> None:
    """Register `PretrainedFeatureExtractor` in skl2onnx, for this process.

    `skl2onnx.to_onnx` then converts pipelines and other estimators that contain an extractor, with
    all its options. It needs ``initial_types=[("images", UInt8TensorType([None, None, None, 3]))]``
    and a `target_opset` of at least 18. Nothing is compared with the model; `export_onnx` does
    that.

    Raises
    ------
    ImportError
        If packages are missing; install them with ``pip install 'sktransfer[onnx]'``.
    """
    import_onnx("skl2onnx").update_registered_converter(
        PretrainedFeatureExtractor, "SktransferExtractor", _set_shape, _convert, overwrite=True
    )


def _set_shape(operator: Any) -> None:
    width = len(operator.raw_operator.get_feature_names_out())
    float_type = import_onnx("skl2onnx.common.data_types").FloatTensorType
    operator.outputs[0].type = float_type([None, width])


def _convert(scope: Any, operator: Any, container: Any) -> None:
    """Add the graph of a fitted extractor to a container of skl2onnx."""
    onnx = import_onnx()
    prefix = scope.get_unique_operator_name("extractor") + "."
    model = build_graph(operator.raw_operator)
    graph = onnx.compose.add_prefix_graph(model.graph, prefix)
    before = (operator.inputs[0].onnx_name, graph.input[0].name)
    after = (graph.output[0].name, operator.outputs[0].onnx_name)
    for source, copy in (before, after):
        name = scope.get_unique_operator_name("Identity")
        container.nodes.append(onnx.helper.make_node("Identity", [source], [copy], name=name))
    container.nodes.extend(graph.node)
    container.initializers.extend(graph.initializer)
    container.node_domain_version_pair_sets.update(
        (opset.domain, opset.version) for opset in model.opset_import
    )
