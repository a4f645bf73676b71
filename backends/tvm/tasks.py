"""Cuts a kernel into phases that every task of one parallel region can run: before -> after

    for i in parallel(n): pad(i)          pad(..., task, tasks): for i in [n * task / tasks, n * (task + 1) / tasks)
    for j in parallel(m): multiply(j)     multiply(..., task, tasks): the same over m

TVM's own code generator forks and joins its thread pool at every parallel loop, 2 us and more on two cores, which is a third of
the time of a program of fifty small kernels. Here the fork happens once a run, and between phases stands a barrier. Scratch
that the tasks of a kernel share becomes a parameter and lives in the program's arena, so nothing is allocated at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Protocol, TypeVar

from tvm import ir, tirx
from tvm.tirx.buffer import is_buffer_var
from tvm_ffi import structural_map

from .kernels.slices import hoist
from .values import item_size

#: A TIR statement, variable or function; the stubs do not know their fields.
Node = Any

#: TVM allocates larger buffers than this, and those of another scope than "global", at run time instead of on the stack.
STACK_BYTES = 1024

_CPU = 1
_PARALLEL, _SERIAL = tirx.ForKind.PARALLEL, tirx.ForKind.SERIAL


class Work(Protocol):
    """What one step of a region runs: a `Phase` of a CPU kernel, or a launch on a device (`cuda.launch.Launch`)."""

    @property
    def name(self) -> str: ...

    @property
    def parallel(self) -> bool: ...

    @property
    def scratch(self) -> tuple[int, ...]: ...


W = TypeVar("W", bound=Work, covariant=True)


@dataclass(frozen=True)
class Phase:
    """One function of a kernel, ready for a region. Its parameters: the kernel's own, the kernel's scratch, the phase's own
    scratch, then `task` and `tasks` (int32).

    Attributes:
        parallel: the function does the task's share of the work. Otherwise it does all of it, and one task alone may call it.
        scratch: bytes of each buffer that every task has for itself.
    """

    name: str
    function: Node
    parallel: bool
    scratch: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskKernel(Generic[W]):
    """A kernel as its phases, in order. scratch: bytes of each buffer that the phases share."""

    phases: tuple[W, ...]
    scratch: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """A statement that is work for many (a parallel loop, a grid of threads), or the serial statements between two of them."""

    body: Node
    parallel: bool


def split_tasks(name: str, function: Node) -> TaskKernel[Phase]:
    """Splits a function whose blocks are lowered and whose buffers are flat (see `pipeline.flatten`)."""
    statements = statements_of(function.body)
    if not any(map(_is_parallel, statements)):
        return TaskKernel((_phase(name, function, [], [], Group(tirx.stmt_seq(*statements), parallel=False)),), ())
    prologue, shared, groups = cut(statements, _is_parallel)
    labels = [name] if len(groups) == 1 else [f"{name}_{index}" for index in range(len(groups))]
    phases = (_phase(label, function, shared, prologue, group) for label, group in zip(labels, groups, strict=True))
    return TaskKernel(tuple(phases), tuple(buffer_bytes(buffer) for buffer in shared))


def _phase(name: str, function: Node, shared: list[Node], prologue: list[Node], group: Group) -> Phase:
    task, tasks = tirx.Var("task", "int32"), tirx.Var("tasks", "int32")
    body, own = _without_allocations(_serial(group.body))
    body = _slice(body, task, tasks) if group.parallel else body
    phase = tirx.PrimFunc([*function.params, *shared, *own, task, tasks], tirx.stmt_seq(*prologue, body))
    attributes = {**dict(function.attrs), "tirx.noalias": True, "global_symbol": name}
    return Phase(name, phase.with_attrs(attributes), group.parallel, tuple(map(buffer_bytes, own)))


def statements_of(body: Node) -> list[Node]:
    if isinstance(body, tirx.SeqStmt):
        return [inner for statement in body.seq for inner in statements_of(statement)]
    return [body]


def _is_parallel(statement: Node) -> bool:
    return isinstance(statement, tirx.For) and statement.kind == _PARALLEL


class NamedBetweenError(RuntimeError):
    """A value is named between two pieces of work: neither a phase of its own nor what every phase could repeat."""


def cut(statements: Iterable[Node], is_work: Callable[[Node], bool]) -> tuple[list[Node], list[Node], list[Group]]:
    """Views and named values (every phase repeats them), buffers that all phases see, and the work. Raises NamedBetweenError."""
    prologue, buffers, groups, serial = [], [], [], []

    def close() -> None:
        if serial:
            groups.append(Group(tirx.stmt_seq(*serial), parallel=False))
            serial.clear()

    for statement in statements:
        if isinstance(statement, tirx.AllocBuffer):
            buffers.append(statement.buffer)
        elif isinstance(statement, tirx.DeclBuffer) or (isinstance(statement, tirx.Bind) and not groups and not serial):
            prologue.append(statement)
        elif isinstance(statement, tirx.Bind):
            raise NamedBetweenError(f"'{statement.var}' is named between parallel loops; name it before the first or inside one")
        elif is_work(statement):
            close()
            groups.append(Group(statement, parallel=True))
        else:
            serial.append(statement)
    close()
    return prologue, buffers, groups


def _slice(loop: Node, task: Node, tasks: Node) -> Node:
    """The task's share of a loop; shares differ by one iteration at most."""
    kind = loop.loop_var.ty.dtype
    count, task, tasks = (tirx.Cast(kind, value) for value in (loop.extent, task, tasks))
    begin, end = (tirx.truncdiv(count * place, tasks) for place in (task, task + 1))
    return hoist(tirx.For(loop.loop_var, loop.min + begin, end - begin, _SERIAL, loop.body))


def _serial(statement: Node) -> Node:
    """The statement without parallel loops; one that a generic schedule left inside another loop runs on the task it meets."""

    def plain(loop: Node) -> Node:
        if loop.kind != _PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, _SERIAL, loop.body, None, loop.annotations)

    return structural_map(statement, (tirx.For, plain))


def _without_allocations(statement: Node) -> tuple[Node, list[Node]]:
    """Takes out the buffers that TVM would allocate at run time, to become parameters."""
    taken: list[Node] = []

    def drop(allocation: Node) -> Node:
        if buffer_bytes(allocation.buffer) <= STACK_BYTES and allocation.buffer.scope() == "global":
            return allocation
        taken.append(allocation.buffer)
        return tirx.Evaluate(tirx.IntImm("int32", 0))

    return structural_map(statement, (tirx.AllocBuffer, drop)), taken


def take_pointers(function: Node, runtime_calls: bool = True) -> tirx.PrimFunc:
    """Buffer parameters become raw pointers: a region knows every shape, and its calls need no tensor headers.

    runtime_calls: the function may call TVM's runtime, which asks for a device.
    """
    parameters, declarations = [], []
    for parameter in function.params:
        if is_buffer_var(parameter):
            pointer = tirx.Var(f"{parameter.name}_data", ir.PointerType(ir.PrimType(str(parameter.dtype)), parameter.scope()))
            declarations.append(tirx.DeclBuffer(parameter, data=pointer))
            parameter = pointer
        parameters.append(parameter)
    body = tirx.stmt_seq(*declarations, function.body)
    for key, value in (("device_id", 0), ("device_type", _CPU)) if runtime_calls else ():  # a tensor's header would tell
        body = tirx.AttrStmt(0, key, tirx.IntImm("int32", value), body)
    return tirx.PrimFunc(parameters, body, None, function.attrs)


def buffer_bytes(buffer: Node) -> int:
    return prod(int(extent) for extent in buffer.shape) * item_size(str(buffer.dtype))
