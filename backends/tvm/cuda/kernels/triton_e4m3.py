"""Values of a tile in memory, as floats and as e4m3 bytes for layers that multiply those. Imports Triton and nothing else."""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_of(value):
    """The bytes of e4m3(clamp(value, -448, 448)), to nearest, half to even; NaN is 0x7f. As `gw::quantize_fp8`.

    In integers, so that every chip and the interpreter give the same bytes. Normal numbers: the 20 bits that are cut off round
    the rest by a carry. Below 2^-6 the step is 2^-9 whatever the exponent: added to 2^14, the sum's last bit is that step.
    """
    size = tl.minimum(tl.abs(value), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(value == value, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def keep(value, y, codes, inverse, offsets, mask):
    """Stores float32 values into `y`, and what `y` then holds, times the one number of `inverse`, as bytes into `codes`.

    None: not stored. Without `y` the codes are of the values themselves, which are rounded once less.
    """
    if y is not None:
        rounded = value.to(y.dtype.element_ty)
        tl.store(y + offsets, rounded, mask=mask)
        value = rounded.to(tl.float32)
    if codes is not None:
        tl.store(codes + offsets, codes_of(value * tl.load(inverse)), mask=mask)
