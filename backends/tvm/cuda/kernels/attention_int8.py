"""Attention of the integer stage in one kernel, bit-equal to its parts; see `triton_attention`.

Specification and buffers are those of `kernels/attention_int8`: Q, K, V, (mask), the tail's parameters, Y.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.attention_int8 import AttentionInt8
from ...kernels.base import Tail
from . import plan_int8
from .family import function
from .plan_attention import Heads, IntegerAttention, attention, fits_chip


def fits(spec: AttentionInt8, level: str) -> bool:
    """Whether the kernel can run: at most two batch axes, and a head small enough for one program's registers."""
    rows, inner, keys, columns = spec.sizes
    mask = spec.mask is None or spec.mask.strides[-1] == 1
    return len(spec.batch) <= 2 and mask and fits_chip(rows, inner, keys, columns)


def _heads(strides: tuple[int, ...], start: int) -> Heads:
    outer, head, row, column = (0,) * (4 - len(strides)) + tuple(strides)
    return Heads(start, outer, head, row, column)


def build(spec: AttentionInt8, tail: Tail, level: str, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel. Raises OptionError where `fits` says no."""
    if not fits(spec, level):
        raise OptionError(f"attention kernel: {spec.sizes} (rows, inner, keys, columns) of batch {spec.batch} does not fit")
    rows, inner, keys, columns = spec.sizes
    outer, heads = (1, 1, *spec.batch)[-2:]
    row, head = (columns * heads, columns) if spec.swapped else (columns, columns * rows)
    shape = IntegerAttention(
        outer=outer,
        heads=heads,
        rows=rows,
        inner=inner,
        keys=keys,
        columns=columns,
        q=_heads(spec.q.strides, spec.q.start),
        k=_heads(spec.k.strides, spec.k.start),
        v=_heads(spec.v.strides, spec.v.start),
        mask=None if spec.mask is None else _heads(spec.mask.strides, spec.mask.start),
        y=Heads(0, rows * heads * columns, head, row, 1),
        q_dtype=spec.q_dtype,
        q_zero_point=spec.q_zero_point,
        scale=spec.scale,
        p_inverse=spec.quantize.inverse,
        p_zero_point=spec.quantize.zero_point,
        p_qmin=spec.quantize.qmin,
        p_qmax=spec.quantize.qmax,
        p_dtype=spec.quantize.dtype,
    )
    sources = [spec.q.source, spec.k.source, spec.v.source, *([] if spec.mask is None else [spec.mask.source])]
    return function(attention(shape, sources, spec.out_shape, tail), name)


def pack(spec: AttentionInt8, tail: Tail, level: str, **values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The tail's parameters, expanded; values (1,) or (D,)."""
    return plan_int8.pack_tail(tail, spec.sizes[-1], **values)
