"""From a plan to the function that stands for it in a module."""

from __future__ import annotations

from tvm import tirx

from ..launch import TritonCall, device_function
from .plans import Plan


def function(plan: Plan, name: str = "main") -> tirx.PrimFunc:
    before = None if plan.first is None else (_call(plan.first), plan.buffers[0])
    return device_function(name, list(plan.operands), _call(plan), before)


def _call(plan: Plan) -> TritonCall:
    return TritonCall.of(plan.function, plan.constants, plan.grid, plan.warps, plan.stages)
