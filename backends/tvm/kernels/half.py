"""Half-precision tensors in kernels: 16 bits in memory, float32 in registers, one rounding to nearest even at each store.

bfloat16 is the upper half of a float32: widening is a shift. The LLVM inside TVM cannot hold such a type, so kernels read a
bfloat16 buffer as `uint16` bits. Level "avx512-bf16" rounds and multiplies with AVX512_BF16 (Intel 64 manual, volume 2):

    vcvtneps2bf16   rounds a vector; subnormal numbers become zero
    vdpbf16ps       acc[lane] += a[2 lane + 1] * b[2 lane + 1], then + a[2 lane] * b[2 lane]; subnormal numbers count as zero

Every other level rounds with integer instructions. float16 conversions are instructions of every supported level.

Weights of products lie in pairs of channels, [..., C / 2, LANES, 2] for bfloat16 (zeros past an odd last one): the order of
vdpbf16ps, and one instruction widens all first or all second elements. float16 weights lie as float32 ones do.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .base import LANES, padded
from .isa import T

#: Stored type -> the type that kernels declare a view of it with.
VIEWS = {"bfloat16": "uint16"}

#: numpy's types of what is stored.
NUMPY: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

#: Level whose kernels may use AVX512_BF16.
NATIVE = "avx512-bf16"

#: What those kernels call. LLVM's own signatures hold bfloat, which no TIR type becomes.
NATIVE_CODE = f"""
declare <{LANES} x float> @llvm.x86.avx512bf16.dpbf16ps.512(<{LANES} x float>, <32 x bfloat>, <32 x bfloat>)

define <{LANES} x i16> @gw_round_bfloat16(<{LANES} x float> %x) {{
  %rounded = fptrunc <{LANES} x float> %x to <{LANES} x bfloat>
  %bits = bitcast <{LANES} x bfloat> %rounded to <{LANES} x i16>
  ret <{LANES} x i16> %bits
}}

define <{LANES} x float> @gw_dot_bfloat16(<{LANES} x float> %acc, <{LANES} x i32> %a, <{LANES} x i32> %b) {{
  %x = bitcast <{LANES} x i32> %a to <32 x bfloat>
  %y = bitcast <{LANES} x i32> %b to <32 x bfloat>
  %sum = call <{LANES} x float> @llvm.x86.avx512bf16.dpbf16ps.512(<{LANES} x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <{LANES} x float> %sum
}}
"""


def lanes_of(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def is_half(buffer: Any) -> bool:
    """Whether a kernel's (flat) buffer holds half-precision numbers."""
    return str(buffer.dtype) in ("uint16", "float16")


def widened(buffer: Any, offset: Any, lanes: int = LANES) -> Any:
    """`lanes` elements of a float buffer, as float32."""
    dtype, single = str(buffer.dtype), lanes_of("float32", lanes)
    value = buffer.vload([offset], lanes_of(dtype, lanes))
    if dtype == "uint16":
        shift = T.uint32(16) if lanes == 1 else T.Broadcast(T.uint32(16), lanes)
        return T.reinterpret(single, T.shift_left(T.Cast(lanes_of("uint32", lanes), value), shift))
    return T.Cast(single, value) if dtype == "float16" else value


def rounded(value: Any, dtype: str, level: str) -> Any:
    """LANES float32 numbers in the type of a kernel's buffer."""
    if dtype == "float32":
        return value
    if dtype == "float16":
        return T.Cast(f"float16x{LANES}", value)
    if level == NATIVE:
        return T.call_extern(f"uint16x{LANES}", "gw_round_bfloat16", value)
    bits = T.Bind(T.reinterpret(f"uint32x{LANES}", value))
    number = lambda n: T.Broadcast(T.uint32(n), LANES)  # noqa: E731
    odd = T.bitwise_and(T.shift_right(bits, number(16)), number(1))
    return T.Cast(f"uint16x{LANES}", T.shift_right(bits + odd + number(0x7FFF), number(16)))


def weight_step(dtype: str) -> int:
    """Channels that lie beside each other in a product's packed weights."""
    return 2 if dtype == "bfloat16" else 1


def stored_panels(panels: np.ndarray, channels: int, dtype: str) -> np.ndarray:
    """Packed float32 weights [panels, taps * channels, LANES] in the order of `dtype`, each tap's channels padded to its step."""
    if dtype == "float32":
        return panels
    step = weight_step(dtype)
    taps, even = panels.shape[1] // channels, padded(channels, step)
    full = np.zeros((len(panels), taps, even, LANES), np.float32)
    full[:, :, :channels] = panels.reshape(len(panels), taps, channels, LANES)
    pairs = full.reshape(len(panels), taps * even // step, step, LANES).swapaxes(2, 3)
    return np.ascontiguousarray(pairs.reshape(len(panels), taps * even, LANES).astype(NUMPY[dtype]))
