"""Float layers with a designed kernel: convolution, linear, matmul, with the addition and the activation that follow a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.program import HALF, dtype_of, shape_of, single_user
from ..kernels import (
    activation_f32,
    coded_f32,
    convolution_f32,
    decode_rows,
    depthwise_f32,
    layer_norm_f32,
    linear_f32,
    matmul_f32,
    softmax_f32,
    sparse_f32,
)
from ..kernels.base import LANES, Convolution
from ..kernels.convolution_f32 import pack_bias
from ..kernels.float_base import NO_ACTIVATION, RELU, RELU6, Activation, FloatSpec, MatrixProduct
from ..lower import Lowering, rule, unsupported
from ..values import DTYPES, SUFFIXES, Expr, arguments, of_node, shape_of_var
from .attention_float import lower_float_attention
from .bitmask import sparse_weight, stored
from .coded import CodedWeight, coded_weight
from .codes_fp8 import emit_end, multiplies_fp8
from .generic import fallback
from .operands import matmul_operands, planar, without_frame

aten = torch.ops.aten

#: Activations without options.
ACTIVATIONS: dict[Any, Activation] = {
    aten.relu.default: RELU,
    aten.relu6.default: RELU6,
    aten.sigmoid.default: Activation(function="sigmoid"),
    aten.silu.default: Activation(function="silu"),
    aten.tanh.default: Activation(function="tanh"),
    aten.exp.default: Activation(function="exp"),
    aten.hardsigmoid.default: Activation(function="hardsigmoid"),
    aten.hardswish.default: Activation(function="hardswish"),
}
GELU = {"none": Activation(function="gelu"), "tanh": Activation(function="gelu_tanh")}


def activation_of(node: fx.Node) -> Activation | None:
    """What a kernel does in the place of `node`; None where it is no activation that a kernel knows."""
    if node.target in ACTIVATIONS:
        return ACTIVATIONS[node.target]
    if node.target is aten.gelu.default:
        return GELU[node.kwargs.get("approximate", "none")]  # type: ignore[index]
    if node.target in (aten.clamp.default, aten.hardtanh.default) and len(arguments(node)) == 3:
        low, high = arguments(node)[1:]
        if all(v is None or isinstance(v, (int, float)) for v in (low, high)):
            return Activation(None if low is None else float(low), None if high is None else float(high))
    return None


@dataclass(frozen=True)
class Finish:
    """How a layer's kernel finishes: the nodes it covers, the layer first, and the tensor it adds before the activation."""

    spec: FloatSpec
    nodes: tuple[fx.Node, ...]
    residual: fx.Node | None = None


def finish(lowering: Lowering, node: fx.Node) -> Finish:
    """Takes in a residual addition and an activation that alone read `node`. Integer programs round after every op: nothing."""
    dtype = DTYPES[dtype_of(node)]
    found = Finish(FloatSpec(level=lowering.layer_level(dtype), dtype=dtype, dot=lowering.dots(dtype)), (node,))
    reader = single_user(node)
    if reader is None or lowering.integer:
        return found
    if reader.target is aten.add.Tensor and not reader.kwargs:
        a, b = arguments(reader)
        other = b if a is node else a
        if isinstance(other, fx.Node) and other is not node and _same_type(other, node) and lowering.lowered(other):
            found = Finish(replace(found.spec, residual=True), (node, reader), other)
            reader = single_user(reader)
    activation = None if reader is None else activation_of(reader)
    if activation is None or reader is None:
        return found
    return replace(found, spec=replace(found.spec, activation=activation), nodes=(*found.nodes, reader))


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    return shape_of(a) == shape_of(b) and common_type(a, b) is not None


def _stored(lowering: Lowering, argument: Any) -> np.ndarray | None:
    """A parameter; half precision widened, which packing takes back."""
    tensor = lowering.program.parameter(argument)
    if tensor is None:
        return None
    return (tensor.float() if tensor.dtype in HALF else tensor).detach().cpu().numpy()


def _is_float32(*nodes: Any) -> bool:
    return all(DTYPES[n.meta["val"].dtype] == "float32" for n in nodes)


def common_type(*nodes: fx.Node) -> str | None:
    """The one type of all, where float kernels know it."""
    types = {DTYPES[dtype_of(n)] for n in nodes}
    return types.pop() if len(types) == 1 and types <= SUFFIXES.keys() else None


def label(family: str, dtype: str) -> str:
    """Name of a kernel in the library: `linear_f32`, `linear_bf16`."""
    return f"{family}_{SUFFIXES[dtype]}"


