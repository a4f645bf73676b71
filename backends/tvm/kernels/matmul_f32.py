"""Float batched matrix product of two activations: the right side is packed into vectors of columns first, in the kernel."""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....ir.errors import OptionError
from .base import LANES, Convolution, padded
from .convolution_f32 import Product, emit_product
from .emit import arguments, bind, build, loop, parallel_kind, store
from .float_base import NO_ACTIVATION, VECTOR, Tile, level_of


def matmul(
    lead: tuple[int, ...],
    rows: int,
    inner: int,
    columns: int,
    transposed: bool = False,
    level: str = "avx512",
    tile: Tile | None = None,
    name: str = "matmul_f32",
) -> tirx.PrimFunc:
    """(A [*lead, M, K], B [*lead, K, N] or, transposed, [*lead, N, K], Y [*lead, M, N]), all dense.

    Raises:
        OptionError: an empty extent, or a tile that does not fit the register file. UnknownNameError: unknown level.
    """
    if min((*lead, rows, inner, columns)) < 1:
        raise OptionError(f"matmul: every extent must be at least 1, got {lead}, {rows} x {inner} x {columns}")
    batch = prod(lead)
    lines = Convolution(batch, inner, 1, rows, columns, (1, 1))

    def body() -> None:
        a, b, y = arguments(
            ("A", (*lead, rows, inner), "float32"),
            ("B", (*lead, columns, inner) if transposed else (*lead, inner, columns), "float32"),
            ("Y", (*lead, rows, columns), "float32"),
        )
        packed = T.alloc_buffer((batch * padded(columns) * inner,), "float32")
        _pack(b, packed, batch, inner, columns, transposed)
        emit_product(Product(lines, inner, columns, NO_ACTIVATION, batched=True), level_of(level), tile, a, packed, None, y)

    return build(name, body)


def _pack(b: Any, packed: Any, batch: int, inner: int, columns: int, transposed: bool) -> None:
    """packed[image][column / LANES][k][lane]; lanes past the last column repeat it, and are never stored."""
    groups = padded(columns) // LANES
    with loop(batch * groups, parallel_kind(batch * groups * inner * LANES / 4000)) as index:
        image, group = bind(T.floordiv(index, groups)), bind(T.floormod(index, groups))
        full = columns // LANES

        def copy(lanes: int) -> None:
            with loop(inner) as k:
                target = (index * inner + k) * LANES
                if lanes == LANES and not transposed:
                    store(packed, target, b.vload([(image * inner + k) * columns + group * LANES], VECTOR))
                    return
                for lane in range(LANES):
                    column = group * LANES + min(lane, lanes - 1)
                    source = (image * columns + column) * inner + k if transposed else (image * inner + k) * columns + column
                    T.buffer_store(packed, b.vload([source]), [target + lane])

        if full == groups:
            copy(LANES)
        elif full == 0:
            copy(columns)
        else:
            with T.If(group < full):
                with T.Then():
                    copy(LANES)
                with T.Else():
                    copy(columns % LANES)
