"""Weights stored as codes of a table: decoded into what the float kernels of a GPU read, or inside a linear layer of few rows.

Codes, scales, zeros and tables are packed as `kernels/coded_f32.Coded` packs them for every target.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...kernels.coded_f32 import Coded, Integers, Minifloat
from ...kernels.float_base import PLAIN, FloatSpec, MatrixProduct
from . import plan_coded
from .family import function
from .family_float import dtype_of, tail_of
from .plan_coded import Codes


def codes_of(coded: Coded) -> Codes:
    rule: dict[str, Any] = {}
    if isinstance(coded.rule, Integers):
        rule = {"rule": "integers", "first": coded.rule.first}
    elif isinstance(coded.rule, Minifloat):
        numbers = {"origin": coded.rule.origin, "mantissa": coded.rule.mantissa_bits, "lowest": coded.rule.lowest}
        rule = {"rule": "minifloat", **numbers}
    sizes = coded.rows, coded.count, coded.bits, coded.group, coded.groups, coded.entries, coded.zero, coded.taps
    return Codes(*sizes, **rule)


def decode(coded: Coded, level: str = "sm_90") -> tirx.PrimFunc:
    """(the buffers of `Coded.arguments`, W float32): [rows padded, k padded] with k = (tap, channel), or [taps, rows padded]
    where a row has one channel, as depthwise convolutions read it. Every product is rounded once."""
    return function(plan_coded.decode(codes_of(coded)))


def linear(shape: MatrixProduct, coded: Coded, spec: FloatSpec = PLAIN) -> tirx.PrimFunc:
    """(X [M, K], R [M, N] if the spec has a residual, the buffers of `Coded.arguments`, bias [padded(N)], Y [M, N]), all dense.

    A result differs from the exact one by at most (K + 4) * eps * (sum |x| |w| + |bias|).
    """
    return function(plan_coded.linear(shape.rows, codes_of(coded), dtype_of(spec), tail_of(spec)))
