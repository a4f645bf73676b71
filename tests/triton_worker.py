"""Runs kernels of the CUDA backend in Triton's interpreter, or on a GPU, and compares them with the torch ops that define them.

A program of its own, because Triton reads TRITON_INTERPRET when its functions are defined:

    TRITON_INTERPRET=1 python triton_worker.py SEED COUNT [GROUP ...]

prints a JSON line a case: what it was, how many values differ, and how many distinct values there are. Without TRITON_INTERPRET
the kernels run on the machine's GPU.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import torch
from graphwright.backends.tvm.cuda.kernels import plan_elementwise, plan_image, plan_int8, plan_linears
from graphwright.backends.tvm.cuda.kernels.plan_attention import Heads, IntegerAttention, attention
from graphwright.backends.tvm.cuda.kernels.plans import run
from graphwright.backends.tvm.kernels.base import FloatAdd, Outliers, ResidualAdd, Tail
from graphwright.ir.dialect import gw
from triton_cases import DEVICE, TORCH, Case, codes, launched, main, physical, some_block, some_shape
from triton_float_cases import (
    coded_decode_case,
    coded_linear_case,
    float_attention_case,
    float_convolution_case,
    float_linear_case,
    float_matmul_case,
)


def some_tail(kind: str, depth: int, channels: int) -> tuple[Tail, dict[str, np.ndarray]]:
    """A tail that spreads accumulators of `depth` products over the range of its type, clamps included."""
    dtype = {"none": "int32", "scale": "float32"}.get(kind) or random.choice(("uint8", "int8"))
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    zero_point, qmin = random.randint(low, high), random.choice((low, low + 7))
    size = random.choice((1, channels))
    factor = torch.rand(size) * 0.03 / depth**0.5 + 1e-4
    if kind == "dyadic":
        multiplier = (factor * 2.0**30).to(torch.int32).numpy()
        return Tail("dyadic", dtype, zero_point, qmin, high), {"multiplier": multiplier, "shift": np.full(size, 30, np.int32)}
    if kind == "none":
        return Tail("none", "int32"), {}
    if kind == "scale":
        return Tail("scale", "float32"), {"scale": factor.numpy()}
    bounded = depth * 255 * 128 * float(factor.max()) < 2**21 and random.random() < 0.5  # the other half is room for biases
    return Tail("rescale", dtype, zero_point, qmin, high, bounded=bounded), {"scale": factor.numpy()}


def with_residual(tail: Tail) -> Tail:
    if tail.kind == "scale":
        return replace(tail, residual=FloatAdd())
    if tail.kind == "none":
        return tail
    low, high = (0, 255) if tail.dtype == "uint8" else (-128, 127)
    b_dtype = random.choice(("uint8", "int8"))
    multipliers = random.randint(1 << 17, 1 << 20), random.randint(1 << 17, 1 << 20)
    points = [random.randint(0, 100) for _ in range(3)]
    return replace(tail, residual=ResidualAdd(*multipliers, 20, *points, low + 3, high, b_dtype))


def with_table(tail: Tail, values: dict[str, np.ndarray]) -> tuple[Tail, dict[str, np.ndarray]]:
    """With a lookup behind the codes, now and then."""
    if tail.dtype not in ("uint8", "int8") or random.random() < 0.6:
        return tail, values
    dtype = random.choice(("uint8", "int8"))
    return replace(tail, table=dtype), {**values, "table": codes(dtype, (256,)).numpy()}


def finished(
    acc: torch.Tensor,
    tail: Tail,
    values: dict[str, np.ndarray],
    other: torch.Tensor | None,
    axis: int,
    outliers: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tail, by the dialect's ops. outliers: what they add."""
    vectors = {name: torch.from_numpy(value) for name, value in values.items()}
    out = acc
    if tail.kind == "rescale":
        out = gw.rescale(acc, vectors["scale"], tail.zero_point, tail.qmin, tail.qmax, TORCH[tail.dtype], axis)
    elif tail.kind == "dyadic":
        pair = vectors["multiplier"], vectors["shift"]
        out = gw.rescale_dyadic(acc, *pair, tail.zero_point, tail.qmin, tail.qmax, TORCH[tail.dtype], axis)
    elif tail.kind == "scale":
        out = gw.scale(acc, vectors["scale"], axis)
        out = out if outliers is None else out + outliers
    add = tail.residual
    if isinstance(add, ResidualAdd):
        numbers = (add.a_multiplier, add.b_multiplier, add.shift, add.a_zero_point, add.b_zero_point)
        out = gw.add(out, other, *numbers, add.zero_point, add.qmin, add.qmax, TORCH[tail.dtype])
    elif add is not None:
        out = out + other
    return gw.lookup(out, vectors["table"]) if tail.table else out


