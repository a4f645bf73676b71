"""canonicalize-activation: one form for every activation that clamps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import argument, aten, is_call, is_float, is_tensor, same_type, scalar, substitute

CLAMPS = (
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.threshold.default,
    aten.leaky_relu.default,
    aten.maximum.default,
    aten.minimum.default,
)


@dataclass(frozen=True)
class Clamp:
    """min(max(x, low), high); an absent bound is infinite."""

    x: fx.Node
    low: float
    high: float


@register
@dataclass(frozen=True)
class CanonicalizeActivation(Pass):
    """Writes every clamp as aten.relu where its range is [0, inf), as aten.clamp(x, low, high) otherwise, and merges neighbours.

        aten.relu6(%x), aten.hardtanh(%x, 0, 6), aten.minimum(aten.relu(%x), 6)   ->  aten.clamp(%x, 0.0, 6.0)
        aten.clamp_min(%x, 0), aten.threshold(%x, 0, 0), aten.maximum(%x, 0)      ->  aten.relu(%x)

    Bounds are numbers or parameters with one element; an open side is None. Two clamps merge where nothing else reads the
    first. A clamp without bounds goes. Integer values are left alone.
    """

    name = "canonicalize-activation"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewritten = sum(_rewrite(program, node) for node in list(program.nodes))
        return PassResult(program, rewritten > 0, {"rewritten": rewritten})


def clamp_of(program: Program, node: object) -> Clamp | None:
    """The clamp a node stands for, whatever it is spelled as; None for anything else."""
    if not is_call(node, *CLAMPS) or not is_float(node):
        return None
    two_sided = node.target not in (aten.maximum.default, aten.minimum.default)
    found = _bounds(program, node) if two_sided else _extremum(program, node)
    if found is None or not is_tensor(found.x) or not same_type(found.x, node):
        return None
    return None if math.isnan(found.low) or math.isnan(found.high) or found.low > found.high else found


def _bounds(program: Program, node: fx.Node) -> Clamp | None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    if node.target is aten.relu.default:
        return Clamp(x, 0.0, math.inf)
    if node.target is aten.relu6.default:
        return Clamp(x, 0.0, 6.0)
    if node.target in (aten.threshold.default, aten.leaky_relu.default):
        # threshold(x, 0, 0) and a leaky slope of 0 are rectifiers; other settings are no clamps.
        values = node.args[1:] if node.target is aten.threshold.default else (argument(node, 1, "negative_slope", 0.01),)
        return Clamp(x, 0.0, math.inf) if all(v == 0 for v in values) else None
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)
    elif node.target is aten.clamp_max.default:
        low, high = None, argument(node, 1, "max")
    low = -math.inf if low is None else scalar(program, low)
    high = math.inf if high is None else scalar(program, high)
    return None if low is None or high is None else Clamp(x, low, high)


def _extremum(program: Program, node: fx.Node) -> Clamp | None:
    a, b = node.args[0], node.args[1]
    for x, bound in ((a, b), (b, a)):
        value = scalar(program, bound)
        if value is not None:
            low = node.target is aten.maximum.default
            return Clamp(x, value if low else -math.inf, math.inf if low else value)  # type: ignore[arg-type]
    return None


def _rewrite(program: Program, node: fx.Node) -> bool:
    clamp = clamp_of(program, node)
    if clamp is None:
        return False
    inner = clamp_of(program, clamp.x)
    if inner is not None and single_user(clamp.x) is node:
        # The inner range as the outer clamp maps it.
        low, high = (min(max(bound, clamp.low), clamp.high) for bound in (inner.low, inner.high))
        clamp = Clamp(inner.x, low, high)
    elif _is_canonical(node, clamp):
        return False
    substitute(program, node, _write(program, node, clamp))
    return True


def _write(program: Program, node: fx.Node, clamp: Clamp) -> fx.Node:
    low, high = (None if math.isinf(b) else b for b in (clamp.low, clamp.high))
    if low is None and high is None:
        return clamp.x
    if low == 0 and high is None:
        return program.insert(aten.relu.default, (clamp.x,), node)
    return program.insert(aten.clamp.default, (clamp.x, low, high), node)


def _is_canonical(node: fx.Node, clamp: Clamp) -> bool:
    if node.target is aten.relu.default:
        return True
    bounds = tuple(None if math.isinf(b) else b for b in (clamp.low, clamp.high))
    plain = node.target is aten.clamp.default and len(node.args) == 3 and not node.kwargs
    exact = plain and all(type(a) is type(b) and a == b for a, b in zip(node.args[1:], bounds, strict=True))
    return exact and bounds not in ((0.0, None), (None, None))
