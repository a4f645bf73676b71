"""The interface every backend implements; search and tools know backends only through it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.program import Program
from .target import Target, TargetInfo

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class KernelRow:
    """One launched kernel of a compiled program: which nodes it covers, how it was made, and its work.

    kind: `designed` (our own schedule), `generic` (stock lowering), `island` (float op inside an integer program).
    macs: multiply-accumulates of products. bytes: everything read and written once; weights: the constants of a product
    among them. dtype: element type that is multiplied, which says by what unit; of the first operand where nothing is.
    shape: the work in words, such as `96x56x56 -> 24x56x56, 1x1`.
    """

    name: str
    nodes: tuple[str, ...]
    kind: str
    macs: int = 0
    bytes: int = 0
    weights: int = 0
    dtype: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Compiled:
    """A program compiled for one target: the shared library's bytes, and what is inside for the report."""

    target: Target
    library: bytes = field(repr=False)
    kernels: tuple[KernelRow, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


#: A compiled program, and what it is timed on.
Timed = tuple[Compiled, Sequence[torch.Tensor]]


@dataclass(frozen=True)
class StepTimes:
    """Median microseconds of each of a program's `kernels`, and of a whole run as `Backend.latency` times it."""

    microseconds: tuple[float, ...]
    total: float


class Backend(abc.ABC):
    """Compiles programs and measures them."""

    name: str

    @abc.abstractmethod
    def targets(self) -> list[TargetInfo]:
        """Every target of this backend, with what is missing where one cannot be emitted or run here."""

    def channel_multiple(self, target: Target) -> int:
        """Kernels compute channels so many at a time; a count that is no multiple costs as much as the next one."""
        return 1

    @abc.abstractmethod
    def compile(self, program: Program, target: Target, progress: Progress | None = None) -> Compiled:
        """Compiles a canonical, compressed or integer program.

        Raises:
            TargetError: this build cannot emit the target. UnsupportedOpError: an op has no lowering.
        """

    @abc.abstractmethod
    def latencies(self, programs: Sequence[Timed], repeats: int = 50) -> list[float]:
        """Median milliseconds of a run of each program on this machine, the copies in and out included. They take turns, so that
        a drift of the machine's speed hits all alike. Raises TargetError where the target cannot run here."""

    @abc.abstractmethod
    def profiles(self, programs: Sequence[Timed], repeats: int = 100, threads: int | None = None) -> list[StepTimes]:
        """The time of every kernel of each program, in place; in turns, and TargetError, as `latencies`."""

    def latency(self, compiled: Compiled, inputs: Sequence[torch.Tensor], repeats: int = 50) -> float:
        """`latencies` of one program."""
        return self.latencies([(compiled, inputs)], repeats)[0]

    def profile(
        self, compiled: Compiled, inputs: Sequence[torch.Tensor], repeats: int = 100, threads: int | None = None
    ) -> StepTimes:
        """`profiles` of one program."""
        return self.profiles([(compiled, inputs)], repeats, threads)[0]

    def recorded(self, compiled: Compiled) -> StepTimes | None:
        """Times of its kernels that were measured on the target elsewhere; None where one was not."""
        return None

    def records(self, target: Target) -> str:
        """Which measurements `recorded` draws from, for keys of what is kept; empty where none."""
        return ""


def example_inputs(program: Program, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Inputs to time a program with: standard normal floats, zeros for every other type (any index is then in range)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for spec in program.input_specs:
        shape = [int(d) for d in spec.shape if d is not None]
        floating = spec.dtype.is_floating_point
        inputs.append(
            torch.randn(shape, generator=generator, dtype=spec.dtype) if floating else torch.zeros(shape, dtype=spec.dtype)
        )
    return tuple(inputs)
