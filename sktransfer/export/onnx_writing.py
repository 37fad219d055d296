"""ONNX graphs, written node by node, and joined.

Shapes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from sktransfer.utils.errors import import_optional

# Resize has antialiasing from version 18 on.
OPSETS = {"": 18, "ai.onnx.ml": 3}
_IR_VERSION = 10
# Smaller constants, such as the mean and standard deviation of pixels, stay exact.
_MIN_HALF_SIZE = 256


def import_onnx(name: str = "onnx") -> ModuleType:
    """Import a package that exports to ONNX."""
    return import_optional(name, extra="onnx", purpose="export_onnx")


class GraphWriter:
    """Writes a graph node by node."""

    def __init__(self) -> None:
        self._onnx = import_onnx()
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def add(self, operator: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        """Add a node.

        Parameters
        ----------
        operator : str
            One of https://onnx.ai/onnx/operators.
        *inputs : str, list of int or ndarray
            Names of values, or constants; an empty name is an input that is left out.
        output : str
            Name of the output; the default is a new one.
        **attributes
            Of the operator.

        Returns
        -------
        str
            The name of the output.
        """
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        output = output or f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(operator, names, [output], **attributes))
        return output

    def graph(self, inputs: list[Any], outputs: list[Any]) -> Any:
        """Return the graph between inputs and outputs, which are onnx.ValueInfoProto."""
        graph = self._onnx.helper.make_graph(
            self._nodes, "sktransfer", inputs, outputs, self._constants
        )
        return make_model(graph, OPSETS)

    def _constant(self, values: Any) -> str:
        name = f"constant{len(self._constants)}"
        array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name


def with_label(graph: Any, classes: np.ndarray) -> Any:
    """Add the output "label", values of `classes`, to a graph with the output "probabilities"."""
    onnx, writer = import_onnx(), GraphWriter()
    index = writer.add("ArgMax", "probabilities", axis=1, keepdims=0)
    writer.add("Gather", classes, index, output="label")
    probabilities = output_of(graph, "probabilities")
    dtype = onnx.numpy_helper.from_array(classes).data_type
    label = onnx.helper.make_tensor_value_info("label", dtype, ["N"])
    last = writer.graph([probabilities], [label])
    return joined({"image": graph, "label": last}, [probabilities, label])


def mean_graph(members: list[Any]) -> Any:
    """Write the graph of the mean of the output "probabilities" of several graphs.

    Weights that several of them contain, such as those of frozen blocks, are stored once.
    """
    writer = GraphWriter()
    parts, means = dict[str, Any](), list[Any]()
    for number, member in enumerate(members):
        name = f"probabilities{number}"
        parts[f"member{number}"] = renamed(
            member, {"probabilities": name, "label": f"label{number}"}
        )
        means.append(output_of(parts[f"member{number}"], name))
    writer.add("Mean", *(value.name for value in means), output="probabilities")
    parts["mean"] = writer.graph(means, [output_of(members[0], "probabilities")])
    return _with_shared_constants(joined(parts))


def with_half_weights(model: Any) -> Any:
    """Store the kernels and matrices of a graph as float16, and cast them to float32 to compute.

    ONNX Runtime casts them once, when it loads the file, and then runs the same operators as
    without.
    """
    onnx = import_onnx()
    constants, casts = list[Any](), list[Any]()
    for constant in model.graph.initializer:
        half = _as_half(onnx.numpy_helper.to_array(constant))
        if half is None:
            constants.append(constant)
            continue
        name = f"{constant.name}.half"
        constants.append(onnx.numpy_helper.from_array(half, name))
        to = onnx.TensorProto.FLOAT
        casts.append(onnx.helper.make_node("Cast", [name], [constant.name], name, to=to))
    graph = onnx.helper.make_graph(
        [*casts, *model.graph.node],
        model.graph.name,
        model.graph.input,
        model.graph.output,
        constants,
    )
    return make_model(graph, {opset.domain: opset.version for opset in model.opset_import})


def _as_half(values: np.ndarray) -> np.ndarray | None:
    """Round weights to float16; None for what stays as it is."""
    if values.dtype != np.float32 or values.ndim < 2 or values.size < _MIN_HALF_SIZE:
        return None
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.isfinite(half).all() else None


def output_of(model: Any, name: str) -> Any:
    """Return the output of a graph with a name."""
    return next(value for value in model.graph.output if value.name == name)


def renamed(model: Any, names: Mapping[str, str]) -> Any:
    """Return a copy of a graph with other names of its inputs and outputs."""
    copy = type(model)()
    copy.CopyFrom(model)
    graph = copy.graph
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    _rename(graph.node, names)
    return copy


def _rename(nodes: Iterable[Any], names: Mapping[str, str]) -> None:
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
        for attribute in node.attribute:  # the branches of a condition, for example
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner.node, names)


def _with_shared_constants(model: Any) -> Any:
    """Keep one of several equal constants of a graph."""
    first, names, distinct = dict[bytes, str](), dict[str, str](), list[Any]()
    for constant in model.graph.initializer:
        nameless = type(constant)()
        nameless.CopyFrom(constant)
        nameless.ClearField("name")
        names[constant.name] = first.setdefault(nameless.SerializeToString(), constant.name)
        if names[constant.name] == constant.name:
            distinct.append(constant)
    _rename(model.graph.node, names)
    graph = import_onnx().helper.make_graph(
        model.graph.node, model.graph.name, model.graph.input, model.graph.output, distinct
    )
    return make_model(graph, {opset.domain: opset.version for opset in model.opset_import})


def joined(parts: Mapping[str, Any], outputs: Iterable[Any] | None = None) -> Any:
    """Join graphs; each one gets the outputs of earlier ones under their names.

    Parameters
    ----------
    parts : mapping of str to onnx.ModelProto
        In order, by prefixes for the names inside. The inputs of the first one are those of the
        joined graph.
    outputs : iterable of onnx.ValueInfoProto or None
        Outputs of the joined graph; None: those of the last part.
    """
    onnx = import_onnx()
    nodes, constants, opsets = list[Any](), list[Any](), dict[str, int]()
    for prefix, part in parts.items():
        graph = onnx.compose.add_prefix_graph(
            part.graph, f"{prefix}.", rename_inputs=False, rename_outputs=False
        )
        nodes += graph.node
        constants += graph.initializer
        for opset in part.opset_import:
            opsets[opset.domain] = max(opset.version, opsets.get(opset.domain, 0))
    models = list(parts.values())
    inputs, outputs = list(models[0].graph.input), list(outputs or models[-1].graph.output)
    graph = onnx.helper.make_graph(nodes, "sktransfer", inputs, outputs, constants)
    return make_model(graph, opsets)


def make_model(graph: Any, opsets: Mapping[str, int]) -> Any:
    """Wrap a graph into an onnx.ModelProto."""
    helper = import_onnx().helper
    versions = [helper.make_opsetid(*opset) for opset in opsets.items()]
    return helper.make_model(graph, opset_imports=versions, ir_version=_IR_VERSION)
