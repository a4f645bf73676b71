"""From a plan to the function that stands for it in a module."""

from __future__ import annotations

from tvm import tirx

from ..launch import TritonCall, device_function
from .plans import Plan


def function(plan: Plan, name: str = "main") -> tirx.PrimFunc:
    call = TritonCall.of(plan.function, plan.constants, plan.grid, plan.warps, plan.stages)
    return device_function(name, list(plan.buffers), call)
