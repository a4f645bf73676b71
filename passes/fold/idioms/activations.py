"""Activations that exporters write out as arithmetic."""

from __future__ import annotations

import math

from torch import fx

from ....ir.program import Program
from ..canonicalize_activation import clamp_of
from ..match import LITERAL_TOLERANCE, argument, aten, is_call, is_literal, same_type
from .products import factors, plus


def close(value: float, expected: float) -> bool:
    return abs(value - expected) <= LITERAL_TOLERANCE * abs(expected)


def gated_activation(program: Program, node: fx.Node) -> fx.Node | None:
    """x * g(x): silu, hardswish, gelu and mish.

    x * sigmoid(x)                                          -> aten.silu(x)            (arXiv:1702.03118)
    x * clamp(x + 3, 0, 6) / 6, x * hardsigmoid(x)          -> aten.hardswish(x)       (arXiv:1905.02244)
    0.5 * x * (1 + erf(x / sqrt(2)))                        -> aten.gelu(x)            (arXiv:1606.08415)
    0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))   -> aten.gelu(x, "tanh")
    x * tanh(softplus(x))                                   -> aten.mish(x)            (arXiv:1908.08681)
    """
    number, found = factors(program, node)
    if len(found) != 2:
        return None
    for x, gate in (found, found[::-1]):
        if len(gate.users) != 1 or not same_type(x, node):
            continue
        target, options = _activation(program, number, x, gate)
        if target is not None:
            return program.insert(target, (x,), node, **options)
    return None


def _activation(program: Program, number: float, x: fx.Node, gate: fx.Node):
    none = (None, {})
    if number == 1:
        if is_call(gate, aten.sigmoid.default) and gate.args[0] is x:
            return aten.silu.default, {}
        if is_call(gate, aten.hardsigmoid.default) and gate.args[0] is x:
            return aten.hardswish.default, {}
        inner = gate.args[0] if is_call(gate, aten.tanh.default) else None
        mish = is_call(inner, aten.softplus.default) and inner.args == (x,) and not inner.kwargs  # type: ignore[union-attr]
        return (aten.mish.default, {}) if mish and len(inner.users) == 1 else none  # type: ignore[union-attr]
    if close(number, 1 / 6):
        return (aten.hardswish.default, {}) if _relu6_of_plus_three(program, gate) is x else none
    return _gelu(program, x, gate) if close(number, 0.5) else none


def _gelu(program: Program, x: fx.Node, gate: fx.Node):
    inner = plus(program, gate, 1.0)
    if not is_call(inner, aten.erf.default, aten.tanh.default) or len(inner.users) != 1:  # type: ignore[union-attr]
        return None, {}
    assert inner is not None
    number, found = factors(program, inner.args[0])  # type: ignore[arg-type]
    if inner.target is aten.erf.default:
        matches = close(number, math.sqrt(0.5)) and found == [x]
        return (aten.gelu.default, {}) if matches else (None, {})
    matches = close(number, math.sqrt(2 / math.pi)) and len(found) == 1 and _is_cubic(program, found[0], x)
    return (aten.gelu.default, {"approximate": "tanh"}) if matches else (None, {})


def _is_cubic(program: Program, node: fx.Node, x: fx.Node) -> bool:
    """Whether node is x + 0.044715 * x^3."""
    if not is_call(node, aten.add.Tensor) or argument(node, 2, "alpha", 1) != 1 or x not in node.args[:2]:
        return False
    cubic = node.args[1] if node.args[0] is x else node.args[0]
    if not isinstance(cubic, fx.Node):
        return False
    number, found = factors(program, cubic)
    if not close(number, 0.044715):
        return False
    if len(found) == 1 and is_call(found[0], aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor):
        return found[0].args[0] is x and is_literal(program, found[0].args[1], 3.0)
    return found == [x, x, x]


def _relu6_of_plus_three(program: Program, node: fx.Node) -> fx.Node | None:
    """x where node is clamp(x + 3, 0, 6)."""
    clamp = clamp_of(program, node)
    if clamp is None or (clamp.low, clamp.high) != (0, 6):
        return None
    return plus(program, clamp.x, 3.0)


def hardsigmoid_of_product(program: Program, node: fx.Node) -> fx.Node | None:
    """clamp(x + 3, 0, 6) / 6 -> aten.hardsigmoid(x)"""
    number, found = factors(program, node)
    if len(found) != 1 or not close(number, 1 / 6) or len(found[0].users) != 1:
        return None
    x = _relu6_of_plus_three(program, found[0])
    return None if x is None or not same_type(x, node) else program.insert(aten.hardsigmoid.default, (x,), node)


def hardsigmoid_of_clamp(program: Program, node: fx.Node) -> fx.Node | None:
    """clamp(x / 6 + 0.5, 0, 1) -> aten.hardsigmoid(x)"""
    clamp = clamp_of(program, node)
    if clamp is None or (clamp.low, clamp.high) != (0, 1):
        return None
    line = plus(program, clamp.x, 0.5)
    if line is None or len(line.users) != 1:
        return None
    number, found = factors(program, line)
    if len(found) != 1 or not close(number, 1 / 6) or not same_type(found[0], node):
        return None
    return program.insert(aten.hardsigmoid.default, (found[0],), node)
