"""Everything without a designed kernel: TVM's own converter for one node at a time, in the breadth of its table.

Each op stays a function of its own (the pipeline runs no fusion pass): LLVM contracts a * b + c within a function, and a float
island inside an integer program must round after every op, as torch does.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from ....ir.program import shape_of
from ..lower import Lowering, rule, unsupported
from ..values import DTYPES, Expr, Value, arguments, dtype_of_var, of_node, shape_of_var
from . import maps

aten = torch.ops.aten

#: Maps of one tensor, element by element: they run on any layout.
UNARY = frozenset(
    {
        aten.abs.default, aten.ceil.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
        aten.cos.default, aten.elu.default, aten.erf.default, aten.exp.default, aten.floor.default, aten.gelu.default,
        aten.hardsigmoid.default, aten.hardswish.default, aten.hardtanh.default, aten.leaky_relu.default, aten.log.default,
        aten.log1p.default, aten.neg.default, aten.reciprocal.default, aten.relu.default, aten.relu6.default,
        aten.rsqrt.default, aten.sigmoid.default, aten.silu.default, aten.sin.default, aten.softplus.default,
        aten.sqrt.default, aten.tanh.default, aten.pow.Tensor_Scalar, aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar,
        aten.div.Scalar,
    }
)  # fmt: skip

#: Maps of two tensors of one shape, or of a tensor and a number.
BINARY = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default}
)

#: Ops that only move data; exact in every program.
MOVES = frozenset(
    {
        aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.select.int, aten.expand.default, aten.cat.default,
        aten.stack.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
        aten.constant_pad_nd.default, aten.pad.default, aten.repeat.default, aten.flip.default, aten.index_select.default,
        aten.embedding.default, aten.gather.default, aten.roll.default,
    }
)  # fmt: skip


#: Reductions that TVM's table lacks. The largest of numbers is the same in any order; what becomes of NaN depends on the target.
EXTREMES: dict[Any, Any] = {aten.amax.default: relax.op.max, aten.amin.default: relax.op.min}


class NodeImporter(ExportedProgramImporter):
    """TVM's table of converters, applied to one node whose inputs are Relax variables already."""

    def convert(self, builder: relax.BlockBuilder, node: fx.Node, inputs: dict[fx.Node, Expr]):
        self.block_builder = builder
        self.env = inputs
        return self.convert_map[op_name(node)](node)


def op_name(node: fx.Node) -> str:
    """An op as TVM's table names it, such as `add.Tensor`."""
    return getattr(node.target, "__name__", "")


def fallback(lowering: Lowering, node: fx.Node) -> None:
    if maps.take(lowering, node):
        return
    importer = NodeImporter()
    name = op_name(node)
    if name not in importer.convert_map:
        _expand(lowering, node)
        return
    place = "channels" if _any_layout(lowering, node) else "dense"
    read = lowering.channels if place == "channels" else lowering.dense
    inputs = {n: read(n) for n in node.all_input_nodes}
    try:
        result = importer.convert(lowering.builder, node, inputs)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise unsupported(node, f"TVM's converter rejects it: {reason}") from error
    results = _results(lowering, result)
    expected = node.meta["val"]
    tensors = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    if len(results) < len(tensors) and any(arguments(user)[1] >= len(results) for user in node.users):
        raise unsupported(node, f"TVM's converter gives {len(results)} of its {len(tensors)} results, and others are read")
    values = []
    for var, tensor in zip(results, tensors, strict=False):
        values.append(_checked(lowering, node, var, tensor, place))
    lowering.record(name, (node,), _kind(lowering, node), [*inputs.values(), *results])
    lowering.bind(node, values if isinstance(expected, (tuple, list)) else values[0])


@rule(*EXTREMES)
def extreme(lowering: Lowering, node: fx.Node) -> None:
    """The largest or smallest element along axes, of all of them where none is named."""
    x, *rest = arguments(node)
    axes, keepdim = list(rest[0]) if rest else [], bool(rest[1:] and rest[1])
    source = lowering.dense(x)
    out = lowering.builder.emit(EXTREMES[node.target](source, axis=axes or None, keepdims=keepdim))
    lowering.record(op_name(node), (node,), _kind(lowering, node), [source, out])
    lowering.bind(node, of_node(node, dense=out))


@functools.cache
def _decompositions() -> dict[Any, Any]:
    return torch._decomp.core_aten_decompositions()  # type: ignore[return-value]


def _expand(lowering: Lowering, node: fx.Node) -> None:
    """Lowers an op that TVM's table lacks as the simpler ops torch defines it by."""
    if node.target not in _decompositions():
        raise unsupported(
            node, "it has no designed kernel, no entry in TVM's converter table, and torch defines it by nothing simpler"
        )
    tensors = node.all_input_nodes

    def call(*values: torch.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)  # type: ignore[misc]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    simpler = make_fx(call, decomposition_table=_decompositions())(*(n.meta["val"] for n in tensors))
    inner = [n for n in simpler.graph.nodes if n.op == "call_function"]
    if any(n.target is node.target for n in inner):
        raise unsupported(node, "torch defines it by itself")
    first = len(lowering.rows)
    lowering.inline(simpler, dict(zip(simpler.graph.find_nodes(op="placeholder"), tensors, strict=True)))
    (returned,) = simpler.graph.output_node().args
    several = isinstance(returned, (tuple, list))
    results: Any = [lowering.value(n) for n in returned] if several else lowering.value(returned)  # type: ignore[arg-type]
    lowering.bind(node, results)
    lowering.rows[first:] = [replace(row, nodes=(node.name,)) for row in lowering.rows[first:]]


def _kind(lowering: Lowering, node: fx.Node) -> str:
    return "generic" if node.target in MOVES or not lowering.integer else "island"


def _any_layout(lowering: Lowering, node: fx.Node) -> bool:
    """Whether an element-wise op may run on the Channels form of its inputs as they stand."""
    tensors = node.all_input_nodes
    if node.target not in UNARY | BINARY or len(shape_of(node)) < 3 or not any(lowering.is_channels(n) for n in tensors):
        return False
    if node.target in UNARY:
        return len(tensors) == 1
    return all(_aligned(shape_of(n), shape_of(node)) for n in tensors)


def _aligned(shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether a tensor broadcasts to `out` along spatial axes only, so that it also does as [N, H, W, Cp]."""
    return shape == out or (len(shape) == len(out) == 4 and shape[1] == out[1] and set(shape[2:]) == {1})


def _results(lowering: Lowering, result: Any) -> list[Expr]:
    if isinstance(result, (tuple, list)):
        return list(result)
    if isinstance(result.ty, relax.TupleType):
        fields: Any = result.ty
        return [lowering.builder.emit(relax.TupleGetItem(result, i)) for i in range(len(fields.fields))]
    return [result]


def _checked(lowering: Lowering, node: fx.Node, var: Expr, tensor: torch.Tensor, place: str) -> Value:
    shape, dtype = tuple(tensor.shape), DTYPES[tensor.dtype]
    if place == "dense" and shape_of_var(var) != shape:
        raise unsupported(node, f"TVM's converter gives shape {shape_of_var(var)}, torch gives {shape}")
    if dtype_of_var(var) != dtype:
        raise unsupported(node, f"TVM's converter gives {dtype_of_var(var)}, torch gives {dtype}")
    return Value(shape, dtype, channels=var) if place == "channels" else Value(shape, dtype, dense=var)
