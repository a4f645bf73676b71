"""How each annotated op becomes integers: one rule an op. A rule returns a form, or the reason why the op stays float."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.codebook import pack
from ...ir.dialect.integer import accumulator_bound, largest_magnitude
from ...ir.errors import PassError
from ...ir.program import Program, origin_of, shape_of
from . import operators as ops
from .codebooks import read_codebook, read_table_codes
from .encoding import Encoding, read_codes, read_encoding
from .integer_weights import integer_weight
from .lower_forms import Accumulator, Builder, Codes, Concat, Form, Real, Sum, Table, is_float, require_integer

aten = torch.ops.aten

Rule = Callable[[Builder, fx.Node], Form | str]

NOT_CODES = "its inputs are not quantized"


def rule_of(program: Program, node: fx.Node) -> Rule | None:
    """The rule for a call node; None where the op has no integer form."""
    if ops.positive_factor(program, node) is not None:
        return lower_factor
    if ops.clamp_bounds(node) is not None:
        return lower_clamp
    if ops.keeps_encoding(node):
        return lower_move
    if ops.is_unary(program, node):
        return lower_unary
    if node.target in ops.MATMUL:
        return lower_matmul
    if node.target in ops.ADD:
        return lower_add
    return RULES.get(node.target)


def lower_fake_quantize(b: Builder, node: fx.Node) -> Form:
    """Where a value gets its encoding: everything pending before it becomes codes. Per-channel encodings are for weights."""
    encoding = read_encoding(b.program, node)
    form = b.forms[node.args[0]]  # type: ignore[index]
    if isinstance(form, Real) and b.program.parameter(form.node) is not None:
        codes = b.parameter(f"{form.node.target}_codes", read_codes(b.program, node), origin_of(form.node))
        return Codes(codes, encoding)
    if not encoding.per_tensor:
        raise PassError(
            f"'{node.name}' (from {origin_of(node)}) has an encoding per channel; only weights can: use one scale a tensor"
        )
    return form.quantized(b, encoding)


def lower_fake_codebook(b: Builder, node: fx.Node) -> Form:
    """Packed codes and the op that decodes them."""
    codebook, codes = read_codebook(b.program, node), read_table_codes(b.program, node)
    packed = b.parameter(f"{node.args[0]}_packed", pack(codes, codebook.bits))
    operands = [b.real(a) for a in (node.args[1], node.args[2])]
    zero = [] if codebook.zero is None else [b.real(node.args[4])]
    return Real(b.emit(gw.decode.default, packed, codebook.bits, list(codes.shape), *operands, codebook.group, *zero))


def lower_convolution(b: Builder, node: fx.Node) -> Form | str:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    if transposed:
        return "transposed convolutions have no integer form"
    return _layer(b, node, gw.convolution.default, 1, (x, weight, bias), (stride, padding, dilation, groups))


def lower_linear(b: Builder, node: fx.Node) -> Form | str:
    return _layer(b, node, gw.linear.default, len(shape_of(node)) - 1, (*node.args, None)[:3], ())


def _layer(b: Builder, node: fx.Node, op: Any, axis: int, operands: tuple[Any, ...], geometry: tuple[Any, ...]) -> Form | str:
    """Convolution and linear: s8 weights, bias in s32 at scale s_x * s_w, accumulator checked against s32."""
    x, weight = b.form(operands[0]), b.form(operands[1])
    if isinstance(weight, Real) and weight.node.target is gw.decode.default:
        return "its weight is codes of a table, which have no integer arithmetic"
    if not isinstance(x, Codes) or not isinstance(weight, Codes):
        return NOT_CODES
    weight_codes = b.program.parameter(weight.node)
    if weight_codes is None:
        return "its weight is not a constant"
    integer = integer_weight(b, weight, weight_codes, node)
    scale = x.encoding.scale.to(torch.float64) * weight.encoding.scale.to(torch.float64)
    bias_codes = None
    if operands[2] is not None:
        bias = b.program.parameter(b.real(operands[2]))
        if bias is None:
            return "its bias is not a constant"
        steps = torch.round(bias.detach().to(torch.float64) / scale)
        require_integer(b, int(steps.abs().max()), node)
        bias_codes = steps.to(torch.int32)
    require_integer(b, accumulator_bound(integer.values, bias_codes, x.encoding.dtype, x.encoding.zero), node)
    bias_node = None if bias_codes is None else b.parameter(f"{operands[2]}_s32", bias_codes)
    acc = b.emit(op, x.node, integer.node, bias_node, *geometry, x.encoding.zero)
    return Accumulator(acc, scale, axis if scale.numel() > 1 else 0)


def lower_matmul(b: Builder, node: fx.Node) -> Form | str:
    x, y = b.form(node.args[0]), b.form(node.args[1])
    if not isinstance(x, Codes) or not isinstance(y, Codes) or not (x.encoding.per_tensor and y.encoding.per_tensor):
        return NOT_CODES
    largest = largest_magnitude(x.encoding.dtype, x.encoding.zero) * largest_magnitude(y.encoding.dtype, y.encoding.zero)
    require_integer(b, int(shape_of(node.args[0])[-1]) * largest, node)  # type: ignore[arg-type]
    acc = b.emit(gw.matmul.default, x.node, y.node, x.encoding.zero, y.encoding.zero)
    return Accumulator(acc, _product(x.encoding, y.encoding))


def lower_add(b: Builder, node: fx.Node) -> Form | str:
    x, y = b.form(node.args[0]), b.form(node.args[1])
    if not isinstance(x, Codes) or not isinstance(y, Codes):
        return "it sums float values (a residual stream that ends in float, or a constant)"
    if node.kwargs.get("alpha", 1) != 1:
        return "it multiplies its second operand (alpha)"
    return Sum(node, x, y, -1.0 if node.target is aten.sub.Tensor else 1.0)


def lower_multiply(b: Builder, node: fx.Node) -> Form | str:
    x, y = b.form(node.args[0]), b.form(node.args[1])
    if not isinstance(x, Codes) or not isinstance(y, Codes):
        return NOT_CODES
    acc = b.emit(gw.multiply.default, x.node, y.node, x.encoding.zero, y.encoding.zero)
    return Accumulator(acc, _product(x.encoding, y.encoding))


def lower_concat(b: Builder, node: fx.Node) -> Form | str:
    parts = [b.forms[part] for part in node.args[0]]  # type: ignore[union-attr, index]
    return Concat(node, parts, int(node.args[1]) if len(node.args) > 1 else 0)  # type: ignore[arg-type]


def lower_clamp(b: Builder, node: fx.Node) -> Form | str:
    form = b.forms[node.args[0]]  # type: ignore[index]
    fused = form.clamped(node)
    return lower_unary(b, node) if fused is None else fused


def lower_unary(b: Builder, node: fx.Node) -> Form | str:
    form = b.forms[node.args[0]]  # type: ignore[index]
    return Table(form, node) if isinstance(form, (Codes, Table)) else "its input is not quantized"


def lower_factor(b: Builder, node: fx.Node) -> Form | str:
    """A constant factor > 0 disappears into the scale of what it multiplies."""
    factor = ops.positive_factor(b.program, node)
    scaled = b.forms[node.args[0]].scaled(node, factor)  # type: ignore[index, arg-type]
    return lower_unary(b, node) if scaled is None else scaled


def lower_move(b: Builder, node: fx.Node) -> Form | str:
    form = b.forms[node.args[0]]  # type: ignore[index]
    if not isinstance(form, Codes) or not form.encoding.per_tensor:
        return "it moves float values"
    rest = b.real(node.args[1:])
    if ops.pads_with_zero(node):
        moved = b.emit(aten.constant_pad_nd.default, form.node, rest[0], form.encoding.zero)
    elif node.target is ops.MAX_POOL:
        moved = b.emit(gw.max_pool2d.default, form.node, *_max_pool_arguments(*rest))
    else:
        moved = b.emit(node.target, form.node, *rest, **b.real(node.kwargs))
    return Codes(moved, form.encoding)


def _max_pool_arguments(kernel, stride=None, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    return ops.pair(kernel), ops.pair(stride or kernel), ops.pair(padding), ops.pair(dilation), ceil_mode


def lower_mean(b: Builder, node: fx.Node) -> Form | str:
    """A mean is an s32 sum whose scale is divided by the count."""
    described = ops.mean_dims(node)
    if described is None:
        return "it averages over a dynamic dimension or to a grid"
    dims, keep = described
    form = b.forms[node.args[0]]  # type: ignore[index]
    if not isinstance(form, Codes) or not form.encoding.per_tensor:
        return _float_mean(b, node, dims, keep)
    count = math.prod(shape_of(node.args[0])[d] for d in dims)  # type: ignore[arg-type]
    require_integer(b, count * largest_magnitude(form.encoding.dtype, form.encoding.zero), node)
    acc = b.emit(gw.sum.default, form.node, dims, keep, form.encoding.zero)
    return Accumulator(acc, form.encoding.scale.to(torch.float64) / count)


def _float_mean(b: Builder, node: fx.Node, dims: list[int], keep: bool) -> Form:
    b.island(node, "it averages float values")
    count = math.prod(shape_of(node.args[0])[d] for d in dims)  # type: ignore[arg-type]
    return Real(b.emit(aten.mul.Tensor, _float_sum(b, b.real(node.args[0]), dims, keep), 1.0 / count))


def _float_sum(b: Builder, value: fx.Node, dims: list[int], keep: bool) -> fx.Node:
    """A float sum in the fixed order of `gw::reduce_sum`, last axis first."""
    for d in reversed(dims):
        value = b.emit(gw.reduce_sum.default, value, d, keep)
    return value


def lower_sum(b: Builder, node: fx.Node) -> Form | str:
    """A sum stays float, but in a fixed order."""
    value, dims, keep = (*node.args, False)[:3]
    if not dims or node.kwargs or not is_float(value):  # type: ignore[arg-type]
        return "it has no integer form"
    b.island(node, "it sums float values")
    axes = sorted(int(d) % len(shape_of(value)) for d in dims)  # type: ignore[arg-type, union-attr]
    return Real(_float_sum(b, b.real(value), axes, bool(keep)))


def lower_norm(b: Builder, node: fx.Node) -> Form | str:
    """A Euclidean norm stays float: the root of the sum of squares, in a fixed order."""
    value, order, dims, keep = (*node.args, *(2, None, False)[len(node.args) - 1 :])[:4]
    if order != 2 or not dims or node.kwargs:
        return "it has no integer form"
    b.island(node, "it is the norm of float values")
    axes = sorted(int(d) % len(shape_of(value)) for d in dims)  # type: ignore[arg-type, union-attr]
    x = b.real(value)
    return Real(b.emit(gw.square_root.default, _float_sum(b, b.emit(aten.mul.Tensor, x, x), axes, bool(keep))))


def lower_square_root(b: Builder, node: fx.Node) -> Form | str:
    """A root of codes is a table; one of float values stays float, correctly rounded."""
    form = lower_unary(b, node)
    if isinstance(form, Form):
        return form
    b.island(node, "it takes the root of float values")
    return Real(b.emit(gw.square_root.default, b.real(node.args[0])))


def lower_average_pool(b: Builder, node: fx.Node) -> Form | str:
    form = b.forms[node.args[0]]  # type: ignore[index]
    if not isinstance(form, Codes):
        return NOT_CODES
    described = ops.average_pool(node)
    if isinstance(described, str):
        return described
    kernel, stride, padding, divisor = described
    acc = b.emit(gw.sum_pool2d.default, form.node, kernel, stride, padding, form.encoding.zero)
    return Accumulator(acc, form.encoding.scale.to(torch.float64) / divisor)


def lower_layer_norm(b: Builder, node: fx.Node) -> Form | str:
    x, normalized, weight, bias, *rest = (*node.args, None, None)[: max(len(node.args), 4)]
    if len(normalized) != 1:  # type: ignore[arg-type]
        return "it normalizes over several axes"
    width = int(normalized[0])  # type: ignore[index, arg-type]
    weight = b.real(weight) if weight is not None else b.parameter("ones", torch.ones(width))
    bias = b.real(bias) if bias is not None else b.parameter("zeros", torch.zeros(width))
    b.island(node, "layer normalization has no integer form")
    return Real(b.emit(gw.layer_norm.default, b.real(x), weight, bias, float(rest[0]) if rest else 1e-5))  # type: ignore[arg-type]


def lower_softmax(b: Builder, node: fx.Node) -> Form | str:
    b.island(node, "softmax has no integer form")
    value = b.real(node.args[0])
    rank, dim = len(shape_of(node)), int(node.args[1])  # type: ignore[arg-type]
    if dim % rank == rank - 1:
        return Real(b.emit(gw.softmax.default, value))
    swapped = b.emit(gw.softmax.default, b.emit(aten.transpose.int, value, dim, -1))
    return Real(b.emit(aten.transpose.int, swapped, dim, -1))


def _product(x: Encoding, y: Encoding) -> torch.Tensor:
    return x.scale.to(torch.float64).reshape(1) * y.scale.to(torch.float64).reshape(1)


RULES: dict[Any, Rule] = {
    gw.fake_quantize.default: lower_fake_quantize,
    gw.fake_codebook.default: lower_fake_codebook,
    ops.CONVOLUTION: lower_convolution,
    ops.LINEAR: lower_linear,
    ops.MULTIPLY: lower_multiply,
    ops.CONCAT: lower_concat,
    ops.MEAN: lower_mean,
    ops.ADAPTIVE_POOL: lower_mean,
    ops.AVERAGE_POOL: lower_average_pool,
    ops.LAYER_NORM: lower_layer_norm,
    aten.sum.dim_IntList: lower_sum,
    aten.linalg_vector_norm.default: lower_norm,
    aten.sqrt.default: lower_square_root,
    **dict.fromkeys(ops.SOFTMAX, lower_softmax),
}
