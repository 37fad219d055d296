"""Resizing and cropping in ONNX, with exactly the pixels of torch on a CPU.

ONNX has an operator for it, but one in a hundred of its pixels differs by a level, and that changed
probabilities of small networks by more than 0.001. So resizing is written as matrix products, with
the integer weights of torch's `interpolate` (aten/src/ATen/native/cpu/UpSampleKernel.cpp).

Shapes: N images of h x w pixels, H x W after the crop, T pixels that a resized one is a mean of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sktransfer.export.onnx_writing import GraphWriter, import_onnx
from sktransfer.transforms.preprocessing import MAX_ASPECT_RATIO, Preprocessing

# Half the width of a filter, before it is stretched, in pixels.
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
# Keys' cubic filter.
_CUBIC = -0.5
# Weights are integers below 2**15, at most this power of two times a fraction.
_WEIGHT_BITS, _MAX_POWER = 15, 22
# Parts of the columns, of which each has at least one column: a crop has 8 or more.
_N_BLOCKS = 8


def crop_graph(preprocessing: Preprocessing) -> Any:
    """Write the graph of `ResizeAndCrop`: images (N, h, w, 3) to pixels (N, 3, H, W), both uint8.

    See `sktransfer.transforms.modules` for the rounding of sizes.
    """
    writer, crop = GraphWriter(), list(preprocessing.crop)
    resize, interpolation = preprocessing.resize, preprocessing.interpolation
    if isinstance(resize, int):
        images, before = _middle(writer, resize, max(crop))
        short = writer.add("ReduceMin", before)
        size = writer.add("Div", writer.add("Mul", before, [resize]), short)
    else:
        images, before = "images", writer.add("Shape", "images", start=1, end=3)
        size = writer.add("Identity", list(resize))
    pixels = writer.add("Transpose", images, perm=[0, 3, 1, 2])
    if isinstance(resize, int) and resize < max(crop):
        first, whole = size, writer.add("Mul", size, [0])
        pixels = _resized(writer, pixels, interpolation, _Plan(before, first, whole, first))
        before, size = first, _enlarged(writer, first, crop)
    start = _crop_start(writer, size, crop)
    count = writer.add("Identity", crop)
    pixels = _resized(writer, pixels, interpolation, _Plan(before, size, start, count))
    value, uint8 = import_onnx().helper.make_tensor_value_info, import_onnx().TensorProto.UINT8
    writer.add("Cast", pixels, to=uint8, output="pixels")
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
    size = writer.add("Min", whole, length)
    start = writer.add("Div", writer.add("Sub", whole, size), [2])
    stop = writer.add("Add", start, size)
    return writer.add("Slice", "images", start, stop, [1, 2]), size


def _enlarged(writer: GraphWriter, size: str, crop: list[int]) -> str:
    """Return the name of the size to which images smaller than the crop are enlarged."""
    exact = _double(writer, size)
    factor = writer.add("ReduceMax", writer.add("Div", np.array(crop, np.float64), exact))
    factor = writer.add("Max", factor, np.ones(1))
    return _integer(writer, writer.add("Ceil", writer.add("Mul", exact, factor)))


def _crop_start(writer: GraphWriter, size: str, crop: list[int]) -> str:
    """Return the name of the first row and column of the crop."""
    excess = writer.add("Sub", size, crop)
    half = writer.add("Div", excess, [2])
    # Half a pixel is rounded to an even number.
    both_odd = writer.add("Mul", *(writer.add("Mod", value, [2]) for value in (excess, half)))
    return writer.add("Add", half, both_odd)


@dataclass(frozen=True)
class _Plan:
    """Names of pairs (rows, columns) of integers.

    Parameters
    ----------
    before, after : str
        Size before and after resizing.
    start, count : str
        First row and column, and number of rows and columns, of the resized image to compute.
    """

    before: str
    after: str
    start: str
    count: str

    def axis(self, writer: GraphWriter, axis: int) -> _Plan:
        """Return the names of the numbers of one axis, each of shape (1,)."""
        pairs = (self.before, self.after, self.start, self.count)
        return _Plan(*(writer.add("Gather", pair, [axis]) for pair in pairs))


def _resized(writer: GraphWriter, pixels: str, interpolation: str, plan: _Plan) -> str:
    """Resize and crop pixels (N, 3, h, w); return the name of whole numbers, float32."""
    for axis in (1, 0):  # columns first
        numbers = plan.axis(writer, axis)
        if interpolation == "nearest":
            pixels = _nearest(writer, pixels, 2 + axis, numbers)
        else:
            pixels = _weighted(writer, pixels, 2 + axis, numbers, interpolation)
    return pixels


def _nearest(writer: GraphWriter, pixels: str, axis: int, plan: _Plan) -> str:
    before, after = (_float(writer, name) for name in (plan.before, plan.after))
    scale = writer.add("Div", before, after)
    position = writer.add("Mul", _float(writer, _range(writer, plan.start, plan.count)), scale)
    last = writer.add("Sub", plan.before, [1])
    index = writer.add("Min", _integer(writer, position), last)
    return writer.add("Gather", pixels, index, axis=axis)


def _weighted(writer: GraphWriter, pixels: str, axis: int, plan: _Plan, interpolation: str) -> str:
    """Resize and crop one axis of pixels by matrices of integer weights."""
    index, weights, unit = _weights(writer, plan, interpolation)
    # Two products of small integers, because larger ones are not exact in float32.
    high = writer.add("Floor", writer.add("Div", weights, np.full(1, 256.0)))
    low = writer.add("Sub", weights, writer.add("Mul", high, np.full(1, 256.0)))
    parts = [index, _float(writer, high), _float(writer, low)]
    # Most weights of a matrix are zero, so a matrix for each part of the columns computes less.
    # The rows are few by then.
    n_blocks = _N_BLOCKS if axis == 3 else 1
    levels = []
    for number in range(n_blocks):
        start, stop = (
            writer.add("Div", writer.add("Mul", plan.count, [end]), [n_blocks])
            for end in (number, number + 1)
        )
        index, high, low = (writer.add("Slice", part, start, stop, [0]) for part in parts)
        levels.append(_product(writer, pixels, axis, index, high, low, unit))
    return levels[0] if n_blocks == 1 else writer.add("Concat", *levels, axis=axis)


def _product(
    writer: GraphWriter, pixels: str, axis: int, index: str, high: str, low: str, unit: str
) -> str:
    """Compute resized rows or columns, of which each is a mean of the rows or columns `index`.

    A weight is 256 times its `high` part plus its `low` part.
    """
    first = writer.add("Reshape", writer.add("ReduceMin", index), [1])
    stop = writer.add("Add", writer.add("Reshape", writer.add("ReduceMax", index), [1]), [1])
    pixels = _float(writer, writer.add("Slice", pixels, first, stop, [axis]))
    count = writer.add("Shape", index, end=1)
    shape = writer.add("Concat", count, writer.add("Sub", stop, first), axis=0)
    zero = import_onnx().numpy_helper.from_array(np.zeros(1, np.float32))
    empty = writer.add("ConstantOfShape", shape, value=zero)
    index = writer.add("Sub", index, first)
    products = []
    for part in (high, low):
        matrix = writer.add("ScatterElements", empty, index, part, axis=1, reduction="add")
        if axis == 3:
            factors = [pixels, writer.add("Transpose", matrix, perm=[1, 0])]
        else:
            factors = [matrix, pixels]
        products.append(_double(writer, writer.add("MatMul", *factors)))
    total = writer.add("Add", writer.add("Mul", products[0], np.full(1, 256.0)), products[1])
    level = writer.add("Add", writer.add("Div", total, unit), np.full(1, 0.5))
    level = writer.add("Clip", writer.add("Floor", level), np.array(0.0), np.array(255.0))
    return _float(writer, level)


def _weights(writer: GraphWriter, plan: _Plan, interpolation: str) -> tuple[str, str, str]:
    """Compute which pixels a resized pixel is a mean of, and how much each one weighs.

    Returns
    -------
    index : str
        Name of positions, int64 of shape (count, T).
    weights : str
        Name of whole numbers, float64 of shape (count, T).
    unit : str
        Name of the sum of the weights, a power of two, float64 of shape (1,).
    """
    before = _double(writer, plan.before)
    scale = writer.add("Div", before, _double(writer, plan.after))
    stretch = writer.add("Max", scale, np.ones(1))
    support = writer.add("Mul", stretch, np.full(1, _SUPPORT[interpolation]))
    center = _double(writer, _range(writer, [0], plan.after))
    center = writer.add("Mul", writer.add("Add", center, np.full(1, 0.5)), scale)
    center = writer.add("Unsqueeze", center, [1])
    left = writer.add("Add", writer.add("Sub", center, support), np.full(1, 0.5))
    left = writer.add("Max", _integer(writer, left), [0])
    n_taps = writer.add("Mul", _integer(writer, writer.add("Ceil", support)), [2])
    taps = _range(writer, [0], writer.add("Add", n_taps, [1]))
    index = writer.add("Add", left, taps)
    distance = writer.add("Sub", _double(writer, index), center)
    distance = writer.add("Add", distance, np.full(1, 0.5))
    distance = writer.add("Mul", distance, writer.add("Reciprocal", stretch))
    weights = _filter(writer, writer.add("Abs", distance), interpolation)
    inside = writer.add("Less", index, plan.before)
    weights = writer.add("Mul", weights, _double(writer, inside))
    weights = writer.add("Div", weights, writer.add("ReduceSum", weights, [1], keepdims=1))
    # The largest power of two for which all weights are below the limit.
    largest = writer.add("Reshape", writer.add("ReduceMax", weights), [1])
    powers = 2.0 ** np.arange(_MAX_POWER + 1)
    scaled = writer.add("Add", writer.add("Mul", largest, powers[1:]), np.full(1, 0.5))
    fits = writer.add("Less", writer.add("Floor", scaled), np.full(1, 2.0**_WEIGHT_BITS))
    power = writer.add("ReduceSum", _integer(writer, fits), [0], keepdims=1)
    unit = writer.add("Gather", powers, power)
    weights = writer.add("Mul", weights, unit)
    rounded = writer.add("Floor", writer.add("Add", writer.add("Abs", weights), np.full(1, 0.5)))
    weights = writer.add("Mul", rounded, writer.add("Sign", weights))
    stop = writer.add("Add", plan.start, plan.count)
    index, weights = (writer.add("Slice", name, plan.start, stop, [0]) for name in (index, weights))
    # Positions beyond the image have no weight.
    return writer.add("Min", index, writer.add("Sub", plan.before, [1])), weights, unit


def _filter(writer: GraphWriter, distance: str, interpolation: str) -> str:
    """Return the name of the filter's value at distances from its center."""
    if interpolation == "bilinear":
        return writer.add("Max", writer.add("Sub", np.ones(1), distance), np.zeros(1))
    near = _polynomial(writer, distance, _CUBIC + 2, -(_CUBIC + 3), 0, 1)
    far = _polynomial(writer, distance, _CUBIC, -5 * _CUBIC, 8 * _CUBIC, -4 * _CUBIC)
    far = writer.add("Where", writer.add("Less", distance, np.full(1, 2.0)), far, np.zeros(1))
    return writer.add("Where", writer.add("Less", distance, np.ones(1)), near, far)


def _polynomial(writer: GraphWriter, x: str, first: float, *others: float) -> str:
    value: Any = np.full(1, first)
    for coefficient in others:
        value = writer.add("Add", writer.add("Mul", value, x), np.full(1, float(coefficient)))
    return value


def _range(writer: GraphWriter, start: Any, count: Any) -> str:
    """Return the name of `count` integers from `start` on; both have the shape (1,)."""
    zero, one = np.array(0), np.array(1)
    numbers = writer.add("Range", zero, writer.add("Squeeze", count), one)
    return writer.add("Add", numbers, start)


def _double(writer: GraphWriter, name: str) -> str:
    return writer.add("Cast", name, to=import_onnx().TensorProto.DOUBLE)


def _float(writer: GraphWriter, name: str) -> str:
    return writer.add("Cast", name, to=import_onnx().TensorProto.FLOAT)


def _integer(writer: GraphWriter, name: str) -> str:
    """Cast to int64; fractions are cut off."""
    return writer.add("Cast", name, to=import_onnx().TensorProto.INT64)
