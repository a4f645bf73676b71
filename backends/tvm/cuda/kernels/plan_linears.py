"""The launch of several int8 linear layers of the same rows, from plain numbers: no TVM here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from ...kernels.base import Tail, padded
from .blocks import Block, choose
from .plan_int8 import flip_of, linear_problem, pack_linear, require_depth
from .plans import Buffer, Constant, Plan

#: Layers of one launch: queries, keys and values.
MOST_PARTS = 3


@dataclass(frozen=True)
class Part:
    """One of the layers: outputs of a row, and how they are finished."""

    outer: int
    tail: Tail


def joins(tail: Tail) -> bool:
    """Whether a layer with this tail can be a part."""
    return tail.kind == "rescale" and tail.residual is None


def linears(rows: int, inner: int, dtype: str, parts: Sequence[Part], level: str, block: Block | None = None) -> Plan:
    """Y_i [rows, outer_i] = tail_i(X [rows, inner] W_i^T) of two or three parts."""
    require_depth(inner)
    block = block or choose(linear_problem(rows, inner, sum(part.outer for part in parts)), level)
    w_pitch, starts = padded(inner), _starts(parts)
    total = starts[-1]
    tables: list[Buffer] = [(f"table_{i}", (256,), p.tail.table) for i, p in enumerate(parts) if p.tail.table]
    buffers: tuple[Buffer, ...] = (
        ("X", (rows, inner), dtype),
        ("W", (total, w_pitch), "int8"),
        ("B", (total,), "int32"),
        ("scale", (total,), "float32"),
        *tables,
        *((f"Y_{i}", (rows, part.outer), part.tail.stored) for i, part in enumerate(parts)),
    )
    constants: dict[str, Constant] = {"M": rows, "K": inner, "X_PITCH": inner, "W_PITCH": w_pitch, "FLIP": flip_of(dtype)}
    constants |= {"BM": block.rows, "BN": block.columns, "BK": block.depth, "GROUP": block.group}
    constants |= {f"START_{i}": starts[i] for i in (1, 2)}
    for i in range(MOST_PARTS):
        part = parts[i] if i < len(parts) else Part(0, Tail("rescale", "uint8"))
        tail = part.tail
        constants |= {f"N_{i}": part.outer, f"ZERO_POINT_{i}": tail.zero_point, f"QMIN_{i}": tail.qmin, f"QMAX_{i}": tail.qmax}
        constants |= {f"table_{i}": None} if not tail.table else {}
        constants |= {f"y_{i}": None} if i >= len(parts) else {}
    tiles = sum(ceil(part.outer / block.columns) for part in parts)
    grid = (ceil(rows / block.rows) * tiles, 1, 1)
    return Plan("triton_linears:linears", constants, grid, buffers, block.warps, block.stages)


def _starts(parts: Sequence[Part]) -> list[int]:
    """Where the rows of each part begin, and where the last ones end."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + padded(part.outer))
    return starts


def pack(
    dtype: str,
    zero_point: int,
    parts: Sequence[Part],
    weights: Sequence[np.ndarray],
    biases: Sequence[np.ndarray | None],
    values: Sequence[dict[str, np.ndarray]],
) -> list[np.ndarray]:
    """Weights, biases and scales one below the other, then the tables there are. weights s8 (outer_i, inner)."""
    packed = [
        pack_linear(dtype, zero_point, part.tail, weight, bias, **value)
        for part, weight, bias, value in zip(parts, weights, biases, values, strict=True)
    ]
    tables = [vectors[-1] for part, vectors in zip(parts, packed, strict=True) if part.tail.table]
    return [*(np.concatenate(column) for column in zip(*(vectors[:3] for vectors in packed), strict=True)), *tables]
