"""Element-wise expressions as one kernel: a launch costs more than an op over a few thousand elements takes.

Every operation rounds by itself, as the ops did one by one (nvcc contracts nothing, see `nvcc.OPTIONS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.isa import T
from ...kernels.schedule import te


@dataclass(frozen=True)
class Leaf:
    """An input of the kernel, by its number."""

    number: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Apply:
    """An operation on operands that broadcast to `shape`, as torch has it.

    op: a key of `OPERATIONS`; "cast"; "expand", which only broadcasts; or "gather", whose operands are a table [V, D] and indices
    [...], and whose result [..., D] has a row of the table an index. operands: expressions, or numbers.
    """

    op: str
    operands: tuple[Leaf | Apply | float, ...]
    shape: tuple[int, ...]
    dtype: str


#: Operation -> its value. `least` and `most` limit as TVM's clip does.
OPERATIONS: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "sqrt": T.sqrt,
    "least": T.max,
    "most": T.min,
}


def name(expression: Leaf | Apply | float) -> str:
    """What a kernel of the expression is called: its operations, first to last; the first and the last of many."""
    operations = _operations(expression)
    return "_".join(operations if len(operations) <= 4 else (*operations[:2], f"{len(operations) - 3}_more", operations[-1]))


def _operations(expression: Any) -> list[str]:
    if not isinstance(expression, Apply):
        return []
    return [*(op for operand in expression.operands for op in _operations(operand)), expression.op]


def elementwise(expression: Apply, inputs: tuple[tuple[tuple[int, ...], str], ...]) -> tirx.PrimFunc:
    """(the inputs [shape], Y [expression.shape]). inputs: shape and type of each.

    Raises:
        OptionError: an operation that is none.
    """
    buffers = [te.placeholder(shape, dtype, name=f"X{i}") for i, (shape, dtype) in enumerate(inputs)]
    out = te.compute(expression.shape, lambda *index: _value(expression, buffers, index), name="Y")
    return te.create_prim_func([*buffers, out])


def _value(expression: Leaf | Apply | float, buffers: Sequence[Any], index: Sequence[Any]) -> Any:
    """The expression at an index of something that it broadcasts to."""
    if isinstance(expression, Leaf):
        return buffers[expression.number](*_own(expression.shape, index))
    if not isinstance(expression, Apply):
        return T.float32(expression)
    index = _own(expression.shape, index)
    if expression.op == "gather":
        table, indices = expression.operands
        row = T.Cast("int32", _value(indices, buffers, index[:-1]))
        return _value(table, buffers, (row, index[-1]))
    operands = [_value(operand, buffers, index) for operand in expression.operands]
    if expression.op in ("cast", "expand"):
        (value,) = operands
        return value if expression.op == "expand" else T.Cast(expression.dtype, value)
    if expression.op not in OPERATIONS:
        raise OptionError(f"elementwise: no operation '{expression.op}'")
    return OPERATIONS[expression.op](*operands)


def _own(shape: Sequence[int], index: Sequence[Any]) -> list[Any]:
    """The index of a tensor at an index of what it broadcasts to."""
    return [0 if extent == 1 else i for extent, i in zip(shape, index[len(index) - len(shape) :], strict=True)]
