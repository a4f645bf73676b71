"""A compiled program as data: the calls of its kernels in order, and where every buffer lies.

The Relax function that lowering builds is straight-line code over tensors of known shape. It becomes a table of steps that
`region.c` walks inside one parallel region: no virtual machine, no allocation, one fork a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax as _relax

from ...ir.errors import UnsupportedOpError
from .memory import ALIGNMENT, SLACK, Lifetime, aligned, plan_arena
from .tasks import TaskKernel, Work
from .values import CONSTANT, Expr, item_size

#: Relax, untyped: the stubs know every expression only by its base class.
relax: Any = _relax


#: A task keeps its scratch on its thread's stack, where it stays in the cache from one kernel to the next.
MOST_TASK_BYTES = 1 << 20


#: Parts that run at the same time, at most; the arena holds so many (`GW_MOST_GROUPS` of `region.h`).
MOST_GROUPS = 64


class Space(StrEnum):
    """Where a buffer lies."""

    ARENA = "arena"
    TASK = "task"
    WEIGHTS = "weights"
    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class Place:
    """A buffer's address: byte `offset` of the arena, of the task's own scratch or of the weights, or the input or output of
    that number. size: bytes."""

    space: Space
    offset: int
    size: int

    def overlaps(self, other: Place) -> bool:
        if self.space is not other.space or self.space is Space.TASK:
            return False
        if self.space in (Space.INPUT, Space.OUTPUT):
            return self.offset == other.offset
        return self.offset < other.offset + other.size and other.offset < self.offset + self.size


@dataclass(frozen=True)
class Step:
    """One call of one phase.

    Attributes:
        kernel: position of its kernel call in the program; the phases of one call share it.
        places: its buffers, in the order of the function's parameters.
        read: how many of them, from the first on, it only reads.
        barrier: all tasks wait for one another before it.
    """

    phase: Work
    kernel: int
    places: tuple[Place, ...]
    read: int
    barrier: bool = False

    def must_follow(self, earlier: Step) -> bool:
        """Whether this step touches what another task wrote in `earlier`, or writes what another task still reads there."""
        if not self.phase.parallel and not earlier.phase.parallel:
            return False  # task 0 runs both, in order
        mine, theirs = self.places[self.read :], earlier.places[earlier.read :]
        return any(a.overlaps(b) for a in mine for b in earlier.places) or any(a.overlaps(b) for a in self.places for b in theirs)


@dataclass(frozen=True)
class Tensor:
    """An input or output of the program."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return prod(self.shape) * item_size(self.dtype)


@dataclass(frozen=True)
class Region:
    """Everything the region executor needs.

    Attributes:
        inputs, outputs: of one part.
        weights: the packed parameters as one image.
        arena: bytes that hold every intermediate buffer of one part, and its staged tensors.
        scratch: bytes that every task has for itself.
        parts: the steps run once a part of the batch.
        staged: for each input and output, where a part of it lies in the arena; None: in the caller's memory.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    weights: bytes = field(repr=False)
    arena: int
    scratch: int
    parts: int = 1
    staged: tuple[int | None, ...] = ()

    def description(self, on_device: bool = False) -> str:
        """What a runner must know, as JSON. on_device: the library holds its arena itself, the runner brings none."""

        def tensors(items: Sequence[Tensor]) -> list[dict[str, Any]]:
            return [
                {"dtype": t.dtype, "shape": [t.shape[0] * self.parts, *t.shape[1:]] if self.parts > 1 else list(t.shape)}
                for t in items
            ]

        return json.dumps(
            {
                "arena": 0 if on_device else self.arena * min(self.parts, MOST_GROUPS),
                "inputs": tensors(self.inputs),
                "outputs": tensors(self.outputs),
                "steps": [[step.phase.name, step.kernel] for step in self.steps],
            },
            separators=(",", ":"),
        )


def plan_region(main: Any, kernels: Mapping[str, TaskKernel[Work]], parts: int = 1) -> Region:
    """Plans the function `main` of a lowered module, whose kernels (by function name) were split into phases.

    Args:
        parts: times that `main` runs for the whole batch, of which its tensors are one part.

    Raises:
        UnsupportedOpError: an operation whose result has no static place, such as one with a data-dependent shape.
    """
    inputs = tuple(_tensor(parameter) for parameter in main.params)
    outputs = tuple(_tensor(value) for value in main.body.body.ty.fields)
    calls = _Calls(main, kernels)
    lifetimes = [Lifetime(s.size, s.first, s.last) for s in calls.storages if s.output is None]
    offsets, arena = plan_arena(lifetimes)
    free = iter(offsets)
    for storage in calls.storages:
        if storage.output is None:
            storage.place = Place(Space.ARENA, next(free), storage.size)
        else:
            storage.place = Place(Space.OUTPUT, storage.output, storage.size)
    steps = _with_barriers(calls.steps())
    scratch = max((_task_bytes(step.phase.scratch) for step in steps), default=0)
    if scratch > MOST_TASK_BYTES:
        raise RuntimeError(f"a kernel asks for {scratch} bytes of its task's stack; {MOST_TASK_BYTES} is the most it may have")
    staged, arena = _staged((*inputs, *outputs), arena, parts)
    return Region(inputs, outputs, steps, calls.weights.image(), arena, scratch, parts, staged)


def _staged(tensors: Sequence[Tensor], arena: int, parts: int) -> tuple[tuple[int | None, ...], int]:
    """Where parts of tensors lie in the arena, and its size with them: kernels want aligned addresses, and where a part is no
    whole number of cache lines, the next one has none."""
    places: list[int | None] = []
    arena = aligned(arena) if parts > 1 else arena
    for tensor in tensors:
        apart = parts > 1 and tensor.size != aligned(tensor.size)
        places.append(arena if apart else None)
        arena += aligned(tensor.size) + ALIGNMENT if apart else 0
    return tuple(places), arena


def _task_bytes(sizes: Sequence[int]) -> int:
    return sum(aligned(size) for size in sizes)


def _with_barriers(steps: Sequence[Step]) -> tuple[Step, ...]:
    """A barrier wherever a step depends on one that other tasks may still be running."""
    result: list[Step] = []
    running: list[Step] = []
    for step in steps:
        barrier = any(step.must_follow(earlier) for earlier in running)
        result.append(replace(step, barrier=barrier))
        running = [step] if barrier else [*running, step]
    return tuple(result)


@dataclass(eq=False)
class _Storage:
    """A tensor that some kernel writes: its bytes, and the steps between which it must stay."""

    size: int
    output: int | None = None
    first: int = -1
    last: int = -1
    place: Place = Place(Space.ARENA, -1, 0)  # until the plan is made

    def touch(self, step: int) -> None:
        self.first = step if self.first < 0 else self.first
        self.last = step


class _Weights:
    """Packed parameters, each stored once, one after another in one image."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._known: dict[bytes, Place] = {}
        self._size = 0

    def add(self, array: np.ndarray) -> Place:
        data = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._known:
            self._known[key] = Place(Space.WEIGHTS, self._size, len(data))
            self._pieces.append(data.ljust(aligned(len(data)), b"\0"))
            self._size += aligned(len(data))
        return self._known[key]

    def image(self) -> bytes:
        return b"".join([*self._pieces, bytes(SLACK)])