def linear_case(kind: str | None = None) -> Case:
    rows, inner, outer = random.randint(1, 70), random.choice((16, 37, 64, 100, 130)), random.choice((5, 16, 33, 64, 90))
    dtype = random.choice(("uint8", "int8"))
    zero_point = random.randint(0, 100)
    tail, values = some_tail(kind or random.choice(("rescale", "dyadic", "scale", "none")), inner, outer)
    tail, values = with_table(with_residual(tail) if random.random() < 0.5 else tail, values)
    tail, few, more, added = some_outliers(tail, rows, outer)
    x, weight = codes(dtype, (rows, inner)), codes("int8", (outer, inner))
    bias = random.choice((None, torch.randint(-1000, 1000, (outer,), dtype=torch.int32)))
    other = None if tail.residual is None else some_other(tail, (rows, outer))
    given, norm = others(other), []
    if other is not None and isinstance(tail.residual, FloatAdd) and random.random() < 0.5:
        tail = replace(tail, residual=FloatAdd(normalized=True))
        norm = [torch.randn(rows, 2), torch.randn(outer), torch.randn(outer)]
        other = ((other - norm[0][:, :1]) * norm[0][:, 1:]) * norm[1] + norm[2]
    plan = plan_int8.linear(rows, inner, outer, dtype, tail, "sm_90", some_block())
    offset = None if bias is None else bias.numpy()
    packed = plan_int8.pack_linear(dtype, zero_point, tail, weight.numpy(), offset, **values)
    expected = finished(gw.linear(x, weight, bias, zero_point), tail, values, other, 1, added)
    return f"{rows}x{inner}x{outer} {dtype} {tail}", launched(plan, [x, *few, *given, *norm, *packed, *more]), expected


def some_outliers(tail: Tail, rows: int, outer: int) -> tuple[Tail, list, list, torch.Tensor | None]:
    """The tail, the outliers' activations, their packed parameters, and what they add; nothing of it now and then."""
    if tail.kind != "scale" or random.random() < 0.2:
        return tail, [], [], None
    columns, dtype, zero_point = random.randint(1, 3), random.choice(("uint8", "int8")), random.randint(0, 90)
    x, weight = codes(dtype, (rows, columns)), codes("int8", (outer, columns))
    bias = random.choice((None, torch.randint(-1000, 1000, (outer,), dtype=torch.int32)))
    scale, outliers = torch.rand(random.choice((1, outer))) * 0.1, Outliers(columns, dtype, zero_point)
    packed = plan_int8.pack_outliers(outliers, weight.numpy(), None if bias is None else bias.numpy(), scale.numpy())
    return replace(tail, outliers=outliers), [x], packed, gw.scale(gw.linear(x, weight, bias, zero_point), scale, 1)


def some_other(tail: Tail, shape: tuple[int, ...]) -> torch.Tensor:
    assert tail.residual is not None
    return torch.randn(shape) if isinstance(tail.residual, FloatAdd) else codes(tail.residual.b_dtype, shape)


def others(other: torch.Tensor | None) -> list[torch.Tensor]:
    return [] if other is None else [other]


