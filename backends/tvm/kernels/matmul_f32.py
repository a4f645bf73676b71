"""Float batched matrix product of two activations: the right side is packed into vectors of columns first, in the kernel (and in
float32, whatever it is stored in, but for float16 at level `half_neon.LONG`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import tirx

from .base import LANES, Convolution, padded
from .convolution_f32 import Product, emit_product
from .emit import bind, build, loop, parallel_kind, store
from .float_base import PLAIN, FloatSpec, MatrixProduct, declare
from .half import lanes_of, widened
from .half_neon import LONG
from .isa import T


def matmul(shape: MatrixProduct, spec: FloatSpec = PLAIN) -> tirx.PrimFunc:
    """(A [B, M, K], B [B, K, N] or, transposed, [B, N, K], Y [B, M, N]), all dense.

    Raises:
        OptionError: a tile that does not fit the register file. UnknownNameError: unknown level.
    """
    batch, rows, inner, columns = shape.batch, shape.rows, shape.inner, shape.columns
    lines = Convolution(batch, inner, 1, rows, columns, (1, 1))

    def body() -> None:
        right = (batch, columns, inner) if shape.transposed else (batch, inner, columns)
        buffers = declare(spec, (batch, rows, inner), right, 0, (batch, rows, columns), names=("A", "B"))
        packed = T.alloc_buffer((batch * padded(columns) * inner,), "float16" if spec.level == LONG else "float32")
        _pack(buffers.w, packed, shape)
        emit_product(Product(lines, inner, 1, columns, spec, batched=True), replace(buffers, w=packed))

    return build("matmul_f32", body, spec.level)


def _pack(b: Any, packed: Any, shape: MatrixProduct) -> None:
    """packed[image][column / LANES][k][lane]; lanes past the last column repeat it, and are never stored."""
    inner, columns, transposed = shape.inner, shape.columns, shape.transposed

    def read(offset: Any, lanes: int) -> Any:
        same = str(packed.dtype) == str(b.dtype)
        return b.vload([offset], lanes_of(str(b.dtype), lanes)) if same else widened(b, offset, lanes)

    groups, batch = padded(columns) // LANES, shape.batch
    with loop(batch * groups, parallel_kind(batch * groups * inner * LANES / 4000)) as index:
        image, group = bind(T.floordiv(index, groups)), bind(T.floormod(index, groups))
        full = columns // LANES

        def copy(lanes: int) -> None:
            with loop(inner) as k:
                target = (index * inner + k) * LANES
                if lanes == LANES and not transposed:
                    store(packed, target, read((image * inner + k) * columns + group * LANES, LANES))
                    return
                for lane in range(LANES):
                    column = group * LANES + min(lane, lanes - 1)
                    source = (image * columns + column) * inner + k if transposed else (image * inner + k) * columns + column
                    T.buffer_store(packed, read(source, 1), [target + lane])

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
