"""`gw::layer_norm` over dense rows, bit-equal to its torch definition, with the quantization that follows it."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.quantize_image import Quantize
from ..launch import Constant, device_function
from .rows import rows_call


def layer_norm(
    rows: int,
    length: int,
    eps: float,
    quantize: Quantize | None = None,
    keep: bool = True,
    level: str = "",
    name: str = "layer_norm_exact",
    dtype: str = "float32",
) -> tirx.PrimFunc:
    """(X [rows, length], weight [length], bias [length], Y [rows, length]); X and Y of `dtype`, the rest float32.

    quantize: a last buffer Q [rows, length] takes `gw::quantize` of Y; keep=False leaves Y itself out.

    Raises:
        OptionError: an empty extent, or nothing to write.
    """
    if min(rows, length) < 1:
        raise OptionError(f"layer_norm: every extent must be at least 1, got {rows} x {length}")
    if quantize is None and not keep:
        raise OptionError("layer_norm: keep=False without quantize leaves nothing to write")
    constants: dict[str, Constant] = {
        "ROWS": rows,
        "LENGTH": length,
        "EPS": float(np.float32(eps)),
        "MEAN": float(np.float32(1.0) / np.float32(length)),
        "STEPS": 1.0 if quantize is None else quantize.inverse,
        "LOW": 0.0 if quantize is None else float(quantize.qmin - quantize.zero_point),
        "HIGH": 0.0 if quantize is None else float(quantize.qmax - quantize.zero_point),
        "ZERO": 0 if quantize is None else quantize.zero_point,
    }
    buffers = [("X", (rows, length), dtype), ("weight", (length,), "float32"), ("bias", (length,), "float32")]
    if keep:
        buffers.append(("Y", (rows, length), dtype))
    else:
        constants["y_ptr"] = None
    if quantize is not None:
        buffers.append(("Q", (rows, length), quantize.dtype))
    else:
        constants["q_ptr"] = None
    return device_function(name, buffers, rows_call("layer_norm", rows, constants))
