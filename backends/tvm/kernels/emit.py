"""Helpers over TVM's IRBuilder: kernels are written as Python programs that emit TIR, so register tiles unroll in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder

from .base import LANES
from .half import NATIVE, NATIVE_CODE, VIEWS
from .isa import T

#: One fork and join of TVM's thread pool, microseconds (measured on two cores): a loop worth less than twice this stays serial.
FORK_JOIN_US = 2.0


#: Attribute of a function: LLVM code of the functions it calls.
LLVM_CODE = "graphwright.llvm_code"


def build(name: str, body: Callable[[], None], level: str = "") -> tirx.PrimFunc:
    """Runs `body`, which declares arguments and emits statements, as one PrimFunc. level: of a kernel that may hold bfloat16."""
    builder: Any
    code = {LLVM_CODE: NATIVE_CODE} if level == NATIVE else {}
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, "global_symbol": name, **code})
            body()
        return builder.get()


Argument = tuple[str, tuple[int, ...], str]


def arguments(*specs: Argument) -> list[Any]:
    """Declares (name, shape, dtype) buffers, before any statement, and returns a flat view of each: generators compute
    element offsets themselves. bfloat16 numbers are seen as their bits (`half`)."""
    buffers = [T.arg(name, T.buffer(shape, dtype)) for name, shape, dtype in specs]
    return [
        buffer
        if len(shape) == 1 and dtype not in VIEWS
        else T.decl_buffer((prod(shape),), VIEWS.get(dtype, dtype), data=buffer.data)
        for buffer, (_, shape, dtype) in zip(buffers, specs, strict=True)
    ]


def ramp(offset: Any, lanes: int = LANES) -> Any:
    return T.Ramp(offset, 1, lanes)


def store(buffer: Any, offset: Any, value: Any, lanes: int = LANES) -> None:
    T.buffer_store(buffer, value, [ramp(offset, lanes)])


def splat(value: Any, lanes: int = LANES) -> Any:
    return T.Broadcast(value, lanes)


def shuffle(vectors: list[Any], order: list[int]) -> Any:
    """Elements `order` of the concatenated vectors."""
    indices: Any = order
    return tirx.Shuffle(vectors, indices)


def prefetch(buffer: Any, offset: Any) -> None:
    """Asks for the cache line of an element, into the second-level cache; it may lie outside the buffer."""
    read, second_level, data = T.int32(0), T.int32(2), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[offset]), read, second_level, data))


def bind(value: Any) -> Any:
    """Gives an expression a name, so that it is computed once."""
    return T.Bind(value)


def dtype_of(value: Any) -> str:
    return str(value.ty.dtype)


def fence(value: Any) -> Any:
    """`value`, opaque to LLVM's and TVM's arithmetic simplification."""
    return T.call_llvm_intrin(dtype_of(value), "llvm.arithmetic.fence", value)


def opaque(value: Any) -> Any:
    """As `bind` for an int32, without TVM's simplifier seeing through it: nested clamps and quotients cost it seconds."""
    cell = T.alloc_buffer((1,), "int32")
    T.buffer_store(cell, value, [0])
    return T.Bind(cell.vload([0]))


def accumulator(dtype: str = "int32", lanes: int = LANES) -> Any:
    """A vector variable. Scope global and under 1 KB: TVM then uses a stack slot, which LLVM turns into a register;
    any other scope becomes a call to the workspace allocator and lives in memory."""
    return T.alloc_buffer((lanes,), dtype)


@contextmanager
def loop(extent: int, kind: str = "serial") -> Iterator[Any]:
    """A loop over range(extent), or no loop at all for extent 1."""
    if extent == 1:
        yield 0
        return
    with {"serial": T.serial, "parallel": T.parallel, "vectorized": T.vectorized}[kind](0, extent) as index:
        yield index


def parallel_kind(microseconds: float) -> str:
    """Parallel where the whole loop's work pays for the fork and join."""
    return "parallel" if microseconds > 2 * FORK_JOIN_US else "serial"


def clamp_start(index: Any, size: int, total: int) -> Any:
    """Start of tile `index`: the last one is moved back to overlap its neighbour instead of running past the end."""
    if total % size == 0:
        return index * size
    if isinstance(index, int):
        return min(index * size, total - size)
    return T.min(index * size, total - size)


def balanced(total: int, most: int) -> int:
    """Largest tile of at most `most` that cuts `total` into equal pieces."""
    return ceil(total / ceil(total / most))
