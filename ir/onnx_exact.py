"""Export of the integer stage: every `gw::` op as ONNX operators with one result, so that runtimes give the reference's bits.

    gw.quantize(x, s, z)               Mul(x, 1 / s) -> QuantizeLinear(1, z)        (after a Clip where the range is narrow)
    gw.linear, matmul, convolution     MatMulInteger or ConvInteger -> Add(bias, s32)
    gw.rescale(acc, s, z)              Cast -> Mul(s) -> QuantizeLinear(1, z)
    gw.scale(acc, s)                   Cast -> Mul(s)
    gw.lookup(x, table)                Gather
    gw.softmax, layer_norm, ...        elementary operators in the reference's order (`onnx_islands`)

Why not QDQ throughout: a product of dequantized values is a float sum, exact only up to 2^24 and only until an optimizer moves a
scale into it, where the integer operators are defined to the bit. QuantizeLinear divides by its scale where `gw::quantize`
multiplies by the reciprocal: hence a Mul, and a scale of 1. Float ops whose result depends on the runtime (products and functions
of floats that no table holds) are refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import onnx_islands as islands
from .errors import UnsupportedOpError
from .onnx_nodes import DOMAIN, Writer, replace
from .program import Program, origin_of

aten = torch.ops.aten
gw = torch.ops.gw

#: Ops that only make constants of constants: computed before the export.
FOLDED = (gw.unpack.default, gw.from_bitmask.default, gw.decode.default)

#: Float ops of the integer stage with one result: one IEEE operation an element, or none.
EXACT_FLOAT = frozenset(
    {
        *(getattr(op, kind) for op in (aten.add, aten.sub, aten.mul, aten.div) for kind in ("Tensor", "Scalar")),
        aten.neg.default, aten.abs.default, aten.relu.default, aten.relu6.default, aten.hardtanh.default,
        aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
        aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.amax.default, aten.max_pool2d.default,
        aten.cat.default, aten.stack.default, aten.embedding.default, aten.constant_pad_nd.default, aten.pad.default,
        aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.view.default, aten._unsafe_view.default,
        aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.t.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default,
        aten.repeat.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
        aten.chunk.default, aten.unbind.int, aten.flip.default, aten.index.Tensor, aten.index_select.default,
        aten.gather.default, aten.full.default, aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
        aten.scalar_tensor.default, aten.arange.start_step, operator.getitem,
    }
)  # fmt: skip

#: The storage type of codes, by the name of the torch type.
TYPES = {"torch.uint8": ir.DataType.UINT8, "torch.int8": ir.DataType.INT8}


def hide(program: Program) -> None:
    """Puts an opaque node in the place of every `gw::` op of an integer program, so that PyTorch's exporter leaves them whole.

    Raises:
        UnsupportedOpError: an op whose result no ONNX operators fix to the bit.
    """
    for node in [n for n in program.nodes if n.op == "call_function"]:
        if getattr(node.target, "namespace", None) == "gw":
            name = node.target._schema.name.removeprefix("gw::")  # type: ignore[union-attr]
            if name not in RULES:
                raise _refusal(node, "has no exact form in ONNX")
            node.args = (node.target, *node.args)  # type: ignore[assignment]
            node.target = _opaque
        elif _is_float(node):
            if node.target not in EXACT_FLOAT:
                raise _refusal(node, "computes floats in an order that ONNX does not define")
            if node.kwargs.get("alpha", 1) != 1:
                raise _refusal(node, "multiplies its second operand (alpha)")


def _refusal(node: fx.Node, why: str) -> UnsupportedOpError:
    way_out = "export the annotated program (standard QDQ), or keep the op out of float"
    return UnsupportedOpError(f"'{node.name}' ({node.target}, from {origin_of(node)}) {why}; {way_out}")


def _is_float(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and v.dtype.is_floating_point for v in leaves)


def _opaque(op: Any, *args: Any) -> torch.Tensor:
    """Stands for `op(*args)` while torch traces: tensors are its inputs, everything else its attributes."""
    like = op(*args)
    tensors: list[torch.Tensor | None] = []
    attributes: dict[str, Any] = {}
    for argument, value in zip(op._schema.arguments, args, strict=True):
        if isinstance(value, torch.Tensor) or value is None:
            tensors.append(value)
        else:
            attributes[argument.name] = str(value) if isinstance(value, torch.dtype) else value
    first = next(t for t in tensors if t is not None)
    attributes["extents"] = [d if isinstance(d, int) else -1 for d in first.shape]
    name = op._schema.name.removeprefix("gw::")
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", tensors, attributes, dtype=like.dtype, shape=like.shape, version=1)


def lower(model: ir.Model) -> None:
    """Writes every opaque node out."""
    writer = Writer(model.graph)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            RULES[node.op_type](writer, Call(node))
            replace(model.graph, node, writer.take())
    model.opset_imports.pop(DOMAIN, None)
    model.functions.clear()


class Call:
    """An opaque node: `call[i]` are its tensors, `call.given(i)` those that may be missing, `call.name` its attributes."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.attributes = {key: attribute.value for key, attribute in node.attributes.items()}

    def given(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def __getitem__(self, index: int) -> ir.Value:
        value = self.given(index)
        assert value is not None, f"'{self.node.op_type}' has no input {index}"
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return self.attributes[name]
        except KeyError:
            raise AttributeError(name) from None

    def constant(self, index: int) -> np.ndarray:
        value = self[index].const_value
        if value is None:
            raise UnsupportedOpError(f"input {index} of '{self.node.op_type}' is no constant of the program")
        return value.numpy()

    @property
    def rank(self) -> int:
        return len(self.extents)


Rule = Callable[[Writer, Call], Any]


# -- region edges --------------------------------------------------------------------------------------------------------------


def _to_codes(w: Writer, steps: ir.Value, c: Call) -> ir.Value:
    """round_half_even(clamp(steps, qmin - z, qmax - z)) + z. QuantizeLinear clamps to the range of its type by itself."""
    dtype = TYPES[c.dtype]
    zero, info = c.zero_point, np.iinfo(dtype.numpy())
    if (c.qmin, c.qmax) != (info.min, info.max):
        steps = w.Clip(steps, float(c.qmin - zero), float(c.qmax - zero))
    return w.QuantizeLinear(steps, 1.0, w.constant(zero, dtype.numpy().type))


def _quantize(w: Writer, c: Call) -> ir.Value:
    return _to_codes(w, w.Mul(c[0], float(np.float32(1) / np.float32(c.scale))), c)


def _dequantize(w: Writer, c: Call) -> ir.Value:
    return w.DequantizeLinear(c[0], float(c.scale), _zero(w, c[0], c.zero_point))


def _zero(w: Writer, x: ir.Value, zero: int) -> ir.Value:
    return w.constant(zero, _dtype(x).numpy().type)


def _dtype(x: ir.Value) -> ir.DataType:
    assert x.dtype is not None
    return x.dtype


# -- products ------------------------------------------------------------------------------------------------------------------


def _linear(w: Writer, c: Call) -> ir.Value:
    product = w.MatMulInteger(c[0], c.constant(1).T, _zero(w, c[0], c.zero_point))
    return product if c.given(2) is None else w.Add(product, c[2])


def _matmul(w: Writer, c: Call) -> ir.Value:
    return w.MatMulInteger(c[0], c[1], _zero(w, c[0], c.a_zero_point), _zero(w, c[1], c.b_zero_point))


def _convolution(w: Writer, c: Call) -> ir.Value:
    product = _convolve(w, c, c.constant(1), list(c.stride), list(c.padding), list(c.dilation), c.groups)
    return product if c.given(2) is None else w.Add(product, c.constant(2).reshape(-1, *[1] * (c.rank - 2)))


def _sum_pool(w: Writer, c: Call) -> ir.Value:
    channels = c.extents[1]
    ones = np.ones((channels, 1, *c.kernel), dtype=np.int8)
    return _convolve(w, c, ones, list(c.stride), list(c.padding), [1] * len(c.kernel), channels)


def _convolve(w: Writer, c: Call, weight: np.ndarray, stride: list[int], padding: list[int], dilation: list[int], groups: int):
    attributes = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
    return w.ConvInteger(c[0], weight, _zero(w, c[0], c.zero_point), **attributes)


def _multiply(w: Writer, c: Call) -> ir.Value:
    return w.Mul(_centred(w, c[0], c.a_zero_point), _centred(w, c[1], c.b_zero_point))


def _centred(w: Writer, x: ir.Value, zero: int) -> ir.Value:
    return w.Sub(w.cast(x, ir.DataType.INT32), w.constant(zero, np.int32))


def _sum(w: Writer, c: Call) -> ir.Value:
    return w.ReduceSum(_centred(w, c[0], c.zero_point), np.array(c.dims), keepdims=int(c.keepdim))


# -- what becomes of a sum -----------------------------------------------------------------------------------------------------


def _along(values: np.ndarray, c: Call) -> np.ndarray:
    """A vector so that it broadcasts along the call's axis; one value as a scalar."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if d == c.axis % c.rank else 1 for d in range(c.rank)])


def _scale(w: Writer, c: Call) -> ir.Value:
    return w.Mul(w.cast(c[0], ir.DataType.FLOAT), _along(c.constant(1), c))


def _rescale(w: Writer, c: Call) -> ir.Value:
    return _to_codes(w, _scale(w, c), c)


def _rescale_dyadic(w: Writer, c: Call) -> ir.Value:
    """64-bit integers throughout; total >> shift is (total - total mod 2^shift) / 2^shift."""
    multiplier, shift = (_along(c.constant(i), c).astype(np.int64) for i in (1, 2))
    one = np.ones_like(shift)
    total = w.Add(w.Mul(w.cast(c[0], ir.DataType.INT64), multiplier), one << (shift - 1))
    steps = w.Div(w.Sub(total, w.Mod(total, one << shift)), one << shift)
    return _limited(w, w.Add(steps, w.constant(c.zero_point, np.int64)), c, np.int64)


def _add(w: Writer, c: Call) -> ir.Value:
    """In float64, where every step is exact: s32 sums, and a shift is a product with a power of two and a floor."""
    parts = []
    for x, multiplier in ((c[0], c.a_multiplier), (c[1], c.b_multiplier)):
        parts.append(w.Mul(w.cast(x, ir.DataType.DOUBLE), w.constant(multiplier, np.float64)))
    rest = (1 << (c.shift - 1)) - c.a_zero_point * c.a_multiplier - c.b_zero_point * c.b_multiplier
    total = w.Add(w.Add(*parts), w.constant(rest, np.float64))
    steps = w.Floor(w.Mul(total, w.constant(2.0**-c.shift, np.float64)))
    return _limited(w, w.Add(steps, w.constant(c.zero_point, np.float64)), c, np.float64)


def _limited(w: Writer, codes: ir.Value, c: Call, dtype: type[np.generic]) -> ir.Value:
    return w.cast(w.Clip(codes, w.constant(c.qmin, dtype), w.constant(c.qmax, dtype)), TYPES[c.dtype])


# -- tables and windows --------------------------------------------------------------------------------------------------------


def _lookup(w: Writer, c: Call) -> ir.Value:
    index = w.cast(c[0], ir.DataType.INT32)
    if _dtype(c[0]) == ir.DataType.INT8:
        index = w.Add(index, w.constant(128, np.int32))
    return w.Gather(c[1], index, axis=0)


def _max_pool(w: Writer, c: Call) -> ir.Value:
    attributes = {"kernel_shape": c.kernel, "strides": c.stride, "pads": [*c.padding] * 2, "dilations": c.dilation}
    return w.MaxPool(c[0], **attributes, ceil_mode=int(c.ceil_mode))


# -- float islands -------------------------------------------------------------------------------------------------------------


def _softmax(w: Writer, c: Call) -> ir.Value:
    return islands.softmax(w, c[0], c.extents)


def _layer_norm(w: Writer, c: Call) -> ir.Value:
    return islands.layer_norm(w, c[0], c[1], c[2], c.eps, c.extents)


def _reduce_sum(w: Writer, c: Call) -> ir.Value:
    return islands.reduce_sum(w, c[0], c.dim, bool(c.keepdim), c.extents)


def _square_root(w: Writer, c: Call) -> ir.Value:
    return islands.square_root(w, c[0])


RULES: dict[str, Rule] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "linear": _linear,
    "matmul": _matmul,
    "convolution": _convolution,
    "multiply": _multiply,
    "sum": _sum,
    "sum_pool2d": _sum_pool,
    "scale": _scale,
    "rescale": _rescale,
    "rescale_dyadic": _rescale_dyadic,
    "add": _add,
    "lookup": _lookup,
    "max_pool2d": _max_pool,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "reduce_sum": _reduce_sum,
    "square_root": _square_root,
}
