"""`gw::layer_norm` over dense rows, bit-equal to its torch definition, with the quantization that follows it."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.layer_norm_exact import affine_buffers, require_results
from ...kernels.quantize_image import Quantize
from ...kernels.schedule import te
from ..launch import Constant, device_function
from .plan_store import INVERSE, VALUE, Store
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
    store: Store = VALUE,
    twin: bool = False,
    statistics: bool = False,
) -> tirx.PrimFunc:
    """(X [rows, length], weight [length], bias [length], Y [rows, length]); X and Y of `dtype`, the rest float32.

    quantize: a last buffer Q [rows, length] takes `gw::quantize` of Y; keep=False leaves Y itself out. twin: Q is of a second
    normalization of the same rows, whose weight and bias stand behind the first ones. Without `quantize`, `store` names the
    buffers behind the bias: 8-bit floats may be written, too. statistics: a buffer [rows, 2] before Y or Q takes the mean and the
    inverse deviation of each row.

    Raises:
        OptionError: an empty extent, nothing to write, a twin without both results, or two kinds of codes.
    """
    require_results(rows, length, quantize, keep, twin)
    if quantize is not None and store != VALUE:
        raise OptionError("layer_norm: one kernel makes integers or 8-bit floats of its result, not both")
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
    buffers = [("X", (rows, length), dtype), *affine_buffers(length, twin)]
    kept = store if quantize is None else Store(keep, codes=True)
    buffers += [INVERSE] * store.codes + [("statistics", (rows, 2), "float32")] * statistics
    buffers += [("Y", (rows, length), dtype)] * kept.value
    buffers += [("Q", (rows, length), "uint8" if quantize is None else quantize.dtype)] * kept.codes
    given = {"twin_weight_ptr": twin, "twin_bias_ptr": twin, "inverse_ptr": store.codes}
    given["statistics_ptr"] = statistics
    given |= {"y_ptr": kept.value, "q_ptr": kept.codes}
    constants |= {name: None for name, present in given.items() if not present}
    return device_function(name, buffers, rows_call("layer_norm", rows, constants))


def layer_norm_statistics(rows: int, length: int, eps: float, quantize: Quantize, level: str) -> tirx.PrimFunc:
    """The codes of a normalization, and what others need to normalize the rows as they read them."""
    return layer_norm(rows, length, eps, quantize, False, level, "layer_norm_statistics", statistics=True)


def apply_statistics(rows: int, length: int) -> tirx.PrimFunc:
    """(X [rows, length], statistics [rows, 2], weight [length], bias [length], Y [rows, length]): the rest of a normalization."""
    x, weight = te.placeholder((rows, length), "float32", name="X"), te.placeholder((length,), "float32", name="weight")
    statistics, bias = te.placeholder((rows, 2), "float32", name="statistics"), te.placeholder((length,), "float32", name="bias")

    def value(row: Any, column: Any) -> Any:
        return ((x(row, column) - statistics(row, 0)) * statistics(row, 1)) * weight(column) + bias(column)

    return te.create_prim_func([x, statistics, weight, bias, te.compute((rows, length), value, name="Y")])


def layer_norm_twins(rows: int, length: int, eps: float, quantize: Quantize, level: str) -> tirx.PrimFunc:
    """Two normalizations of the same rows: the value of the first, and the codes of the second."""
    return layer_norm(rows, length, eps, quantize, True, level, "layer_norm_twins", twin=True)
