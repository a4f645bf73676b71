"""The launch of several int8 linear layers of the same rows, from plain numbers: no TVM here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from ...kernels.base import Tail, padded
from .blocks import MULTIPROCESSORS, Block, choose, power_of_two
from .plan_int8 import flip_of, linear_problem, pack_linear, require_depth
from .plans import Buffer, Constant, Plan

#: Layers of one launch that have tiles of their own: queries, keys and values.
MOST_PARTS = 3

#: Outputs of a layer that rides along with the others (`triton_linears.RIDER`).
MOST_RIDING = 16

#: Rows of a riding layer that one program computes, at least, and the most of the inner dimension that it reads at once.
LEAST_SIDE, MOST_SIDE_DEPTH = 16, 512

#: Outputs that fill a large chip with tiles of 128 by 128.
FILLED = MULTIPROCESSORS["sm_90"] * 128 * 128


@dataclass(frozen=True)
class Part:
    """One of the layers: outputs of a row, and how they are finished."""

    outer: int
    tail: Tail


@dataclass(frozen=True)
class Parts:
    """The layers of one launch: one to three with tiles of their own, and one that rides along."""

    own: tuple[Part, ...]
    rider: Part | None = None

    @property
    def all(self) -> tuple[Part, ...]:
        return (*self.own, *([] if self.rider is None else [self.rider]))


def joins(tail: Tail) -> bool:
    """Whether a layer with this tail can be a part."""
    return tail.kind == "rescale" and tail.residual is None


def rides(part: Part, rows: int, beside: int) -> bool:
    """Whether a part rides along with others of `beside` outputs: it is narrow, and they fill the chip without it. Where they do
    not, its programs find room of their own."""
    return part.outer <= MOST_RIDING and rows * beside >= FILLED


def linears(rows: int, inner: int, dtype: str, parts: Parts, level: str, block: Block | None = None) -> Plan:
    """Y_i [rows, outer_i] = tail_i(X [rows, inner] W_i^T)."""
    require_depth(inner)
    block = block or choose(linear_problem(rows, inner, sum(part.outer for part in parts.own)), level)
    named = dict(zip("012", parts.own, strict=False)) | ({} if parts.rider is None else {"rider": parts.rider})
    w_pitch, starts = padded(inner), _starts(parts.all)
    total = starts[-1]
    tables: list[Buffer] = [(f"table_{name}", (256,), part.tail.table) for name, part in named.items() if part.tail.table]
    buffers: tuple[Buffer, ...] = (
        ("X", (rows, inner), dtype),
        ("W", (total, w_pitch), "int8"),
        ("B", (total,), "int32"),
        ("scale", (total,), "float32"),
        *tables,
        *((f"Y_{name}", (rows, part.outer), part.tail.stored) for name, part in named.items()),
    )
    constants: dict[str, Constant] = {"M": rows, "K": inner, "X_PITCH": inner, "W_PITCH": w_pitch, "FLIP": flip_of(dtype)}
    constants |= {"BM": block.rows, "BN": block.columns, "BK": block.depth, "GROUP": block.group}
    constants |= {"KIND": "bounded" if all(part.tail.bounded for part in parts.all) else "rescale"}
    places = dict(zip(named, starts, strict=False))
    for name in ("0", "1", "2", "rider"):
        part = named.get(name, Part(0, Tail("rescale", "uint8")))
        tail, upper = part.tail, name.upper()
        constants |= {f"N_{upper}": part.outer, f"ZERO_POINT_{upper}": tail.zero_point}
        constants |= {f"QMIN_{upper}": tail.qmin, f"QMAX_{upper}": tail.qmax}
        constants |= {f"START_{upper}": places.get(name, 0)} if name != "0" else {}
        constants |= {f"table_{name}": None} if not tail.table else {}
        constants |= {f"y_{name}": None} if name not in named else {}
    tiles = sum(ceil(part.outer / block.columns) for part in parts.own)
    sharing = max(s for s in (1, 2, 4, 8, 16) if s <= tiles and block.rows // s >= min(LEAST_SIDE, block.rows))
    constants |= {"SIDE": block.rows // sharing, "SIDE_K": min(MOST_SIDE_DEPTH, max(32, power_of_two(inner)))}
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
    parts: Parts,
    weights: Sequence[np.ndarray],
    biases: Sequence[np.ndarray | None],
    values: Sequence[dict[str, np.ndarray]],
) -> list[np.ndarray]:
    """Weights, biases and scales one below the other, then the tables there are. weights s8 (outer_i, inner)."""
    packed = [
        pack_linear(dtype, zero_point, part.tail, weight, bias, **value)
        for part, weight, bias, value in zip(parts.all, weights, biases, values, strict=True)
    ]
    tables = [vectors[-1] for part, vectors in zip(parts.all, packed, strict=True) if part.tail.table]
    return [*(np.concatenate(column) for column in zip(*(vectors[:3] for vectors in packed), strict=True)), *tables]
