"""A launch of a Triton kernel as plain data, and how to run it on torch tensors."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

Constant = int | float | bool | str | None
#: (name, shape, dtype)
Buffer = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Plan:
    """One launch of `function` (`module:name`, the module in this package).

    constants: its `tl.constexpr` parameters; a pointer that this launch has no buffer for is None. buffers: what the other
    pointers are, in order, the output last. first: a launch before this one; what it writes is this one's first buffer, and
    nobody else sees it.
    """

    function: str
    constants: dict[str, Constant]
    grid: tuple[int, int, int]
    buffers: tuple[Buffer, ...]
    warps: int = 4
    stages: int = 3
    first: Plan | None = None

    @property
    def operands(self) -> tuple[Buffer, ...]:
        """The buffers that its caller brings, the output last."""
        return self.buffers if self.first is None else (*self.first.operands[:-1], *self.buffers[1:])


def function_of(plan: Plan) -> Any:
    module, name = plan.function.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def torch_type(dtype: str) -> Any:
    """The torch type of that name; torch is only imported here, where something runs."""
    return getattr(importlib.import_module("torch"), dtype)


def run(plan: Plan, tensors: list[Any]) -> None:
    """Launches on torch tensors, one an operand: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    if plan.first is not None:
        _, shape, dtype = plan.buffers[0]
        between = tensors[0].new_empty(shape, dtype=torch_type(dtype))
        count = len(plan.first.operands) - 1
        run(plan.first, [*tensors[:count], between])
        tensors = [between, *tensors[count:]]
    function = function_of(plan)
    pointers = [name for name in function.arg_names if name not in plan.constants]
    given = dict(zip(pointers, tensors, strict=True))
    options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": False}
    function[plan.grid](**given, **plan.constants, **options)