class _Calls:
    """Reads the straight-line function once: which storages exist, and which kernel call touches which."""

    def __init__(self, main: Any, kernels: Mapping[str, TaskKernel[Work]]) -> None:
        self.weights = _Weights()
        self.storages: list[_Storage] = []
        self._kernels = kernels
        self._calls: list[tuple[TaskKernel[Work], list[_Storage | Place], int]] = []
        self._count = 0
        self._values: dict[Any, Any] = {
            parameter: Place(Space.INPUT, index, _tensor(parameter).size) for index, parameter in enumerate(main.params)
        }
        for block in main.body.blocks:
            for binding in block.bindings:
                self._values[binding.var] = self._bound(binding.value)
        for index, storage in enumerate(self._read(main.body.body)):
            if not isinstance(storage, _Storage) or storage.output is not None:
                raise RuntimeError(f"output {index} shares its memory with an input or another output; lowering must copy it")
            storage.output = index

    def steps(self) -> list[Step]:
        """The calls as steps; storages have their places by now."""
        steps = []
        for number, (kernel, operands, read) in enumerate(self._calls):
            places = [o.place if isinstance(o, _Storage) else o for o in operands]
            for phase in kernel.phases:
                own = [Place(Space.TASK, _task_bytes(phase.scratch[:index]), size) for index, size in enumerate(phase.scratch)]
                steps.append(Step(phase, number, (*places, *own), read))
        return steps

    def _bound(self, value: Expr) -> Any:
        if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.call_tir"):
            return self._call(value)
        if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.reshape"):
            return self._read(value.args[0])
        return self._read(value)

    def _read(self, value: Expr) -> Any:
        """The storage or place of an expression; a list of them for a tuple."""
        if isinstance(value, relax.Tuple):
            return [self._read(field) for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._read(value.tuple_value)[value.index]
        if isinstance(value, CONSTANT):
            return self.weights.add(value.value.numpy())
        if isinstance(value, relax.Var):
            return self._values[value]
        raise UnsupportedOpError(
            f"{getattr(value, 'op', value)} has no static lowering: its result is no tensor of known shape that a kernel writes"
        )

    def _call(self, call: Expr) -> Any:
        kernel = self._kernels[call.args[0].name_hint]
        operands = self._read(call.args[1])
        result = call.ty_args[0]
        types = list(result.fields) if hasattr(result, "fields") else [result]
        written = [_Storage(_tensor_of(kind).size) for kind in types]
        scratch = [_Storage(size) for size in kernel.scratch]
        self.storages += [*written, *scratch]
        self._calls.append((kernel, [*operands, *written, *scratch], len(operands)))
        first, self._count = self._count, self._count + len(kernel.phases)
        for storage in (*operands, *written, *scratch):
            if isinstance(storage, _Storage):
                storage.touch(first)
                storage.touch(self._count - 1)
        return written if hasattr(result, "fields") else written[0]


def _tensor(value: Expr) -> Tensor:
    return _tensor_of(getattr(value, "ty", value))


def _tensor_of(kind: Any) -> Tensor:
    return Tensor(tuple(int(extent) for extent in kind.shape), str(kind.dtype))
