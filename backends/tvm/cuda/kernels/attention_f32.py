"""Float attention in one kernel, over blocks of keys: Y = softmax(scale Q K^T + mask) V; see `triton_float.attention`.

Operands are read where they lie; buffers are those of `kernels/attention_f32`: Q, K, V, (M), Y. Scores are off by
s = (width + 4) * 2^-23 * (scale * sum |q| |k| + |mask|), and |y - exact| <= (2 s + (keys + 64) * 2^-23) * sum p |v|, with
two roundings more, of probabilities and of the result, where the operands are half-precision.
"""

from __future__ import annotations

from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.attention_f32 import Attention, Rows
from . import plan_float
from .family import function
from .family_float import PRECISION, dtype_of
from .plan_attention import MOST_WIDTH, Heads
from .plan_store import VALUE, Store


def _heads(rows: Rows) -> Heads:
    return Heads(rows.offset, rows.image, rows.head, rows.row, 1)


def attention(shape: Attention, level: str = "sm_90", store: Store = VALUE) -> tirx.PrimFunc:
    """The kernel; `store` names its last buffers.

    Raises:
        OptionError: heads of more than MOST_WIDTH numbers, which one program cannot hold.
    """
    if max(shape.width, shape.value_width) > MOST_WIDTH:
        raise OptionError(f"attention kernel: heads of {shape.width} and {shape.value_width}; {MOST_WIDTH} is the most")
    mask = [] if shape.mask is None else [shape.mask]
    places = plan_float.FloatAttention(
        outer=shape.batch,
        heads=shape.heads,
        rows=shape.queries,
        width=shape.width,
        keys=shape.keys,
        values=shape.value_width,
        scale=shape.scale,
        q=_heads(shape.query),
        k=_heads(shape.key),
        v=_heads(shape.value),
        mask=None if shape.mask is None else _heads(shape.mask),
        y=_heads(shape.out_rows()),
    )
    sizes = [rows.size for rows in (shape.query, shape.key, shape.value, *mask)]
    return function(plan_float.attention(places, sizes, shape.out, dtype_of(shape), PRECISION, store))
