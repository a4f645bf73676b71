"""Shared by the kernel tests: compile one PrimFunc, random tails, and their torch reference."""

from __future__ import annotations

import dataclasses

import graphwright.ir.dialect.integer  # noqa: F401  (registers the gw:: operators)
import numpy as np
import pytest
import torch
import tvm
from graphwright.backends.host import X86_FLAGS, host_arch, host_flags
from graphwright.backends.target import Target
from graphwright.backends.tvm.executor import ALIGNMENT
from graphwright.backends.tvm.kernels import matmul_int8
from graphwright.backends.tvm.kernels.base import LANES, FloatAdd, ResidualAdd, Tail
from graphwright.backends.tvm.kernels.packed import Packing
from graphwright.backends.tvm.target import tvm_target
from hypothesis import strategies as st

HAS_VNNI = host_arch() == "x86" and X86_FLAGS["avx512-vnni"] <= host_flags()
HAS_AMX = HAS_VNNI and X86_FLAGS["avx512-amx"] <= host_flags()
_needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="this processor has no AVX-512 VNNI")
LEVELS = [pytest.param("avx512-vnni", marks=_needs_vnni), "portable"]
#: Levels with a tile unit: emulated everywhere, the real one where the processor has it.
TILE_LEVELS = [
    "portable-tiles",
    pytest.param("avx512-tiles", marks=_needs_vnni),
    pytest.param("avx512-amx", marks=pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX")),
]
#: Bytes after its end that every buffer of a program lets a kernel read.
SLACK = 64
TORCH = {"uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32, "float32": torch.float32}


def target(level: str) -> tvm.target.Target:
    if level == "avx512-amx":
        return tvm_target(Target("x86", "avx512-amx"))
    if level in ("avx512-vnni", "avx512-tiles"):
        return tvm.target.Target({"kind": "llvm", "mcpu": "cascadelake", "num-cores": 2})
    if host_arch() == "x86":
        return tvm.target.Target({"kind": "llvm", "mcpu": "haswell", "num-cores": 2})
    return tvm.target.Target({"kind": "llvm", "num-cores": 2})


def run(function, level: str, arrays, output: np.ndarray) -> np.ndarray:
    """Runs one kernel as a program does: every buffer has SLACK readable bytes after its end, of any value."""
    library = tvm.compile(tvm.IRModule({"main": function}), target=target(level))
    result = tvm.runtime.tensor(output)
    library["main"](*(tvm.runtime.from_dlpack(with_slack(array)) for array in arrays), result)
    return result.numpy()


def with_slack(array: np.ndarray) -> np.ndarray:
    """An aligned copy in front of SLACK bytes of noise."""
    raw = np.random.default_rng(0).integers(0, 256, array.nbytes + ALIGNMENT + SLACK, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    copy = raw[skip : skip + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@dataclasses.dataclass
class TailCase:
    """A tail, its parameters, and the same computation through the gw:: reference."""

    tail: Tail
    values: dict[str, np.ndarray]

    def reference(self, acc: torch.Tensor, axis: int, residual: torch.Tensor | None = None) -> torch.Tensor:
        tail, values = self.tail, {name: torch.from_numpy(value) for name, value in self.values.items()}
        if tail.kind == "none":
            return acc
        if tail.kind == "scale":
            out = torch.ops.gw.scale(acc, values["scale"], axis)
            return out if residual is None else out + residual
        dtype = TORCH[tail.dtype]
        limits = (tail.zero_point, tail.qmin, tail.qmax, dtype)
        if tail.kind == "rescale":
            out = torch.ops.gw.rescale(acc, values["scale"], *limits, axis)
        else:
            out = torch.ops.gw.rescale_dyadic(acc, values["multiplier"], values["shift"], *limits, axis)
        if tail.residual is None:
            return out
        add = tail.residual
        return torch.ops.gw.add(
            out, residual, add.a_multiplier, add.b_multiplier, add.shift, add.a_zero_point, add.b_zero_point,
            add.zero_point, add.qmin, add.qmax, dtype,
        )  # fmt: skip


@st.composite
def tails(draw, channels: int, with_residual: bool = True):
    """A random tail of `channels` output channels, with scales that put most results inside the range."""
    kind = draw(st.sampled_from(["rescale", "rescale", "dyadic", "scale", "none"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([1, channels]))
    if kind == "none":
        return TailCase(Tail("none", "int32"), {})
    scale = (rng.uniform(0.2, 4.0, size) / draw(st.sampled_from([1.0, 300.0, 3000.0, 1e-9]))).astype(np.float32)
    if kind == "scale":
        residual = FloatAdd() if with_residual and draw(st.booleans()) else None
        return TailCase(Tail("scale", "float32", residual=residual), {"scale": scale})
    dtype = draw(st.sampled_from(["uint8", "int8"]))
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    qmin = draw(st.sampled_from([low, low + 1, low + 37]))
    qmax = draw(st.sampled_from([high, high - 5]))
    zero_point = draw(st.integers(qmin, qmax))
    residual = None
    if with_residual and draw(st.booleans()):
        b_dtype = draw(st.sampled_from(["uint8", "int8"]))
        residual = ResidualAdd(
            int(rng.integers(1, 1 << 21)), int(rng.integers(1, 1 << 21)), int(rng.integers(18, 23)),
            zero_point, int(rng.integers(0, 100)), int(rng.integers(qmin, qmax)), qmin, qmax, b_dtype,
        )  # fmt: skip
    tail = Tail(kind, dtype, zero_point, qmin, qmax, residual, shrinks=bool(scale.max() < 1))
    if kind == "rescale":
        return TailCase(tail, {"scale": scale})
    shift = rng.integers(1, 40, size).astype(np.int32)
    multiplier = np.minimum(scale.astype(np.float64) * 2.0**shift, 2**31 - 1).astype(np.int32)
    return TailCase(tail, {"multiplier": multiplier, "shift": shift})


def random_values(rng: np.random.Generator, dtype: str, shape) -> np.ndarray:
    """Every value of an integer type is as likely as any other; floats are normal."""
    if dtype == "float32":
        return rng.standard_normal(shape).astype(np.float32)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def random_weight(rng: np.random.Generator, shape, packing: Packing | None = None) -> np.ndarray:
    """s8 (O, ...) over the whole range of a packing: symmetric, or from a lowest value of each channel on."""
    if packing is None:
        return rng.integers(-128, 128, shape).astype(np.int8)
    codes = rng.integers(0, 1 << packing.bits, shape)
    zero = rng.integers(0, 1 << packing.bits, (shape[0], *[1] * (len(shape) - 1))) if packing.shifted else 1 << packing.bits - 1
    return (codes - zero).astype(np.int8)


def to_physical(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, C, H, W) -> [N, H, W, Cp] with garbage in the padding lanes."""
    n, c, h, w = x.shape
    out = random_values(rng, str(x.dtype), (n, h, w, -(-c // LANES) * LANES))
    out[..., :c] = x.transpose(0, 2, 3, 1)
    return out


def check_matmul(
    data: st.DataObject, level: str, transposed: bool, sizes: tuple[tuple[int, int], ...], dtypes: list[tuple[str, int]]
) -> matmul_int8.MatmulInt8:
    """One random product against the torch reference, every bit; returns what was built.

    sizes: (least, most) of batch, rows, inner and columns. dtypes: (type, zero point) of the first operand.
    """
    batch, rows, inner, columns = (data.draw(st.integers(least, most)) for least, most in sizes)
    inner = data.draw(st.sampled_from([inner, 4 * (inner // 4 + 1)]))  # whole dot-instruction steps pack along another path
    dtype, zero_point = data.draw(st.sampled_from(dtypes))
    case = data.draw(tails(columns, with_residual=False))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    a, b = random_values(rng, dtype, (batch, rows, inner)), random_values(rng, "int8", (batch, inner, columns))
    spec = matmul_int8.MatmulInt8(batch, rows, inner, columns, dtype, zero_point, transposed=transposed)
    packed = matmul_int8.pack(spec, case.tail, level, **case.values)
    second = b.transpose(0, 2, 1) if transposed else b
    function = matmul_int8.build(spec, case.tail, level)
    got = run(function, level, [a, second, *packed], np.zeros((batch, rows, columns), case.tail.dtype))
    want = case.reference(torch.ops.gw.matmul(torch.from_numpy(a), torch.from_numpy(b), zero_point, 0), 2)
    np.testing.assert_array_equal(got, want.numpy())
    return spec
