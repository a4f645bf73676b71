"""Reductions, arg-reductions, cumulative sums and sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .ops_elementwise import WIDE_UNSIGNED
from .registry import Call, op

Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _sum(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(x, axes, keep, dtype=None if x.is_floating_point() else x.dtype)


def _mean(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    return torch.div(_sum(x, axes, keep), math.prod(x.shape[a] for a in axes), rounding_mode="trunc").to(x.dtype)


def _extreme(function: Callable[..., torch.Tensor], largest: bool) -> Reduction:
    def reduce(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
        if any(x.shape[a] == 0 for a in axes):
            limits = torch.finfo(x.dtype) if x.is_floating_point() else None
            empty = -math.inf if largest else math.inf
            value = empty if limits else ((not largest) if x.dtype == torch.bool else _limit(x.dtype, not largest))
            shape = [1 if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes]
            return torch.full(shape, value, dtype=x.dtype)
        return function(x, axes, keep)

    return reduce


def _limit(dtype: torch.dtype, largest: bool) -> int:
    return torch.iinfo(dtype).max if largest else torch.iinfo(dtype).min


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep, dtype=None if x.is_floating_point() else x.dtype)
    return x


def _root(x: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(x) if x.is_floating_point() else torch.sqrt(x.to(torch.float64)).to(x.dtype)


def _log(x: torch.Tensor) -> torch.Tensor:
    return torch.log(x) if x.is_floating_point() else torch.log(x.to(torch.float64)).to(x.dtype)


def _log_sum_exp(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return (
        torch.logsumexp(x, axes, keep) if x.is_floating_point() else torch.logsumexp(x.to(torch.float64), axes, keep).to(x.dtype)
    )


REDUCTIONS: dict[str, tuple[int, Reduction]] = {
    # name -> (version from which the axes are an input, function)
    "ReduceSum": (13, _sum),
    "ReduceMean": (18, _mean),
    "ReduceMax": (18, _extreme(torch.amax, True)),
    "ReduceMin": (18, _extreme(torch.amin, False)),
    "ReduceProd": (18, _product),
    "ReduceL1": (18, lambda x, axes, keep: _sum(torch.abs(x), axes, keep)),
    "ReduceL2": (18, lambda x, axes, keep: _root(_sum(x * x, axes, keep))),
    "ReduceSumSquare": (18, lambda x, axes, keep: _sum(x * x, axes, keep)),
    "ReduceLogSum": (18, lambda x, axes, keep: _log(_sum(x, axes, keep))),
    "ReduceLogSumExp": (18, _log_sum_exp),
}


def _register_reduction(name: str, input_since: int, function: Reduction) -> None:
    def run(call: Call, x: torch.Tensor, axes: list[int] | None) -> torch.Tensor:
        if not axes and call.attr("noop_with_empty_axes", 0):
            # An empty set of axes reduces each element alone.
            return function(x.unsqueeze(-1), [x.dim()], False) if name not in ("ReduceSum", "ReduceMax", "ReduceMin") else x
        axes = sorted({a % max(x.dim(), 1) for a in axes}) if axes else list(range(x.dim()))
        if x.dim() == 0:
            return function(x.reshape(1), [0], False)
        if x.dtype in WIDE_UNSIGNED:
            return function(x.to(torch.int64), axes, bool(call.attr("keepdims"))).to(x.dtype)
        return function(x, axes, bool(call.attr("keepdims")))

    @op(name, since=1)
    def by_attribute(call: Call, x: torch.Tensor) -> torch.Tensor:
        return run(call, x, call.attr("axes"))

    @op(name, since=input_since, static=(1,))
    def by_input(call: Call, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
        return run(call, x, call.ints(1))


for _name, (_since, _function) in REDUCTIONS.items():
    _register_reduction(_name, _since, _function)


def _arg(call: Call, x: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
    axis = call.attr("axis", 0) % x.dim()
    keep = bool(call.attr("keepdims", 1))
    if call.attr("select_last_index", 0):
        return x.shape[axis] - 1 - function(torch.flip(x, [axis]), axis, keep)
    return function(x, axis, keep)


@op("ArgMax")
def argmax(call: Call, x: torch.Tensor) -> torch.Tensor:
    return _arg(call, x, torch.argmax)


@op("ArgMin")
def argmin(call: Call, x: torch.Tensor) -> torch.Tensor:
    return _arg(call, x, torch.argmin)


def _cumulative(call: Call, x: torch.Tensor, function: Callable[..., torch.Tensor], empty: float) -> torch.Tensor:
    axis = (call.ints(1) or [0])[0] % x.dim()
    reverse = call.attr("reverse", 0)
    x = torch.flip(x, [axis]) if reverse else x
    y = function(x, axis, dtype=x.dtype)
    if call.attr("exclusive", 0):
        y = torch.cat([torch.full_like(y.narrow(axis, 0, 1), empty), y.narrow(axis, 0, y.shape[axis] - 1)], axis)
    return torch.flip(y, [axis]) if reverse else y


@op("CumSum", static=(1,))
def cumsum(call: Call, x: torch.Tensor, axis: Any = None) -> torch.Tensor:
    return _cumulative(call, x, torch.cumsum, 0)


@op("CumProd", static=(1,))
def cumprod(call: Call, x: torch.Tensor, axis: Any = None) -> torch.Tensor:
    return _cumulative(call, x, torch.cumprod, 1)


@op("TopK", since=10, static=(1,))
def topk(call: Call, x: torch.Tensor, k: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ties keep the lower index first, as the standard asks; torch.topk leaves their order open, a stable sort does not."""
    axis, count = call.attr("axis") % x.dim(), (call.ints(1) or [1])[0]
    wide = x.to(torch.int64) if x.dtype in WIDE_UNSIGNED else x
    values, indices = torch.sort(wide, dim=axis, descending=bool(call.attr("largest")), stable=True)
    return values.narrow(axis, 0, count).to(x.dtype), indices.narrow(axis, 0, count)


@op("NonZero", constant_only=True)
def nonzero(call: Call, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack(np.nonzero(x.numpy())).astype(np.int64))
