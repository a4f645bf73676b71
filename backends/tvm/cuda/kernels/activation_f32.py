"""A float function of one tensor, element by element; without one, a cast.

CUDA's own functions are within 2 ulp; nothing is approximated further.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.float_base import Activation
from ...kernels.schedule import te


def _number(value: float) -> Any:
    return tirx.const(value, "float32")


def _sigmoid(x: Any) -> Any:
    return _number(1.0) / (_number(1.0) + tirx.exp(_number(0.0) - x))


def _silu(x: Any) -> Any:
    # Below -104 the quotient is 0; clamping there keeps infinity / infinity out.
    low = te.max(x, _number(-104.0))
    return low / (_number(1.0) + tirx.exp(_number(0.0) - low))


def _gelu(x: Any) -> Any:
    return _number(0.5) * x * (_number(1.0) + tirx.erf(x * _number(sqrt(0.5))))


def _gelu_tanh(x: Any) -> Any:
    inner = x * _number(0.7978845608028654) * (_number(1.0) + _number(0.044715) * x * x)
    return _number(0.5) * x * (_number(1.0) + tirx.tanh(inner))


def _hardsigmoid(x: Any) -> Any:
    return te.max(te.min(x + _number(3.0), _number(6.0)), _number(0.0)) * _number(1.0 / 6.0)


def _hardswish(x: Any) -> Any:
    # The factor is exactly 0 below -3; clamping x there keeps infinity * 0 out.
    return te.max(x, _number(-3.0)) * _hardsigmoid(x)


#: The functions of `kernels/vector_math.py`, by name.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": tirx.exp,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "tanh": tirx.tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
}


def activated(function: Activation, value: Any) -> Any:
    """`function` of a float32 expression."""
    if function.function is not None:
        value = FUNCTIONS[function.function](value)
    if function.low is not None:
        value = te.max(value, _number(function.low))
    if function.high is not None:
        value = te.min(value, _number(function.high))
    return value


def activation(
    size: int, function: Activation, dtypes: tuple[str, str] = ("float32", "float32"), level: str = ""
) -> tirx.PrimFunc:
    """(X [size], Y [size]) of the two types, computed in float32. Raises OptionError for an empty extent."""
    if size < 1:
        raise OptionError(f"activation: the size must be at least 1, got {size}")
    x = te.placeholder((size,), dtypes[0], name="X")
    value = lambda i: activated(function, x(i).astype("float32")).astype(dtypes[1])  # noqa: E731
    return te.create_prim_func([x, te.compute((size,), value, name="out")])
