"""Every int8 kernel of the AArch64 levels equals the gw:: references bit for bit, on emulated processors of each level.

All cases of a level are one library and one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from emulated import Case, emulate
from graphwright.backends.target import Target
from graphwright.backends.tvm.kernels import attention_int8, convolution_int8, linear_int8, matmul_int8
from graphwright.backends.tvm.kernels.attention_int8 import AttentionInt8
from graphwright.backends.tvm.kernels.base import Convolution, FloatAdd, ResidualAdd, Tail, padded
from graphwright.backends.tvm.kernels.packed import Packing
from graphwright.backends.tvm.kernels.quantize_image import Quantize
from graphwright.backends.tvm.strided import Strided
from graphwright.backends.tvm.target import kernel_levels
from graphwright.ir.dialect import gw

from .kernel_cases import TORCH, TailCase, random_values, random_weight, to_physical
from .test_convolution_int8 import accumulated

DTYPES = [("uint8", 0), ("uint8", 131), ("uint8", 255), ("int8", 0), ("int8", -128), ("int8", 5)]

#: Level of the target, and the emulated processors that have no more than it asks for, or everything.
LEVELS = [("cortex-a53", "cortex-a53"), ("cortex-a76", "cortex-a76"), ("neoverse-v1", "max")]


@dataclass
class Wanted:
    """A case, what makes its output comparable, and the reference."""

    name: str
    case: Case
    view: Any
    want: np.ndarray


def random_tail(rng: np.random.Generator, channels: int, kind: Any, residual: bool = False) -> TailCase:
    """A tail whose scales put most results inside the range."""
    scale = (rng.uniform(0.2, 4.0, rng.choice([1, channels])) / rng.choice([300.0, 3000.0])).astype(np.float32)
    if kind == "none":
        return TailCase(Tail("none", "int32"), {})
    if kind == "scale":
        return TailCase(Tail("scale", "float32", residual=FloatAdd() if residual else None), {"scale": scale})
    dtype = str(rng.choice(["uint8", "int8"]))
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    zero_point = int(rng.integers(low, high + 1))
    add = ResidualAdd(700_000, 1_100_000, 20, zero_point, 100, 60, low, high, "uint8") if residual else None
    tail = Tail(kind, dtype, zero_point, low, high, add, shrinks=bool(scale.max() < 1))
    if kind == "rescale":
        return TailCase(tail, {"scale": scale})
    shift = rng.integers(1, 40, scale.shape).astype(np.int32)
    return TailCase(tail, {"multiplier": np.minimum(scale * 2.0**shift, 2**31 - 1).astype(np.int32), "shift": shift})


def convolution(rng, level: str, name: str, shape: Convolution, index: int, kind: str, residual: bool = False, packing=None):
    dtype, zero_point = DTYPES[index % len(DTYPES)]
    tail = random_tail(rng, shape.filters, kind, residual)
    x = random_values(rng, dtype, (shape.batch, shape.channels, shape.height, shape.width))
    weight = random_weight(rng, (shape.filters, shape.channels // shape.groups, *shape.kernel), packing)
    bias = rng.integers(-(10**4), 10**4, shape.filters).astype(np.int32) if index % 2 else None
    spec = convolution_int8.ConvolutionInt8(shape, dtype, zero_point, packing=packing)
    packed = convolution_int8.pack(spec, tail.tail, level, weight, bias, **tail.values)
    out = (shape.batch, shape.filters, shape.out_height, shape.out_width)
    add = random_values(rng, tail.tail.residual.b_dtype, out) if tail.tail.residual else None
    inputs = [to_physical(x, rng)] + ([] if add is None else [to_physical(add, rng)])
    want = tail.reference(accumulated(shape, x, weight, bias, zero_point), 1, None if add is None else torch.from_numpy(add))
    output = (shape.batch, shape.out_height, shape.out_width, padded(shape.filters))
    case = Case(convolution_int8.build(spec, tail.tail, level), [*inputs, *packed], (output, tail.tail.dtype))
    return Wanted(f"{name} {dtype}", case, lambda y: y[..., : shape.filters].transpose(0, 3, 1, 2), want.numpy())


def image(rng, level: str, shape: Convolution, dtype: str, zero_point: int, limits: tuple[int, int]) -> Wanted:
    """A first convolution, which quantizes its float image."""
    x = rng.normal(0, 8, (shape.batch, shape.channels, shape.height, shape.width)).astype(np.float32)
    weight = random_weight(rng, (shape.filters, shape.channels, *shape.kernel))
    spec = convolution_int8.ConvolutionInt8(shape, dtype, zero_point, Quantize(0.07, zero_point, *limits, dtype))
    tail = Tail("none", "int32")
    packed = convolution_int8.pack(spec, tail, level, weight, None)
    output = (shape.batch, shape.out_height, shape.out_width, padded(shape.filters))
    codes = gw.quantize(torch.from_numpy(x), 0.07, zero_point, *limits, TORCH[dtype]).numpy()
    want = accumulated(shape, codes, weight, None, zero_point).numpy()
    case = Case(convolution_int8.build(spec, tail, level), [x, *packed], (output, "int32"))
    return Wanted(f"image {shape} {dtype}", case, lambda y: y[..., : shape.filters].transpose(0, 3, 1, 2), want)


def linear(rng, level: str, sizes: tuple[int, int, int], index: int, kind: str, residual: bool = False, packing=None) -> Wanted:
    (rows, inner, outer), (dtype, zero_point) = sizes, DTYPES[index % len(DTYPES)]
    tail = random_tail(rng, outer, kind, residual)
    x, weight = random_values(rng, dtype, (rows, inner)), random_weight(rng, (outer, inner), packing)
    bias = rng.integers(-(10**4), 10**4, outer).astype(np.int32)
    spec = linear_int8.LinearInt8(rows, inner, outer, dtype, zero_point, packing)
    packed = linear_int8.pack(spec, tail.tail, level, weight, bias, **tail.values)
    add = [random_values(rng, tail.tail.residual.b_dtype, (rows, outer))] if tail.tail.residual else []
    acc = gw.linear(torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias), zero_point)
    want = tail.reference(acc, 1, torch.from_numpy(add[0]) if add else None)
    case = Case(linear_int8.build(spec, tail.tail, level), [x, *add, *packed], ((rows, outer), tail.tail.dtype))
    return Wanted(f"linear {sizes} {dtype} {kind} {packing}", case, lambda y: y, want.numpy())


def lowest(level: str) -> Wanted:
    """Products of the lowest values, two of which pass s16."""
    x, weight = np.full((3, 48), -128, np.int8), np.full((20, 48), -128, np.int8)
    spec, tail = linear_int8.LinearInt8(3, 48, 20, "int8", 0), Tail("none", "int32")
    case = Case(linear_int8.build(spec, tail, level), [x, *linear_int8.pack(spec, tail, level, weight, None)], ((3, 20), "int32"))
    return Wanted("lowest values", case, lambda y: y, np.full((3, 20), 48 * 128 * 128, np.int32))


def matmul(rng, level: str, sizes: tuple[int, int, int, int], transposed: bool, index: int, kind: str) -> Wanted:
    (batch, rows, inner, columns), (dtype, zero_point) = sizes, DTYPES[index % len(DTYPES)]
    tail = random_tail(rng, columns, kind)
    a, b = random_values(rng, dtype, (batch, rows, inner)), random_values(rng, "int8", (batch, inner, columns))
    spec = matmul_int8.MatmulInt8(batch, rows, inner, columns, dtype, zero_point, transposed=transposed)
    packed = matmul_int8.pack(spec, tail.tail, level, **tail.values)
    second = np.ascontiguousarray(b.transpose(0, 2, 1)) if transposed else b
    want = tail.reference(gw.matmul(torch.from_numpy(a), torch.from_numpy(b), zero_point, 0), 2)
    output = ((batch, rows, columns), tail.tail.dtype)
    case = Case(matmul_int8.build(spec, tail.tail, level), [a, second, *packed], output)
    return Wanted(f"matmul {sizes} {dtype} transposed={transposed}", case, lambda y: y, want.numpy())


def attention(rng, level: str, sizes: tuple[int, int, int, int], q_dtype: str, q_zero: int, limits: tuple) -> Wanted:
    """Two heads whose K lies transposed, as a linear layer leaves it."""
    rows, inner, keys, columns = sizes
    quantize = Quantize(1 / 255, *limits)
    q = random_values(rng, q_dtype, (2, rows, inner))
    k, v = random_values(rng, "int8", (2, keys, inner)), random_values(rng, "int8", (2, keys, columns))
    tail = random_tail(rng, columns, "rescale")
    scale = float(np.float32(1e-4))
    turned = Strided.whole(k.shape).permute((0, 2, 1))
    spec = AttentionInt8(Strided.whole(q.shape), turned, Strided.whole(v.shape), None, q_dtype, q_zero, scale, quantize)
    packed = attention_int8.pack(spec, tail.tail, level, **tail.values)
    tensors = [torch.from_numpy(array) for array in (q, k.transpose(0, 2, 1), v)]
    scores = gw.scale(gw.matmul(tensors[0], tensors[1], q_zero, 0), torch.tensor([scale]), 0)
    codes = gw.quantize(gw.softmax(scores), quantize.scale, *limits[:3], TORCH[quantize.dtype])
    want = tail.reference(gw.matmul(codes, tensors[2], quantize.zero_point, 0), 2).numpy()
    case = Case(attention_int8.build(spec, tail.tail, level), [q, k, v, *packed], (spec.out_shape, tail.tail.dtype))
    return Wanted(f"attention {sizes} {q_dtype}", case, lambda y: y, want)


CONVOLUTIONS = [
    ("odd", Convolution(1, 5, 9, 7, 20, (3, 3), (1, 1), (1, 1)), "rescale", False),
    ("strided", Convolution(2, 33, 8, 11, 40, (3, 2), (2, 1), (2, 0), (1, 2)), "dyadic", False),
    ("pointwise", Convolution(1, 70, 5, 5, 33, (1, 1)), "rescale", True),
    ("wide", Convolution(1, 24, 6, 9, 96, (1, 1)), "scale", True),
    ("no frame", Convolution(1, 64, 6, 6, 48, (3, 3)), "rescale", False),
    ("one row", Convolution(1, 40, 1, 40, 64, (1, 5), (1, 2), (0, 3)), "none", False),
    ("depthwise", Convolution(1, 20, 9, 9, 20, (3, 3), (1, 1), (1, 1), groups=20), "rescale", True),
    ("depthwise wide", Convolution(1, 48, 13, 14, 48, (3, 3), (1, 1), (1, 1), groups=48), "rescale", False),
    ("depthwise strided", Convolution(2, 32, 11, 12, 32, (5, 5), (2, 2), (2, 2), groups=32), "dyadic", False),
    ("depthwise dilated", Convolution(1, 16, 11, 9, 16, (3, 3), (1, 1), (2, 2), (2, 2), groups=16), "rescale", False),
    ("depthwise same", Convolution(1, 35, 10, 9, 35, (3, 3), (2, 2), (0, 0), groups=35, padding_end=(1, 1)), "scale", False),
    ("grouped", Convolution(1, 12, 7, 7, 30, (3, 3), (1, 1), (1, 1), groups=2), "rescale", False),
]  # fmt: skip

LINEAR = [
    ((1, 30, 10), "scale", False, None),
    ((2, 64, 100), "rescale", False, None),
    ((7, 129, 33), "rescale", True, None),
    ((23, 48, 64), "dyadic", False, None),
    ((12, 16, 16), "none", False, None),
    ((5, 80, 48), "rescale", False, Packing(4)),
    ((40, 36, 70), "rescale", False, Packing(3)),
]

MATMUL = [
    ((2, 7, 32, 40), True, "rescale"),
    ((2, 7, 21, 32), False, "rescale"),
    ((1, 9, 13, 48), False, "scale"),
    ((3, 5, 31, 17), True, "none"),
    ((1, 6, 48, 33), False, "dyadic"),
]

PROBABILITIES = [(0, 0, 255, "uint8"), (-128, -128, 127, "int8")]


def cases(level: str) -> Iterator[Wanted]:
    rng = np.random.default_rng(3)
    for index, (name, shape, kind, residual) in enumerate(CONVOLUTIONS):
        yield convolution(rng, level, name, shape, index, kind, residual)
        if index % 2:
            yield convolution(rng, level, name, shape, index + 3, "rescale")
    shape = Convolution(1, 24, 9, 9, 40, (3, 3), (1, 1), (1, 1))
    yield convolution(rng, level, "packed", shape, 1, "rescale", packing=Packing(4))
    yield image(rng, level, Convolution(1, 3, 12, 21, 24, (3, 3), (2, 2), (1, 1)), "uint8", 131, (0, 255))
    yield image(rng, level, Convolution(2, 5, 7, 9, 16, (5, 3), (1, 1), (2, 0), (1, 2)), "int8", -3, (-127, 100))
    for index, (sizes, kind, residual, packing) in enumerate(LINEAR):  # u8, u8, u8, s8, s8, s8, u8
        yield linear(rng, level, sizes, index, kind, residual, packing)
    yield lowest(level)
    for index, (sizes, transposed, kind) in enumerate(MATMUL):
        yield matmul(rng, level, sizes, transposed, index, kind)
    for limits in PROBABILITIES:
        yield attention(rng, level, (9, 32, 21, 16), "uint8", 126, limits)
        yield attention(rng, level, (6, 16, 40, 40), "int8", 5, limits)


@pytest.mark.parametrize(("target", "cpu"), LEVELS)
def test_equals_reference(target, cpu, tmp_path):
    wanted = list(cases(kernel_levels(Target("arm64", target))[0]))
    outputs = emulate([row.case for row in wanted], target, tmp_path, cpu)
    wrong = [row.name for row, output in zip(wanted, outputs, strict=True) if not np.array_equal(row.view(output), row.want)]
    assert not wrong
