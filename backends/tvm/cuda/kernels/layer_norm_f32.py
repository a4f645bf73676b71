"""Layer normalization over dense rows: the exact kernel.

Its running sums have N / 16 terms where those of `kernels/layer_norm_f32.py` have N / 64, and its bound is that much larger.
"""

from __future__ import annotations

from tvm import tirx

from . import layer_norm_exact
from .plan_store import VALUE, Store


def layer_norm(
    rows: int, length: int, eps: float, dtype: str = "float32", level: str = "", store: Store = VALUE
) -> tirx.PrimFunc:
    """(X [rows, length], weight [length], bias [length], Y [rows, length]); X and Y of `dtype`, the rest float32.

    store: names the buffers behind the bias.

    Raises OptionError for an empty extent.
    """
    return layer_norm_exact.layer_norm(rows, length, eps, name="layer_norm_f32", dtype=dtype, store=store)
