"""Launch of the int8 attention kernel, from plain numbers: no TVM here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ...kernels.base import Tail
from .blocks import MULTIPROCESSORS, power_of_two
from .plan_int8 import flip_of, missing_pointers, tail_buffers, tail_constants
from .plans import Constant, Plan

#: Keys up to this many are scored once and kept in registers; rows of more sweep them three times.
MOST_KEPT = 512

#: Keys of one step of a sweep.
SWEPT = 128

#: Scores, or elements of Q and Y, that a warp keeps: 64 registers in each of its threads.
MOST_VALUES = 64 * 32

#: Programs that give every multiprocessor of a large chip one.
PROGRAMS = MULTIPROCESSORS["sm_90"]

#: The widest head and value that stay in one program's registers.
MOST_WIDTH = 256


@dataclass(frozen=True)
class Heads:
    """Where an operand lies: element [outer, head, row, column] at start + outer * outer_step + ... of its buffer."""

    start: int
    outer: int
    head: int
    row: int
    column: int


def mask_and_output(mask: Heads | None, y: Heads) -> dict[str, Constant]:
    """Constants of the places of the mask, if there is one (its columns are neighbours), and of Y, which begins its buffer."""
    place = mask or Heads(0, 0, 0, 0, 0)
    constants: dict[str, Constant] = {
        "MASKED": mask is not None,
        "MASK_START": place.start,
        "MASK_OUTER": place.outer,
        "MASK_HEAD": place.head,
        "MASK_ROW": place.row,
        "Y_OUTER": y.outer,
        "Y_HEAD": y.head,
        "Y_ROW": y.row,
    }
    return constants | ({} if mask is not None else {"mask": None})


@dataclass(frozen=True)
class IntegerAttention:
    """Sizes, places (k: rows are the inner dimension, columns the keys; v: rows are keys) and quantizations."""

    outer: int
    heads: int
    rows: int
    inner: int
    keys: int
    columns: int
    q: Heads
    k: Heads
    v: Heads
    mask: Heads | None
    y: Heads
    q_dtype: str
    q_zero_point: int
    scale: float
    p_inverse: float
    p_zero_point: int
    p_qmin: int
    p_qmax: int
    p_dtype: str


def fits_chip(rows: int, inner: int, keys: int, columns: int) -> bool:
    return inner <= MOST_WIDTH and columns <= MOST_WIDTH


def warps_of(rows: int) -> int:
    """Of a program of so many query rows."""
    return max(4, rows // 16)


def rows_of(shape: IntegerAttention, keys: int) -> int:
    """Query rows of a program: the most whose values stay in registers and that leave a program for every multiprocessor.

    From 64 rows on each warp has sixteen whole rows, so that a softmax stays inside its warp.
    """
    kept = max(keys, power_of_two(shape.inner) + power_of_two(shape.columns))
    for rows in (128, 64, 32):
        if (
            rows * kept <= MOST_VALUES * warps_of(rows)
            and rows < 2 * shape.rows
            and shape.outer * shape.heads * ceil(shape.rows / rows) >= PROGRAMS
        ):
            return rows
    return 16


def attention(shape: IntegerAttention, sources: Sequence[tuple[int, ...]], out: tuple[int, ...], tail: Tail) -> Plan:
    """sources: shapes of the buffers of Q, K, V and the mask, if there is one; out: of Y."""
    keys = max(32, power_of_two(shape.keys))
    keys = keys if keys <= MOST_KEPT else SWEPT
    rows = rows_of(shape, keys)
    constants: dict[str, Constant] = {
        "ROWS": shape.rows,
        "WIDTH": shape.inner,
        "KEYS": shape.keys,
        "VALUES": shape.columns,
        "HEADS": shape.heads,
        "Q_START": shape.q.start,
        "Q_OUTER": shape.q.outer,
        "Q_HEAD": shape.q.head,
        "Q_ROW": shape.q.row,
        "Q_INNER": shape.q.column,
        "K_START": shape.k.start,
        "K_OUTER": shape.k.outer,
        "K_HEAD": shape.k.head,
        "K_INNER": shape.k.row,
        "K_KEY": shape.k.column,
        "V_START": shape.v.start,
        "V_OUTER": shape.v.outer,
        "V_HEAD": shape.v.head,
        "V_KEY": shape.v.row,
        "V_COLUMN": shape.v.column,
        "Q_FLIP": flip_of(shape.q_dtype),
        "Q_OFFSET": 128 * flip_of(shape.q_dtype) - shape.q_zero_point,
        "SCORE_SCALE": shape.scale,
        "P_INVERSE": shape.p_inverse,
        "P_ZERO_POINT": shape.p_zero_point,
        "P_QMIN": shape.p_qmin,
        "P_QMAX": shape.p_qmax,
        "P_FLIP": flip_of(shape.p_dtype),
        "P_OFFSET": 128 * flip_of(shape.p_dtype) - shape.p_zero_point,
        "BM": rows,
        "BN": keys,
        "BD": max(32, power_of_two(shape.inner)),
        "BV": max(16, power_of_two(shape.columns)),
    }
    finish = {name: value for name, value in tail_constants(tail).items() if name in ("KIND", "ZERO_POINT", "QMIN", "QMAX")}
    absent = {name: None for name in missing_pointers(tail) if name not in ("residual", "table")}
    dtypes = (shape.q_dtype, "int8", "int8", "float32")
    inputs = [(name, source, dtype) for name, source, dtype in zip(("Q", "K", "V", "mask"), sources, dtypes, strict=False)]
    buffers = (*inputs, *tail_buffers(tail, shape.columns), ("Y", out, tail.dtype))
    grid = (ceil(shape.rows / rows), shape.outer * shape.heads, 1)
    return Plan(
        "triton_attention:attention",
        constants | mask_and_output(shape.mask, shape.y) | finish | absent,
        grid,
        buffers,
        warps_of(rows),
        1,
    )
