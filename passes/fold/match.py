"""Small predicates over nodes that the fold passes share."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx

from ...ir.program import Program, dtype_of

aten = torch.ops.aten

#: Relative tolerance for recognizing a literal such as 1/sqrt(2), which models store in float32 or round by hand.
LITERAL_TOLERANCE = 1e-5

#: Ops that move elements without changing them, in any order of the elements.
MOVEMENT = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.clone.default,
)


def is_call(value: Any, *targets: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument wherever the caller put it: by position, by keyword, or left at its default."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_float(node: Any) -> bool:
    return is_tensor(node) and dtype_of(node).is_floating_point


def same_dim(a: Any, b: Any) -> bool:
    """Equality of two dimensions that never guards on a symbolic one: unknown counts as different."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, int) or isinstance(b, int):
        return False
    return a.node.expr == b.node.expr


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta["val"].shape, b.meta["val"].shape
    return len(left) == len(right) and all(same_dim(x, y) for x, y in zip(left, right, strict=True))


def same_type(a: fx.Node, b: fx.Node) -> bool:
    """Same shape, dtype and device, so that one value can stand for the other."""
    return is_tensor(a) and is_tensor(b) and same_shape(a, b) and dtype_of(a) == dtype_of(b) and device(a) == device(b)


def device(node: fx.Node) -> torch.device:
    return node.meta["val"].device


def reshape_arguments(node: fx.Node) -> list[int] | None:
    """The shape of a value as arguments of reshape: one symbolic dimension becomes -1; None where that is ambiguous."""
    dims = list(node.meta["val"].shape)
    symbolic = [i for i, d in enumerate(dims) if not isinstance(d, int)]
    if len(symbolic) > 1 or (symbolic and 0 in dims):
        return None
    return [d if isinstance(d, int) else -1 for d in dims]


def normalized_dims(dims: int | Sequence[int], rank: int) -> list[int]:
    """Dimensions counted from the front, sorted."""
    values = [dims] if isinstance(dims, int) else list(dims)
    return sorted(d % rank for d in values)


def scalar(program: Program, value: Any) -> float | None:
    """The number behind a Python scalar or a parameter with one element; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = program.parameter(value)
    if tensor is not None and tensor.numel() == 1 and tensor.dtype not in (torch.bool, torch.complex64, torch.complex128):
        return float(tensor)
    return None


def is_literal(program: Program, value: Any, expected: float) -> bool:
    number = scalar(program, value)
    return number is not None and abs(number - expected) <= LITERAL_TOLERANCE * abs(expected)


def all_equal(program: Program, value: Any, expected: float) -> bool:
    """Whether a scalar, or every element of a parameter, is exactly `expected`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == expected
    tensor = program.parameter(value)
    return tensor is not None and tensor.dtype != torch.bool and bool((tensor == expected).all())


def operands(node: fx.Node) -> tuple[Any, Any]:
    """Both operands of a binary op."""
    return node.args[0], node.args[1]


def split_operands(node: fx.Node, wanted: Any) -> Any | None:
    """The other operand of a commutative binary op that reads `wanted`; None where it does not."""
    a, b = operands(node)
    return b if a is wanted else a if b is wanted else None


def channel_vector(program: Program, value: Any, like: fx.Node, axis: int) -> torch.Tensor | None:
    """A constant that varies along `axis` of `like` only, as a float64 vector with one element a channel.

    None where `value` is no constant, varies along another axis, or would broadcast `like` to a larger shape.
    """
    shape = like.meta["val"].shape
    channels = shape[axis]
    if not isinstance(channels, int):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((channels,), float(value), dtype=torch.float64)
    tensor = program.parameter(value)
    if tensor is None or not tensor.is_floating_point() or tensor.dim() > len(shape):
        return None
    aligned = [1] * (len(shape) - tensor.dim()) + list(tensor.shape)
    if any(d != 1 for i, d in enumerate(aligned) if i != axis % len(shape)) or aligned[axis] not in (1, channels):
        return None
    return tensor.detach().reshape(-1).to(torch.float64).expand(channels)


def substitute(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Every reader of `old` reads `new`, and `old` goes."""
    old.replace_all_uses_with(new)
    program.graph.erase_node(old)


def is_random(node: fx.Node) -> bool:
    """Whether two calls of the node may give different values."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.target in UNINITIALIZED


#: Results with undefined values.
UNINITIALIZED = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default)


def is_pure(node: fx.Node) -> bool:
    """A call that may be evaluated once, early, or shared."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and not is_random(node)


def tensor_bytes(values: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in values)
