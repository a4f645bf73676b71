"""Element-wise kernels of the integer stage: quantize, dequantize, rescale, add, multiply, lookup.

Shapes are physical: the same generator serves dense tensors and [N, H, W, Cp], whose lanes past C are computed like the others.
"""

from __future__ import annotations

from tvm import tirx

from .base import Tail
from .fixed_point import centered, dequantized, finished, lowest, quantized, tail_placeholders
from .schedule import schedule_linear, schedule_rows, te

Shape = tuple[int, ...]


def quantize(shape: Shape, scale: float, zero_point: int, qmin: int, qmax: int, dtype: str) -> tirx.PrimFunc:
    """`gw::quantize`: x float32 [shape] -> out `dtype` [shape]."""
    x = te.placeholder(shape, "float32", name="x")
    out = te.compute(shape, lambda *i: quantized(x(*i), scale, zero_point, qmin, qmax, dtype), name="out")
    return schedule_linear(te.create_prim_func([x, out]), cost=2)


def dequantize(shape: Shape, dtype: str, scale: float, zero_point: int) -> tirx.PrimFunc:
    """`gw::dequantize`: x `dtype` [shape] -> out float32 [shape]."""
    x = te.placeholder(shape, dtype, name="x")
    out = te.compute(shape, lambda *i: dequantized(x(*i), scale, zero_point), name="out")
    return schedule_linear(te.create_prim_func([x, out]))


def rescale(shape: Shape, axis: int, tail: Tail) -> tirx.PrimFunc:
    """`gw::rescale`, `rescale_dyadic`, `scale`: acc s32 [shape], parameters (shape[axis],) -> out `tail.dtype` [shape]."""
    acc = te.placeholder(shape, "int32", name="acc")
    parameters = tail_placeholders(tail, shape[axis])
    out = te.compute(shape, lambda *i: finished(tail, acc(*i), parameters, i[axis]), name="out")
    return schedule_rows(te.create_prim_func([acc, *parameters, out]), cost=2)


def add(
    a_shape: Shape,
    b_shape: Shape,
    a_dtype: str,
    b_dtype: str,
    multipliers: tuple[int, int],
    shift: int,
    zero_points: tuple[int, int],
    tail: Tail,
) -> tirx.PrimFunc:
    """`gw::add`, broadcast: a, b u8 / s8 -> out `tail.dtype`; fixed-point sum in s32. `tail` gives zero point, range and type."""
    a, b = te.placeholder(a_shape, a_dtype, name="a"), te.placeholder(b_shape, b_dtype, name="b")
    shape = broadcast_shape(a_shape, b_shape)

    def total(*index):
        left = centered(a(*broadcast_index(a_shape, index)), zero_points[0]) * tirx.const(multipliers[0], "int32")
        right = centered(b(*broadcast_index(b_shape, index)), zero_points[1]) * tirx.const(multipliers[1], "int32")
        steps = tirx.shift_right(left + right + tirx.const(1 << (shift - 1), "int32"), tirx.const(shift, "int32"))
        steps = steps + tirx.const(tail.zero_point, "int32")
        return te.min(te.max(steps, tirx.const(tail.qmin, "int32")), tirx.const(tail.qmax, "int32")).astype(tail.dtype)

    function = te.create_prim_func([a, b, te.compute(shape, total, name="out")])
    same = a_shape == b_shape
    return schedule_linear(function, cost=2) if same else schedule_rows(function, cost=2)


def multiply(
    a_shape: Shape, b_shape: Shape, a_dtype: str, b_dtype: str, zero_points: tuple[int, int], axis: int, tail: Tail
) -> tirx.PrimFunc:
    """`gw::multiply`, broadcast, and the tail that reads its s32 product; tail parameters run along `axis` of the output."""
    a, b = te.placeholder(a_shape, a_dtype, name="a"), te.placeholder(b_shape, b_dtype, name="b")
    shape = broadcast_shape(a_shape, b_shape)
    parameters = tail_placeholders(tail, shape[axis])

    def product(*index):
        left = centered(a(*broadcast_index(a_shape, index)), zero_points[0])
        right = centered(b(*broadcast_index(b_shape, index)), zero_points[1])
        return finished(tail, left * right, parameters, index[axis])

    return schedule_rows(te.create_prim_func([a, b, *parameters, te.compute(shape, product, name="out")]), cost=2)


def lookup(shape: Shape, x_dtype: str, table_dtype: str) -> tirx.PrimFunc:
    """`gw::lookup`: x u8 / s8 [shape], table [256] -> out [shape]."""
    x, table = te.placeholder(shape, x_dtype, name="x"), te.placeholder((256,), table_dtype, name="table")
    first = tirx.const(lowest(x_dtype), "int32")
    out = te.compute(shape, lambda *i: table(x(*i).astype("int32") - first), name="out")
    return schedule_linear(te.create_prim_func([x, table, out]), cost=2)


def broadcast_shape(a: Shape, b: Shape) -> Shape:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    return tuple(max(x, y) if min(x, y) == 1 else x for x, y in zip(a, b, strict=True))


def broadcast_index(shape: Shape, index):
    """The index into a tensor of `shape` that broadcasts to the output `index`."""
    return tuple(0 if size == 1 else i for size, i in zip(shape, index[len(index) - len(shape) :], strict=True))
