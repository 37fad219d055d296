"""Graphs are written node by node, and joined."""

import numpy as np
import onnx
import onnxruntime
import pytest

from sktransfer.export.onnx_writing import (
    GraphWriter,
    joined,
    mean_graph,
    output_of,
    renamed,
    with_half_weights,
    with_label,
)

FLOAT = onnx.TensorProto.FLOAT


def run(model, **inputs):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def linear(factor, offset, output="probabilities"):
    """Return the graph of "images", (N, 2), times a factor and plus an offset."""
    writer = GraphWriter()
    product = writer.add("Mul", "images", np.full((1, 2), factor, np.float32))
    writer.add("Add", product, np.full((1, 2), offset, np.float32), output=output)
    values = [
        onnx.helper.make_tensor_value_info(name, FLOAT, ["N", 2]) for name in ("images", output)
    ]
    return writer.graph(values[:1], values[1:])


def test_joined_graphs_run_in_order_even_with_equal_names_inside():
    second = renamed(linear(3, 0), {"images": "middle"})
    graph = joined({"first": linear(2, 1, "middle"), "second": second})
    x = np.array([[1.0, -2.0]], np.float32)
    np.testing.assert_allclose(run(graph, images=x)["probabilities"], 3 * (2 * x + 1))


def test_mean_is_that_of_all_members():
    graph = mean_graph([linear(1, 0), linear(2, 3), linear(6, 0)])
    x = np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)
    np.testing.assert_allclose(run(graph, images=x)["probabilities"], 3 * x + 1)


def test_mean_of_labeled_graphs_has_no_label_of_a_member():
    member = with_label(linear(1, 0), np.array([1, 2]))
    graph = mean_graph([member, member])
    assert [output.name for output in graph.graph.output] == ["probabilities"]
    assert run(graph, images=np.ones((1, 2), np.float32))["probabilities"].tolist() == [[1, 1]]


def test_mean_stores_equal_constants_once():
    graph = mean_graph([linear(2, 3), linear(2, 4), linear(2, 3)])
    values = sorted(onnx.numpy_helper.to_array(each)[0, 0] for each in graph.graph.initializer)
    assert values == [2, 3, 4]


@pytest.mark.parametrize(
    "classes",
    [
        np.array(["cat", "owl"]),
        np.array(["cat", "owl"], object),
        np.array([3, 7]),
        np.array([False, True]),
        np.array([0.5, 1.5]),
    ],
    ids=lambda classes: str(classes.dtype),
)
def test_label_is_the_most_probable_class(classes):
    graph = with_label(linear(1, 0), classes)
    assert [output.name for output in graph.graph.output] == ["probabilities", "label"]
    outputs = run(graph, images=np.array([[0.2, 0.8], [0.9, 0.1]], np.float32))
    assert outputs["label"].tolist() == classes[[1, 0]].tolist()
    assert output_of(graph, "label").type.tensor_type.shape.dim[0].dim_param == "N"


def test_weights_beyond_float16_are_not_converted():
    writer = GraphWriter()
    for name, value in {"small": 0.1, "large": 1e5}.items():
        writer.add("Identity", np.full((16, 16), value, np.float32), output=name)
    outputs = [
        onnx.helper.make_tensor_value_info(name, FLOAT, [16, 16]) for name in ("small", "large")
    ]
    graph = with_half_weights(writer.graph([], outputs))
    types = [constant.data_type for constant in graph.graph.initializer]
    assert sorted(types) == sorted([onnx.TensorProto.FLOAT16, FLOAT])
    values = run(graph)
    assert (values["small"] == np.float32(np.float16(0.1))).all()
    assert (values["large"] == 1e5).all()
