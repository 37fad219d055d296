"""ONNX graphs, written node by node, and joined.

Shapes: N images of h x w pixels, H x W after the crop, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from sktransfer.transforms.preprocessing import MAX_ASPECT_RATIO, Preprocessing
from sktransfer.utils.errors import import_optional

# Resize has antialiasing from version 18 on.
OPSETS = {"": 18, "ai.onnx.ml": 3}
_IR_VERSION = 10

# With `exclude_outside`, the pixels of ONNX Runtime are within one level of torch's (with cubic
# interpolation, one in 100,000 differs by two).
_RESIZE_OPTIONS: dict[str, dict[str, Any]] = {
    "nearest": {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    },
    "bilinear": {"mode": "linear", "antialias": 1, "exclude_outside": 1},
    "bicubic": {"mode": "cubic", "antialias": 1, "exclude_outside": 1, "cubic_coeff_a": -0.5},
}


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


def crop_graph(preprocessing: Preprocessing) -> Any:
    """Write the graph of `ResizeAndCrop`: images (N, h, w, 3) to pixels (N, 3, H, W), both uint8.

    See `sktransfer.transforms.modules` for the rounding of sizes.
    """
    writer, crop = GraphWriter(), list(preprocessing.crop)
    resize, options = preprocessing.resize, _RESIZE_OPTIONS[preprocessing.interpolation]
    first_sizes = writer.add("Concat", writer.add("Shape", "images", end=1), [3], axis=0)

    def resized(images: str, size: str) -> str:
        sizes = writer.add("Concat", first_sizes, size, axis=0)
        return writer.add("Resize", images, "", "", sizes, **options)

    middle = "images"
    if isinstance(resize, int):
        middle, kept = _middle(writer, resize, max(crop))
        short = writer.add("ReduceMin", kept)
        size = writer.add("Div", writer.add("Mul", kept, [resize]), short)
    else:
        size = writer.add("Identity", list(resize))
    pixels = resized(writer.add("Transpose", middle, perm=[0, 3, 1, 2]), size)
    if isinstance(resize, int) and resize < max(crop):
        size = _enlarged(writer, size, crop)
        pixels = resized(pixels, size)
    excess = writer.add("Sub", size, crop)
    half = writer.add("Div", excess, [2])
    # Half a pixel is rounded to an even number.
    both_odd = writer.add("Mul", *(writer.add("Mod", value, [2]) for value in (excess, half)))
    start = writer.add("Add", half, both_odd)
    stop = writer.add("Add", start, crop)
    writer.add("Slice", pixels, start, stop, [2, 3], output="pixels")
    value, uint8 = import_onnx().helper.make_tensor_value_info, import_onnx().TensorProto.UINT8
    return writer.graph(
        [value("images", uint8, ["N", "height", "width", 3])],
        [value("pixels", uint8, ["N", 3, *crop])],
    )


def _middle(writer: GraphWriter, resize: int, crop: int) -> tuple[str, str]:
    """Cut off the ends of very long images; return the names of the images and of their size."""
    whole = writer.add("Shape", "images", start=1, end=3)
    short = writer.add("ReduceMin", whole)
    rounded_up = writer.add("Add", writer.add("Mul", short, [2 * crop]), [resize - 1])
    length = writer.add("Div", rounded_up, [resize])
    length = writer.add("Max", length, writer.add("Mul", short, [MAX_ASPECT_RATIO]))
    kept = writer.add("Min", whole, length)
    start = writer.add("Div", writer.add("Sub", whole, kept), [2])
    stop = writer.add("Add", start, kept)
    return writer.add("Slice", "images", start, stop, [1, 2]), kept


def _enlarged(writer: GraphWriter, size: str, crop: list[int]) -> str:
    """Return the name of the size to which images smaller than the crop are enlarged."""
    double, int64 = import_onnx().TensorProto.DOUBLE, import_onnx().TensorProto.INT64
    exact = writer.add("Cast", size, to=double)
    factor = writer.add("ReduceMax", writer.add("Div", np.array(crop, np.float64), exact))
    factor = writer.add("Max", factor, np.ones(1))
    return writer.add("Cast", writer.add("Ceil", writer.add("Mul", exact, factor)), to=int64)


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
    """Write the graph of the mean of the output "probabilities" of several graphs."""
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
    return joined(parts)


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
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    return copy


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