def _packed(pack: Any, *given: Any, spec: FloatSpec) -> np.ndarray:
    """What goes beyond float32 is asked for by name: families of other targets may not know it."""
    chained = {"chained": True} if spec.chained else {}
    return pack(*given) if spec.dtype == "float32" else pack(*given, dtype=spec.dtype, **chained)


def _weight(lowering: Lowering, argument: Any) -> np.ndarray | CodedWeight | None:
    """A layer's weight, stored as it is, without its zeros, or as codes of a table; None where it is no constant."""
    values = _stored(lowering, argument)
    values = sparse_weight(lowering, argument) if values is None else values
    return coded_weight(lowering, argument) if values is None else values


def _planar(lowering: Lowering, node: fx.Node) -> Convolution | None:
    """The convolution that a designed kernel computes; None where it is left to the generic lowering."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments(node)
    if transposed or common_type(x, weight) is None or (bias is not None and _stored(lowering, bias) is None):
        return None
    found = planar(shape_of(x), shape_of(weight), stride, padding, dilation, groups)
    banded = found is not None and found.groups > 1 and not found.depthwise
    constant = _weight(lowering, weight)
    return None if constant is None or (banded and isinstance(constant, CodedWeight)) else found


def takes_compressed(lowering: Lowering, node: fx.Node, weight: fx.Node) -> bool:
    """Whether a designed kernel of the layer `node` reads `weight`, a `gw::decode` or `gw::from_bitmask` of constants."""
    if _weight(lowering, weight) is None or [a for a in node.all_input_nodes if a is weight] != [weight]:
        return False
    if node.target is aten.convolution.default:
        return arguments(node)[1] is weight and _planar(lowering, node) is not None
    x, second, bias = (*arguments(node), None)[:3]
    readable = bias is None or _stored(lowering, bias) is not None
    return node.target is aten.linear.default and second is weight and readable and _is_float32(x, node)


@rule(gw.from_bitmask.default)
def from_bitmask(lowering: Lowering, node: fx.Node) -> None:
    """Nothing is emitted where every reader is a layer whose kernel takes the weight in its own order."""
    integer = (gw.convolution.default, gw.linear.default)
    if all(user.target in integer or takes_compressed(lowering, user, node) for user in node.users):
        lowering.bind(node, [])
        return
    values = sparse_weight(lowering, node)
    if values is None:
        raise unsupported(node, "it is no weight of float32 or s8 parameters; run compress-sparse as the last pass")
    lowering.bind(node, of_node(node, dense=stored(lowering, node, values)))


@rule(gw.decode.default)
def decode(lowering: Lowering, node: fx.Node) -> None:
    """Nothing is emitted where every reader has a kernel that takes codes."""
    if all(takes_compressed(lowering, user, node) for user in node.users):
        lowering.bind(node, [])
        return
    packed, bits, shape, table, scale, group, *zero = arguments(node)
    rows, count = int(shape[0]), prod(shape[1:])
    spec = rows, count, bits, group, shape_of(table)[0], bool(zero)
    inputs = [lowering.dense(n) for n in (packed, table, scale, *zero)]
    out = lowering.kernel(decode_rows.decode_rows, *spec, inputs=inputs, nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(aten.convolution.default)
def convolution(lowering: Lowering, node: fx.Node) -> None:
    shape = _planar(lowering, node)
    if shape is None:
        fallback(lowering, node)
        return
    x, weight, bias, *_ = arguments(node)
    x, shape = without_frame(lowering, x, shape, 0.0)
    done = finish(lowering, node)
    if shape.depthwise and not depthwise_f32.chains(shape):
        done = replace(done, spec=replace(done.spec, level=lowering.level(done.spec.dtype)))
    residual = [] if done.residual is None else [lowering.channels(done.residual)]
    packed = _convolution_weight(lowering, weight, shape, done.spec)
    if shape.depthwise:
        generator, family = depthwise_f32.depthwise, "depthwise"
        options, source = [shape, done.spec], lowering.channels(x)
    else:
        generator, family = convolution_f32.convolution, "convolution"
        # The image a network is given is planar, with few channels: a first layer reads it as it is.
        planar_input = shape.channels <= LANES and not lowering.is_channels(x) and len(x.users) == 1
        source = _rows(lowering, x, done.spec) if planar_input else lowering.channels(x)
        options = [shape, done.spec, planar_input]
    inputs = [source, *residual, packed, pack_bias(shape.filters, _stored(lowering, bias))]
    given = {"macs": shape.macs, "label": label(family, done.spec.dtype)}
    emit_end(lowering, generator, options, done.nodes, inputs, "channels", **given)


def _convolution_weight(lowering: Lowering, node: fx.Node, shape: Convolution, spec: FloatSpec) -> Expr | np.ndarray:
    weight = _weight(lowering, node)
    assert weight is not None
    if isinstance(weight, CodedWeight):
        return weight.panels(lowering, taps=prod(shape.kernel))
    kernel = weight.reshape(shape.filters, -1, *shape.kernel)
    family = lowering.family(depthwise_f32 if shape.depthwise else convolution_f32)
    return stored(lowering, node, _packed(family.pack_weight, shape, kernel, spec=spec))


@rule(aten.linear.default)
def linear(lowering: Lowering, node: fx.Node) -> None:
    x, weight, bias = (*arguments(node), None)[:3]
    _linear(lowering, node, x, _weight(lowering, weight), bias, weight)


@rule(gw.sparse_linear.default)
def sparse_linear(lowering: Lowering, node: fx.Node) -> None:
    x, start, columns, values = arguments(node)
    if any(_stored(lowering, n) is None for n in (start, columns, values)) or not _is_float32(x, node):
        fallback(lowering, node)
        return
    rows, entries = prod(shape_of(x)[:-1]), shape_of(values)[0]
    types = tuple(DTYPES[n.meta["val"].dtype] for n in (columns, values))
    spec = rows, shape_of(x)[-1], shape_of(node)[-1], entries, *types
    inputs = [lowering.dense(n) for n in (x, start, columns, values)]
    options = {"nodes": (node,), "macs": rows * entries, "label": "sparse_f32"}
    out = lowering.kernel(sparse_f32.sparse_linear, *spec, inputs=inputs, **options)
    lowering.bind(node, of_node(node, dense=out))


@rule(aten.addmm.default)
def addmm(lowering: Lowering, node: fx.Node) -> None:
    bias, x, weight = arguments(node)
    matrix = _stored(lowering, weight)
    plain = not node.kwargs and len(shape_of(bias)) == 1
    _linear(lowering, node, x, matrix.T if matrix is not None and plain else None, bias)


def _linear(
    lowering: Lowering, node: fx.Node, x: Any, matrix: np.ndarray | CodedWeight | None, bias: Any, source: fx.Node | None = None
) -> None:
    """source: the node of a weight that may be compressed."""
    offset = _stored(lowering, bias)
    if matrix is None or common_type(x, node) is None or (bias is not None and offset is None):
        fallback(lowering, node)
        return
    outputs, inputs = matrix.shape
    if offset is not None and offset.size == 1:
        offset = np.full(outputs, offset.reshape(()))
    done = finish(lowering, node)
    shape = MatrixProduct(prod(shape_of(x)[:-1]), inputs, outputs)
    residual = [] if done.residual is None else [lowering.dense(done.residual)]
    generator, spec, weights = _product(lowering, shape, matrix, source, done.spec)
    operands = [_rows(lowering, x, done.spec), *residual, *weights, pack_bias(outputs, offset)]
    family = generator.__module__.rpartition(".")[2].removesuffix("_f32")
    options = {"nodes": done.nodes, "macs": shape.macs, "label": label(family, done.spec.dtype)}
    out = lowering.kernel(generator, *spec, done.spec, inputs=operands, **options)
    lowering.bind_all(done.nodes, of_node(done.nodes[-1], dense=out))


def _rows(lowering: Lowering, x: fx.Node, spec: FloatSpec) -> Expr:
    """The dense form, for a product: half precision is read in vectors that may end past the last row."""
    var = lowering.dense(x)
    return var if spec.dtype == "float32" else lowering.with_slack(var)


def _product(
    lowering: Lowering, shape: MatrixProduct, matrix: np.ndarray | CodedWeight, source: fx.Node | None, spec: FloatSpec
) -> tuple[Any, tuple[Any, ...], list[Any]]:
    """(generator, its specification, the weight's buffers) of a linear layer."""
    if isinstance(matrix, np.ndarray):
        packed = _packed(lowering.family(linear_f32).pack_weight, matrix, spec=spec)
        return linear_f32.linear, (shape,), [stored(lowering, source, packed)]
    coded = matrix.coded(lowering.float_level)
    if coded_f32.fuses(shape.rows, coded):
        return coded_f32.linear, (shape, coded), matrix.buffers(coded)
    return linear_f32.linear, (shape,), [matrix.panels(lowering)]


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(lowering: Lowering, node: fx.Node) -> None:
    if node.target is not aten.mm.default and lower_float_attention(lowering, node):
        return
    a, b = arguments(node)
    matrix = _stored(lowering, b)
    if matrix is not None and matrix.ndim == 2 and _stored(lowering, a) is None:
        _linear(lowering, node, a, matrix.T, None)
        return
    operands = matmul_operands(a, b) if common_type(a, b) is not None else None
    if operands is None:
        fallback(lowering, node)
        return
    batch, rows, inner, columns, source, transposed = operands
    done = finish(lowering, node)
    shape = MatrixProduct(rows, inner, columns, batch, transposed)
    residual = [] if done.residual is None else [lowering.dense(done.residual)]
    inputs = [_rows(lowering, a, done.spec), *residual, lowering.dense(source)]
    options = {"nodes": done.nodes, "macs": shape.macs, "label": label("matmul", done.spec.dtype)}
    out = lowering.kernel(matmul_f32.matmul, shape, done.spec, inputs=inputs, **options)
    lowering.bind_all(done.nodes, of_node(done.nodes[-1], dense=out))


@rule(*ACTIVATIONS, aten.gelu.default)
def activation(lowering: Lowering, node: fx.Node) -> None:
    """A clamp and every activation of an integer program (which must round as torch does) are left to the generic lowering."""
    x, found = arguments(node)[0], activation_of(node)
    dtype = common_type(x)
    # A half-precision clamp, too: TVM's own loops widen and round element by element.
    designed = found is not None and dtype is not None and (found.function is not None or dtype != "float32")
    if lowering.integer or found is None or dtype is None or not designed:
        fallback(lowering, node)
        return
    _map(lowering, node, x, found, (dtype, dtype))


@rule(aten._to_copy.default)
def cast(lowering: Lowering, node: fx.Node) -> None:
    """Between float32 and half precision, in the layout the value has; other casts are generic."""
    x = arguments(node)[0]
    source, target = common_type(x), common_type(node)
    if lowering.integer or source is None or target is None or source == target:
        fallback(lowering, node)
        return
    _map(lowering, node, x, NO_ACTIVATION, (source, target))


def _map(lowering: Lowering, node: fx.Node, x: fx.Node, function: Activation, types: tuple[str, str]) -> None:
    place = "channels" if lowering.is_channels(x) else "dense"
    var = lowering.channels(x) if place == "channels" else lowering.dense(x)
    shape = shape_of_var(var)
    half = next((dtype for dtype in types if dtype != "float32"), None)
    spec = (types, lowering.level(half)) if half else ()
    name = label("cast" if types[0] != types[1] else "activation", half or "float32")
    out = lowering.kernel(activation_f32.activation, prod(shape), function, *spec, inputs=[var], nodes=(node,), label=name)
    lowering.bind(node, of_node(node, **{place: lowering.reshape(out, shape)}))


@rule(aten.softmax.int, aten._softmax.default)
def softmax(lowering: Lowering, node: fx.Node) -> None:
    x, dim, *_ = arguments(node)
    shape = shape_of(node)
    if lowering.integer or not shape or int(dim) % len(shape) != len(shape) - 1 or (dtype := common_type(x, node)) is None:
        fallback(lowering, node)
        return
    rows, inputs = prod(shape[:-1]), [lowering.dense(x)]
    spec = rows, shape[-1], *_half_options(lowering, dtype)
    out = lowering.kernel(softmax_f32.softmax, *spec, inputs=inputs, nodes=(node,), label=label("softmax", dtype))
    lowering.bind(node, of_node(node, dense=out))


@rule(aten.layer_norm.default)
def layer_norm(lowering: Lowering, node: fx.Node) -> None:
    given: list[Any] = list(arguments(node))
    defaults: list[Any] = [None, None, 1e-5]
    x, normalized, weight, bias, eps, *_ = given + defaults[len(given) - 2 :]
    dtype = common_type(x)
    if lowering.integer or dtype is None or (normalized and list(normalized) != list(shape_of(x)[-len(normalized) :])):
        fallback(lowering, node)
        return
    length = prod(normalized)
    inputs = [lowering.dense(x), _affine(lowering, weight, length, 1.0), _affine(lowering, bias, length, 0.0)]
    spec = [prod(shape_of(x)) // length, length, float(eps), *_half_options(lowering, dtype)]
    emit_end(lowering, layer_norm_f32.layer_norm, spec, (node,), inputs, "dense", label=label("layer_norm", dtype))


def _affine(lowering: Lowering, parameter: fx.Node | None, length: int, fill: float) -> Expr | np.ndarray:
    if parameter is None:
        return np.full(length, fill, np.float32)
    values = _stored(lowering, parameter)
    return lowering.dense(parameter) if values is None or dtype_of(parameter) not in HALF else values


def _half_options(lowering: Lowering, dtype: str) -> tuple[Any, ...]:
    """What a kernel is told beyond its float32 specification: on a target whose kernels know more types than that, always."""
    return () if dtype == "float32" and not multiplies_fp8(lowering) else (dtype, lowering.level(dtype))
