"""remove-no-ops: drops calls that return one of their inputs unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.errors import PassError
from ...ir.program import Program, origin_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import all_equal, argument, aten, is_call, is_tensor, operands, reshape_arguments, same_type, substitute

COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
)
#: Ops that keep their input when they keep its shape.
RESHAPES = (
    aten.reshape.default,
    aten.expand.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.repeat.default,
)
#: Forms of reshape that depend on strides, which a program does not promise.
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)
ADDITIONS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@register
@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Drops copies, dropout at inference, identity reshapes, permutes, pads and casts, x + 0 and x * 1.

        %b = aten.clone(%a);  %c = aten.mul(%b, 1)          ->  %a
        %b = aten.view(%a, [2, -1])                         ->  %b = aten.reshape(%a, [2, -1])

    Shapes and dtypes of every remaining value are unchanged. `view` becomes `reshape` because a copy that goes may have been
    what made the strides fit.

    Raises:
        PassError: dropout with training=True, which is random and cannot be an inference no-op.
    """

    name = "remove-no-ops"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        reshaped = sum(_view_to_reshape(program, node) for node in list(program.nodes))
        removed = 0
        for node in list(program.nodes):
            source = _source(program, node)
            if source is not None:
                substitute(program, node, source)
                removed += 1
        return PassResult(program, bool(removed or reshaped), {"removed": removed, "views": reshaped})


def _view_to_reshape(program: Program, node: fx.Node) -> bool:
    if not is_call(node, *VIEWS):
        return False
    shape = reshape_arguments(node) if node.target is aten.flatten.using_ints else node.args[1]
    if shape is None:
        return False
    substitute(program, node, program.insert(aten.reshape.default, (node.args[0], shape), node))
    return True


def _source(program: Program, node: fx.Node) -> fx.Node | None:
    """The input a call returns unchanged, or None."""
    if node.op != "call_function":
        return None
    source = _identity(program, node)
    return source if source is not None and is_tensor(source) and same_type(source, node) else None


def _identity(program: Program, node: fx.Node) -> fx.Node | None:
    """An input that equals the result wherever shape and dtype agree too."""
    target, x = node.target, node.args[0] if node.args else None
    if target in COPIES or (is_call(node, *RESHAPES) and argument(node, 4, "step", 1) == 1):
        return x  # type: ignore[return-value]
    if target is aten.dropout.default:
        return _dropout(node)
    if target is aten.permute.default:
        dims = node.args[1]
        return x if [d % len(dims) for d in dims] == list(range(len(dims))) else None  # type: ignore[return-value, arg-type]
    if target is aten.transpose.int:
        rank = node.meta["val"].dim()
        return x if node.args[1] % rank == node.args[2] % rank else None  # type: ignore[return-value, operator]
    if target in (aten.constant_pad_nd.default, aten.pad.default):
        return x if not any(node.args[1]) else None  # type: ignore[return-value, arg-type]
    if target is aten.cat.default:
        return x[0] if len(x) == 1 else None  # type: ignore[return-value, index, arg-type]
    if target is aten.pow.Tensor_Scalar:
        return x if node.args[1] == 1 else None  # type: ignore[return-value]
    return _arithmetic(program, node)


def _dropout(node: fx.Node) -> fx.Node | None:
    if node.args[2] and node.args[1] != 0:
        raise PassError(
            f"dropout at '{node.name}' (from {origin_of(node)}) runs with training=True, so the model is random at inference; "
            "call it with training=self.training and capture the model again"
        )
    return node.args[0]  # type: ignore[return-value]


def _arithmetic(program: Program, node: fx.Node) -> fx.Node | None:
    if node.target in ADDITIONS:
        neutral, scaled = 0, argument(node, 2, "alpha", 1) != 1
        commutes = node.target is aten.add.Tensor and not scaled
    elif node.target in PRODUCTS:
        neutral, commutes = 1, node.target is aten.mul.Tensor
    else:
        return None
    a, b = operands(node)
    if all_equal(program, b, neutral):
        return a
    return b if commutes and all_equal(program, a, neutral) else None
