"""A Triton kernel as a function of a Relax module: its buffers, and how it is launched.

Lowering and the static memory plan know kernels as PrimFuncs. A Triton kernel has no TIR, so its PrimFunc declares the buffers
(the kernel's pointer parameters, in order) and carries the launch as an attribute; the body is empty. Another launch may come
before it: that one reads the first buffer and writes a scratch, which the kernel reads in the buffer's place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tvm import tirx

from ..kernels.emit import Argument, build
from ..kernels.isa import T

#: Attribute of a function that a Triton kernel stands for.
ATTRIBUTE = "gw.triton"

Constant = int | float | bool | str | None


@dataclass(frozen=True)
class TritonCall:
    """One launch of a Triton kernel with everything but its pointers bound.

    Attributes:
        function: `module:name` of the `@triton.jit` function, the module inside `backends/tvm/cuda/kernels`.
        constants: its `tl.constexpr` parameters by name; all shapes are among them.
        grid: programs along x, y, z.
        warps: warps a program. stages: depth of the software pipeline of its loads.
    """

    function: str
    constants: tuple[tuple[str, Constant], ...]
    grid: tuple[int, int, int]
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(
        cls, function: str, constants: Mapping[str, Constant], grid: Sequence[int], warps: int = 4, stages: int = 3
    ) -> TritonCall:
        x, y, z = (*grid, 1, 1)[:3]
        return cls(function, tuple(sorted(constants.items())), (x, y, z), warps, stages)


#: A launch before another, and the scratch that it writes.
Before = tuple[TritonCall, Argument]


def device_function(name: str, buffers: Sequence[Argument], call: TritonCall, before: Before | None = None) -> tirx.PrimFunc:
    """The PrimFunc that stands for `call`. buffers: (name, shape, dtype) of the kernel's pointers in order, outputs last."""

    def body() -> None:
        for buffer, shape, dtype in buffers:
            T.arg(buffer, T.buffer(shape, dtype))
        T.evaluate(T.int32(0))

    function: Any = build(name, body)  # `with_attr` is typed by its base class
    fields = {"call": asdict(call)}
    if before is not None:
        fields |= {"before": asdict(before[0]), "scratch": before[1]}
    return function.with_attr(ATTRIBUTE, json.dumps(fields, sort_keys=True))


def triton_call(function: Any) -> TritonCall | None:
    """The launch that `device_function` was given; None for a function with a body of its own."""
    if function.attrs is None or ATTRIBUTE not in function.attrs:
        return None
    return _call(json.loads(str(function.attrs[ATTRIBUTE]))["call"])


def call_before(function: Any) -> Before | None:
    """The launch before it, where `device_function` was given one."""
    fields = json.loads(str(function.attrs[ATTRIBUTE]))
    if "before" not in fields:
        return None
    name, shape, dtype = fields["scratch"]
    return _call(fields["before"]), (name, tuple(shape), dtype)


def _call(fields: dict[str, Any]) -> TritonCall:
    fields["constants"] = tuple((name, value) for name, value in fields["constants"])
    fields["grid"] = tuple(fields["grid"])
    return TritonCall(**fields)


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a program, ready to run.

    Attributes:
        name: of the step.
        symbol: of the function inside `image`, a cubin.
        grid, block: programs, and threads of one, along x, y, z.
        shared: bytes of dynamic shared memory.
        hidden: null pointers that the function takes after its own.
        pointers: which of its step's buffers the function takes, in its order; None: all of them.
    """

    name: str
    symbol: str
    image: bytes = field(repr=False)
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0
    hidden: int = 0
    pointers: tuple[int, ...] | None = None

    @property
    def parallel(self) -> bool:
        """Every launch is work for many."""
        return True

    @property
    def scratch(self) -> tuple[int, ...]:
        """No memory that each thread has for itself."""
        return ()