def convolution_case(kind: str) -> Case:
    shape = some_shape(kind)
    dtype = random.choice(("uint8", "int8"))
    zero_point = random.choice((0, random.randint(0, 100)))
    depth = shape.macs // (shape.batch * shape.filters * shape.out_height * shape.out_width)
    tail, values = some_tail(random.choice(("rescale", "dyadic", "scale", "none")), depth, shape.filters)
    tail, values = with_table(with_residual(tail) if random.random() < 0.5 else tail, values)
    weight = codes("int8", (shape.filters, shape.channels // shape.groups, *shape.kernel))
    bias = random.choice((None, torch.randint(-1000, 1000, (shape.filters,), dtype=torch.int32)))
    quantize = None
    if kind in ("image", "framed"):
        low, high = (0, 255) if dtype == "uint8" else (-128, 127)
        scale = 0.02
        quantize = plan_int8.ImageQuantize(float(np.float32(1) / np.float32(scale)), low, high)
        given = torch.randn(shape.batch, shape.channels, shape.height, shape.width) * 2
        x = gw.quantize(given, scale, zero_point, low, high, TORCH[dtype])
    else:
        x = codes(dtype, (shape.batch, shape.channels, shape.height, shape.width))
        given = physical(x)
    other = None if tail.residual is None else some_other(tail, (shape.batch, shape.filters, shape.out_height, shape.out_width))
    block = some_block() if not shape.depthwise else None
    offset = None if bias is None else bias.numpy()
    if quantize is None:
        plan = plan_int8.convolution(shape, dtype, zero_point, tail, "sm_90", block)
        packed = plan_int8.pack_convolution(shape, dtype, zero_point, tail, weight.numpy(), offset, **values)
    else:
        plan = plan_image.convolution(shape, dtype, zero_point, tail, "sm_90", quantize, block)
        packed = plan_image.pack(shape, dtype, zero_point, tail, weight.numpy(), offset, **values)
    out = launched(plan, [given, *([] if other is None else [physical(other)]), *packed])
    acc = gw.convolution(x, weight, bias, shape.stride, shape.padding, shape.dilation, shape.groups, zero_point)
    expected = finished(acc, tail, values, other, 1)
    return f"{kind} {shape.work} {dtype} {zero_point} {tail}", out[..., : shape.filters].permute(0, 3, 1, 2), expected


def linears_case() -> Case:
    rows, inner, listed, given = random.choice((1, 5, 37, 130)), random.choice((16, 37, 96)), [], []
    dtype, zero_point = random.choice((("uint8", 7), ("int8", -3)))
    x = codes(dtype, (rows, inner))
    outers = random.sample((17, 16, 37, 70), random.choice((1, 2, 3)))
    riding = len(outers) == 1 or random.random() < 0.5
    for outer in [*outers, *([random.choice((1, 2, 16))] if riding else [])]:
        tail, values = with_table(*some_tail("rescale", inner, outer))
        bias = random.choice((None, torch.randint(-1000, 1000, (outer,), dtype=torch.int32)))
        listed.append(plan_linears.Part(outer, tail))
        given.append((codes("int8", (outer, inner)), bias, values))
    own = tuple(listed[: len(outers)])
    parts = plan_linears.Parts(own, listed[-1] if riding else None)
    plan = plan_linears.linears(rows, inner, dtype, parts, "sm_90", some_block())
    weights, biases, vectors = zip(*given, strict=True)
    arrays = [[None if t is None else t.numpy() for t in column] for column in (weights, biases)]
    packed = plan_linears.pack(dtype, zero_point, parts, *arrays, vectors)
    outs = [torch.empty(shape, dtype=TORCH[kind], device=DEVICE) for _, shape, kind in plan.buffers[-len(listed) :]]
    run(plan, [x.to(DEVICE), *(torch.from_numpy(a).to(DEVICE) for a in packed), *outs])
    expected = [
        finished(gw.linear(x, weight, bias, zero_point), part.tail, values, None, 1).to(torch.int32)
        for part, (weight, bias, values) in zip(listed, given, strict=True)
    ]
    text = f"{rows}x{inner} {dtype} {[part.outer for part in own]} {parts.rider}"
    return text, torch.cat([out.cpu().to(torch.int32) for out in outs], 1), torch.cat(expected, 1)


def lookup_case() -> Case:
    x_dtype, table_dtype = random.choice(("uint8", "int8")), random.choice(("uint8", "int8"))
    shape = (*(random.choice((1, 3, 16, 50)) for _ in range(random.randint(0, 3))), random.choice((31, 64)))
    x, table = codes(x_dtype, shape), codes(table_dtype, (256,))
    out = torch.empty(shape, dtype=TORCH[table_dtype], device=DEVICE)
    run(plan_elementwise.lookup(shape, x_dtype, table_dtype), [x.to(DEVICE), table.to(DEVICE), out])
    return f"{x_dtype} {list(shape)} -> {table_dtype}", out.cpu(), gw.lookup(x, table)


def matmul_case() -> Case:
    batch, rows, inner, columns = (
        random.randint(1, 3),
        random.randint(1, 40),
        random.choice((16, 33, 64)),
        random.choice((5, 16, 50)),
    )
    dtype, zero_point, transposed = random.choice(("uint8", "int8")), random.choice((0, 3, 128)), random.random() < 0.5
    tail, values = some_tail(random.choice(("rescale", "dyadic", "scale", "none")), inner, columns)
    tail, values = with_table(tail, values)
    a, b = codes(dtype, (batch, rows, inner)), codes("int8", (batch, inner, columns))
    plan = plan_int8.matmul(batch, rows, inner, columns, dtype, zero_point, transposed, tail, "sm_90", some_block())
    given = b.transpose(1, 2).contiguous() if transposed else b
    out = launched(plan, [a, given, *plan_int8.pack_tail(tail, columns, **values)])
    return (
        f"{batch}x{rows}x{inner}x{columns} {dtype} {zero_point} {transposed} {tail}",
        out,
        finished(gw.matmul(a, b, zero_point, 0), tail, values, None, 2),
    )


def attention_case() -> Case:
    """Q, K and V inside one projection [batch, tokens, 3, heads, width] where keys and rows are equal, dense otherwise."""
    outer, heads, rows, width = random.randint(1, 2), random.randint(1, 3), random.randint(1, 40), random.choice((16, 20, 32))
    keys = random.choice((rows, random.randint(2, 70), 530)) if rows > 1 else 17
    q_dtype, p_dtype = random.choice(("uint8", "int8")), random.choice(("uint8", "int8"))
    q_zero_point, scale = random.choice((0, 7, 127)), 0.0005
    p_zero_point, p_qmin, p_qmax = (0, 0, 255) if p_dtype == "uint8" else (-128, -128, 127)
    q = codes(q_dtype, (outer, heads, rows, width))
    k, v = codes("int8", (outer, heads, width, keys)), codes("int8", (outer, keys, heads, width))
    masked = (outer, 1, random.choice((1, rows)), keys)
    mask = random.choice((None, torch.randn(masked) * 3 - 10000.0 * (torch.rand(masked) < 0.3)))
    mask_row = keys if masked[2] > 1 else 0
    tail, values = some_tail(random.choice(("rescale", "dyadic", "scale", "none")), 400, width)
    step = float(np.float32(1 / random.choice((255, 300, 200))))
    swapped = random.random() < 0.5
    out_shape = (outer, rows, heads, width) if swapped else (outer, heads, rows, width)
    row, head = (width * heads, width) if swapped else (width, width * rows)
    shape = IntegerAttention(
        outer, heads, rows, width, keys, width,
        q=Heads(0, heads * rows * width, rows * width, width, 1),
        k=Heads(0, heads * width * keys, width * keys, keys, 1),
        v=Heads(0, keys * heads * width, width, heads * width, 1),
        mask=None if mask is None else Heads(0, masked[2] * keys, 0, mask_row, 1),
        y=Heads(0, rows * heads * width, head, row, 1),
        q_dtype=q_dtype, q_zero_point=q_zero_point, scale=float(np.float32(scale)),
        p_inverse=float(np.float32(1) / np.float32(step)), p_zero_point=p_zero_point, p_qmin=p_qmin, p_qmax=p_qmax,
        p_dtype=p_dtype,
    )  # fmt: skip
    given = [q, k, v, *([] if mask is None else [mask])]
    plan, tile = attention(shape, [tuple(t.shape) for t in given], out_shape, tail), random.choice((16, 32, 64))
    plan = replace(plan, constants={**plan.constants, "BM": tile}, grid=(math.ceil(rows / tile), *plan.grid[1:]))
    out = launched(plan, [*given, *plan_int8.pack_tail(tail, width, **values)])
    s = gw.scale(gw.matmul(q, k, q_zero_point, 0), torch.tensor([scale]), 3)
    p = gw.quantize(gw.softmax(s if mask is None else s + mask), step, p_zero_point, p_qmin, p_qmax, TORCH[p_dtype])
    expected = finished(gw.matmul(p, v.transpose(1, 2), p_zero_point, 0), tail, values, None, 3)
    return f"{q.shape} {keys} keys {q_dtype} {p_dtype} {tail}", out.transpose(1, 2) if swapped else out, expected


CASES = {
    "coded-linear": coded_linear_case,
    "coded-decode": coded_decode_case,
    "float-linear": float_linear_case,
    "float-matmul": float_matmul_case,
    "float-attention": float_attention_case,
    **{f"float-{k}": (lambda k=k: float_convolution_case(k)) for k in ("dense", "grouped", "depthwise", "planar")},
    "attention": attention_case,
    "linear": linear_case,
    "linears": linears_case,
    "outliers": lambda: linear_case("scale"),
    "lookup": lookup_case,
    "matmul": matmul_case,
    **{kind: (lambda kind=kind: convolution_case(kind)) for kind in ("dense", "grouped", "depthwise", "image", "framed")},
}


if __name__ == "__main__":
    main(CASES)
