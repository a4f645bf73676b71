"""Vectorised element-wise kernels from an expression, for float islands such as quantize, dequantize and fused additions.

    elementwise((8, 100), ("uint8",), "float32", lambda q: (T.Cast(VECTOR, q) - splat(T.float32(z))) * splat(T.float32(s)))

The expression gets one vector of LANES elements per input and returns one of the output's type. Where the definition rounds a
product before an addition, write `exact_float.product(a, b)` and not `a * b`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES
from .emit import arguments, bind, build, loop, parallel_kind
from .exact_float import dtype_of
from .float_base import load_lanes, store_lanes

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 2000


def elementwise(
    shape: tuple[int, ...],
    inputs: tuple[str, ...],
    output: str,
    expression: Callable[..., Any],
    name: str = "elementwise_exact",
) -> tirx.PrimFunc:
    """(X0 .. Xn-1 [shape] of the dtypes `inputs`, Y [shape] of dtype `output`), all dense.

    Raises:
        OptionError: an empty extent, or an expression of another dtype than `output`.
    """
    size = prod(shape)
    if size < 1:
        raise OptionError(f"elementwise: every extent must be at least 1, got {shape}")

    def body() -> None:
        specs = [(f"X{index}", shape, dtype) for index, dtype in enumerate(inputs)]
        *sources, target = arguments(*specs, ("Y", shape, output))

        def emit(start: Any, valid: int) -> None:
            lanes = [load_lanes(source, start, valid, dtype=dtype) for source, dtype in zip(sources, inputs, strict=True)]
            value = bind(expression(*lanes))
            if dtype_of(value) != f"{output}x{LANES}":
                raise OptionError(f"elementwise: the expression gives {dtype_of(value)}, expected {output}x{LANES}")
            store_lanes(target, start, value, valid, output)

        full, rest = divmod(size, LANES)
        if full:
            with loop(full, parallel_kind(size / ELEMENTS_PER_US)) as index:
                emit(index * LANES, LANES)
        if rest:
            emit(full * LANES, rest)

    return build(name, body)
