"""Launches of the kernels that read weights as codes of a table, from plain numbers: no TVM here."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...kernels.base import padded
from .blocks import power_of_two
from .plan_float import FloatTail
from .plans import Buffer, Constant, Plan

#: Bytes (or weights) of a row that a warp takes in a step of the linear layer: with 16 rows, 32 bytes a thread.
STEP_BYTES = 64


@dataclass(frozen=True)
class Codes:
    """A weight (rows, count) as `kernels/coded_f32.Coded` packs it.

    rule: "integers" with `first`, "minifloat" with origin, mantissa and lowest, or "table" of `entries`.
    """

    rows: int
    count: int
    bits: int
    group: int
    groups: int
    entries: int
    zero: bool = False
    taps: int = 1
    rule: str = "table"
    first: int = 0
    origin: int = 0
    mantissa: int = 0
    lowest: int = 0

    @property
    def row_bytes(self) -> int:
        return -(-self.count * self.bits // 8)

    @property
    def panels(self) -> int:
        return padded(self.rows) // 16

    @property
    def channels(self) -> int:
        """Channels that a tap has in the decoded weight; as `plan_int8.channels_read`."""
        present = self.count // self.taps
        return present if self.taps == 1 else next((few for few in (4, 8) if present <= few), padded(present))

    def buffers(self) -> list[Buffer]:
        grid = (self.panels, self.groups, 16)
        zero = [("zero", grid, "float32")] if self.zero else []
        table = [("table", (padded(self.entries),), "float32")] if self.rule == "table" else []
        return [("codes", (self.panels, self.row_bytes, 16), "uint8"), ("scale", grid, "float32"), *zero, *table]

    @property
    def constants(self) -> dict[str, Constant]:
        missing = ([] if self.zero else ["zero"]) + ([] if self.rule == "table" else ["table"])
        return {
            "BITS": self.bits,
            "GROUP": self.group,
            "GROUPS": self.groups,
            "ROW_BYTES": self.row_bytes,
            "RULE": self.rule,
            "FIRST": self.first,
            "ORIGIN": self.origin,
            "MANTISSA": self.mantissa,
            "LOWEST": self.lowest,
            "ZEROS": self.zero,
            **dict.fromkeys(missing),
        }


#: Bytes of a row that threads side by side read at once: with 16 rows, a line of memory.
LINE_BYTES = 8


@dataclass(frozen=True)
class Row:
    """How the products of one row run. unroll: lines of one group, one after another, that a thread reads from."""

    warps: int
    unroll: int


def row_of(codes: Codes) -> Row:
    """Measured on an H200: few panels need many warps to have enough loads on their way, and of many short ones, which would wait
    for the sum over their warps, one warp each is best."""
    if codes.panels > 2048 and codes.row_bytes <= 1024:
        return Row(1, unroll_of(codes))
    if codes.panels > 264:  # two for each multiprocessor
        return Row(8, unroll_of(codes))
    return Row(16 if codes.row_bytes > 1024 else 8, unroll_of(codes, 4 if codes.row_bytes % 2048 == 0 else 2))


def unroll_of(codes: Codes, most: int = 4) -> int:
    """A thread's lines are all of one group."""
    weights = LINE_BYTES * (8 // codes.bits)
    return next(few for few in (most, 2, 1) if few == 1 or codes.groups == 1 or codes.group % (few * weights) == 0)


def linear(rows: int, codes: Codes, dtype: str, tail: FloatTail, row: Row | None = None) -> Plan:
    """Y [rows, N] = act(X [rows, K] W^T + bias + residual); every row decodes for itself, so rows are few."""
    residual = [("R", (rows, codes.rows), dtype)] if tail.residual else []
    buffers = (
        ("X", (rows, codes.count), dtype),
        *residual,
        *codes.buffers(),
        ("bias", (padded(codes.rows),), "float32"),
        ("Y", (rows, codes.rows), dtype),
    )
    constants = {"N": codes.rows, "K": codes.count} | codes.constants | tail.constants
    grid = (codes.panels, rows, 1)
    if codes.rule == "integers" and 8 % codes.bits == 0 and not codes.zero:
        row = row or row_of(codes)
        sizes: dict[str, Constant] = {"WARPS": row.warps, "UNROLL": row.unroll}
        return Plan("triton_coded:linear_of_integers", constants | sizes, grid, buffers, row.warps, 1)
    warps = row.warps if row else _warps_of(codes)
    return Plan("triton_coded:linear", constants | _steps(codes, warps), grid, buffers, warps, 3)


def _warps_of(codes: Codes) -> int:
    """Adding up a panel's partial sums costs each warp the same, however short the rows are: short ones get one."""
    return 1 if codes.row_bytes <= 1024 else 2 if codes.row_bytes <= 2048 else 4


def _steps(codes: Codes, warps: int) -> dict[str, Constant]:
    """Bytes (or weights, where a byte holds no whole number of them) of a run, all of one group, and runs of a step."""
    whole = 8 % codes.bits == 0
    step = min(STEP_BYTES * warps, power_of_two(codes.row_bytes if whole else codes.count))
    chunk = step
    if codes.groups > 1:
        while chunk > 1 and codes.group % (chunk * (8 // codes.bits if whole else 1)):
            chunk //= 2
    return {"CHUNK": chunk, "CHUNKS": step // chunk}


def decode(codes: Codes, dtype: str = "float32") -> Plan:
    """The weight as the float kernels of a GPU read it: [N padded, k padded], or [taps, N padded] where a tap has one channel."""
    depthwise = codes.taps > 1 and codes.count == codes.taps
    channels = 1 if depthwise else codes.channels
    depth = codes.taps if depthwise else padded(codes.taps * channels)
    wide = padded(codes.rows)
    steps = (1, wide) if depthwise else (depth, 1)
    block = min(64, power_of_two(depth))
    constants: dict[str, Constant] = {"COUNT": codes.count, "TAPS": codes.taps, "CHANNELS": channels, "DEPTH": depth, "BK": block}
    constants |= {"ROW_STEP": steps[0], "INNER_STEP": steps[1]} | codes.constants
    shape = (codes.taps, wide) if depthwise else (wide, depth)
    grid = (codes.panels, ceil(depth / block), 1)
    return Plan("triton_coded:decode", constants, grid, (*codes.buffers(), ("W", shape, dtype)), 4, 1)
