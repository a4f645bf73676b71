"""Shared by the float kernel tests: compile and run one PrimFunc, physical layouts, the error bound of a float32 sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from graphwright.backends.host import X86_FLAGS, host_arch, host_flags
from graphwright.backends.tvm.executor import ALIGNMENT
from graphwright.backends.tvm.kernels.base import LANES, padded
from graphwright.backends.tvm.kernels.float_base import NO_ACTIVATION, RELU, RELU6, Activation
from graphwright.backends.tvm.kernels.half import NATIVE, NUMPY
from graphwright.backends.tvm.kernels.vector_math import FUNCTIONS
from graphwright.backends.tvm.pipeline import import_llvm
from hypothesis import strategies as st
from scipy.special import erfc

EPS = float(np.finfo(np.float32).eps)
HAS_AVX512 = host_arch() == "x86" and X86_FLAGS["avx512"] <= host_flags()
HAS_BF16 = HAS_AVX512 and X86_FLAGS[NATIVE] <= host_flags()
LEVELS = [
    pytest.param("avx512", marks=pytest.mark.skipif(not HAS_AVX512, reason="this processor has no AVX-512")),
    "portable",
]
#: (type, level, whether products are vdpbf16ps).
HALF_FORMS = [
    pytest.param("bfloat16", NATIVE, dot, marks=pytest.mark.skipif(not HAS_BF16, reason="this processor has no AVX512_BF16"))
    for dot in (False, True)
] + [("bfloat16", "portable", False), ("float16", "portable", False)]
AVX512 = {"kind": "llvm", "mcpu": "skylake-avx512"}
BF16 = {"kind": "llvm", "mcpu": "cooperlake", "mattr": ["-prefer-256-bit"]}
AVX2 = {"kind": "llvm", "mcpu": "haswell"}
AARCH64 = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}


def target(level: str) -> dict[str, str]:
    if level in ("avx512", NATIVE):
        return AVX512 if level == "avx512" else BF16
    return AVX2 if host_arch() == "x86" else {"kind": "llvm"}


def compiled(function, options: dict[str, str]):
    plain = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    module = tvm.transform.Sequential([import_llvm])(plain)
    return tvm.compile(module, target=tvm.target.Target(options))


def assembly(function, options: dict[str, str]) -> str:
    return compiled(function, options).mod.inspect_source("asm")


def run(function, level: str, inputs, out: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Runs the kernel. The output starts as NaN (99 for integers), so an element that nobody writes shows."""
    result = tvm.runtime.tensor(np.full(out, np.nan if dtype in NUMPY else 99, NUMPY.get(dtype, dtype)))
    compiled(function, target(level))["main"](*(_tensor(_followed(np.asarray(x))) for x in inputs), result)
    return result.numpy()


def _tensor(x: np.ndarray):
    """numpy's DLPack has no bfloat16; torch's does."""
    if x.dtype == NUMPY["bfloat16"]:
        return tvm.runtime.from_dlpack(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16))
    return tvm.runtime.from_dlpack(x)


def _followed(x: np.ndarray) -> np.ndarray:
    """An aligned copy with NaN (127 for integers) in the 64 bytes that a kernel may read past its end."""
    raw = np.empty(x.nbytes + 2 * ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    whole = raw[start : start + x.nbytes + ALIGNMENT // x.itemsize * x.itemsize].view(x.dtype)
    whole[x.size :] = 127 if x.dtype.kind in "iu" else np.nan
    copy = whole[: x.size].reshape(x.shape)
    copy[...] = x
    return copy


def to_physical(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, C, H, W) -> [N, H, W, Cp], with rubbish in the lanes past C."""
    batch, channels, height, width = x.shape
    out = rng.uniform(-1e6, 1e6, (batch, height, width, padded(channels))).astype(np.float32)
    out[..., :channels] = x.transpose(0, 2, 3, 1)
    return out


def to_logical(y: np.ndarray, channels: int) -> np.ndarray:
    assert y.shape[-1] % LANES == 0
    return y[..., :channels].transpose(0, 3, 1, 2)


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Numbers of that type; half precision is given widened."""
    return rng.standard_normal(shape).astype(NUMPY[dtype]).astype(np.float32)


def wide_sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1 + small)


def _times(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """x * factor with -inf * 0 = 0, the limit of every function here."""
    return np.where(factor == 0, 0.0, np.where(factor == 0, 0.0, x) * factor)


#: The functions of vector_math in float64.
WIDE = {
    "exp": np.exp,
    "sigmoid": wide_sigmoid,
    "silu": lambda x: _times(x, wide_sigmoid(x)),
    "tanh": np.tanh,
    "gelu": lambda x: _times(x, erfc(-x / np.sqrt(2)) / 2),
    "gelu_tanh": lambda x: _times(x, wide_sigmoid(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3))),
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hardswish": lambda x: _times(x, np.clip(x + 3, 0, 6) / 6),
}

#: What a layer may finish with. Left out: exp, whose slope has no bound.
ACTIVATIONS = st.sampled_from(
    [NO_ACTIVATION, RELU, RELU6, Activation(-0.5, 0.25), Activation(high=1.0)]
    + [Activation(function=name) for name in FUNCTIONS if name != "exp"]
)


def activated(activation: Activation, wide: np.ndarray) -> np.ndarray:
    if activation.function is not None:
        wide = WIDE[activation.function](wide)
    low, high = (-np.inf if activation.low is None else activation.low), (np.inf if activation.high is None else activation.high)
    return np.clip(wide, low, high)


#: Unit roundoff of a stored type, and what is lost near zero: half a subnormal step, or what vdpbf16ps takes for zero.
ROUNDOFF = {"float32": (0.0, 0.0), "bfloat16": (2.0**-8, 2.0**-120), "float16": (2.0**-11, 2.0**-25)}


def assert_close(
    y: np.ndarray,
    exact: np.ndarray,
    magnitude: np.ndarray,
    depth: int,
    activation: Activation = NO_ACTIVATION,
    dtype: str = "float32",
) -> None:
    """|y - exact| <= (depth + 2) * eps * magnitude, where magnitude = sum |x| |w| + |bias| and depth counts the products.

    A function after the sum stretches that by its slope (at most 1.5, hardswish's) and adds its own error, 6 eps (1 + magnitude).
    Half precision rounds the result once more: ROUNDOFF.
    """
    error = np.abs(y.astype(np.float64) - exact)
    limit = (depth + 2) * EPS * magnitude
    if activation.function is not None:
        limit = 1.5 * limit + 6 * EPS * (1 + magnitude)
    relative, absolute = ROUNDOFF[dtype]
    limit = limit * (1 + relative) + relative * np.abs(exact) + absolute
    assert (error <= limit).all(), f"error {error.max():.3g}, {np.max(error / (limit + 1e-300)):.3g} times the bound"
