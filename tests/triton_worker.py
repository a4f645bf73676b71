"""Runs kernels of the CUDA backend in Triton's interpreter, or on a GPU, and compares them with the torch ops that define them.

A program of its own, because Triton reads TRITON_INTERPRET when its functions are defined:

    TRITON_INTERPRET=1 python triton_worker.py SEED COUNT [GROUP ...]

prints a JSON line a case: what it was, how many values differ, and how many distinct values there are. Without TRITON_INTERPRET
the kernels run on the machine's GPU.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from graphwright.backends.tvm.cuda.kernels import plan_coded, plan_elementwise, plan_float, plan_image, plan_int8, plan_linears
from graphwright.backends.tvm.cuda.kernels.blocks import Block
from graphwright.backends.tvm.cuda.kernels.plan_attention import Heads, IntegerAttention, attention
from graphwright.backends.tvm.cuda.kernels.plan_float import FloatTail
from graphwright.backends.tvm.cuda.kernels.plans import Plan, run
from graphwright.backends.tvm.kernels.base import Convolution, FloatAdd, Outliers, ResidualAdd, Tail, padded
from graphwright.ir.dialect import codebook, gw

DEVICE = "cpu" if "TRITON_INTERPRET" in os.environ else "cuda"
TORCH = {name: getattr(torch, name) for name in ("uint8", "int8", "int32", "float32", "float16", "bfloat16")}

#: What was run, what it gave, what it must give.
Case = tuple[str, torch.Tensor, torch.Tensor]


def codes(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    low, high = (0, 256) if dtype == "uint8" else (-128, 128)
    return torch.randint(low, high, shape, dtype=TORCH[dtype])


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
    return Tail("rescale", dtype, zero_point, qmin, high), {"scale": factor.numpy()}


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


def physical(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, H, W, Cp] with anything in the lanes past C."""
    n, c, h, w = x.shape
    out = (
        codes(str(x.dtype).removeprefix("torch."), (n, h, w, padded(c)))
        if x.dtype != torch.float32
        else torch.randn(n, h, w, padded(c))
    )
    out[..., :c] = x.permute(0, 2, 3, 1)
    return out.contiguous()


def launched(plan: Plan, inputs: list) -> torch.Tensor:
    """Checks the inputs against the plan's buffers, runs it, and returns its output."""
    tensors = [torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in inputs]
    for tensor, (name, shape, dtype) in zip(tensors, plan.operands[:-1], strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, TORCH[dtype]), (name, tensor.shape, shape)
    _, shape, dtype = plan.operands[-1]
    out = torch.full(shape, 77, dtype=TORCH[dtype], device=DEVICE)
    run(plan, [*(tensor.to(DEVICE) for tensor in tensors), out])
    return out.cpu()


def some_block() -> Block | None:
    return random.choice((None, Block(16, 16, 32, 4, 2, 1), Block(32, 64, 64, 4, 3, 3), Block(64, 32, 32, 4, 3, 8)))


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
    plan = plan_int8.linear(rows, inner, outer, dtype, tail, "sm_90", some_block())
    offset = None if bias is None else bias.numpy()
    packed = plan_int8.pack_linear(dtype, zero_point, tail, weight.numpy(), offset, **values)
    expected = finished(gw.linear(x, weight, bias, zero_point), tail, values, other, 1, added)
    return f"{rows}x{inner}x{outer} {dtype} {tail}", launched(plan, [x, *few, *others(other), *packed, *more]), expected


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


def some_shape(kind: str) -> Convolution:
    kernel = random.choice(((1, 1), (3, 3), (3, 3), (2, 5)))
    channels, filters = random.choice((1, 3, 8, 16, 20, 32, 64)), random.choice((1, 10, 16, 40, 64))
    groups = 1
    if kind == "grouped":
        groups = random.choice((2, 3, 4, 5))
        channels, filters = groups * random.choice((1, 4, 9, 16)), groups * random.choice((2, 4, 11, 24))
    if kind == "depthwise":
        channels = filters = groups = random.choice((3, 16, 40, 100))
    if kind == "image":
        channels, kernel = random.choice((1, 3)), (3, 3)
    if kind == "framed":
        channels, kernel = random.choice((2, 3, 4)), random.choice(((7, 7), (5, 7), (6, 9)))
    padding = random.choice(((0, 0), (1, 1), (2, 1))) if kernel != (1, 1) else (0, 0)
    return Convolution(
        batch=random.choice((1, 2)),
        channels=channels,
        height=random.randint(9, 12),
        width=random.randint(9, 12),
        filters=filters,
        kernel=kernel,
        stride=random.choice(((1, 1), (2, 2), (1, 2))),
        padding=padding,
        dilation=random.choice(((1, 1), (1, 1), (2, 1))) if kernel == (3, 3) else (1, 1),
        groups=groups,
    )


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
    rows, inner, parts, given = random.choice((1, 5, 37, 130)), random.choice((16, 37, 96)), [], []
    dtype, zero_point = random.choice((("uint8", 7), ("int8", -3)))
    x = codes(dtype, (rows, inner))
    for outer in random.sample((1, 2, 16, 37, 70), random.choice((2, 3))):
        tail, values = with_table(*some_tail("rescale", inner, outer))
        bias = random.choice((None, torch.randint(-1000, 1000, (outer,), dtype=torch.int32)))
        parts.append(plan_linears.Part(outer, tail))
        given.append((codes("int8", (outer, inner)), bias, values))
    plan = plan_linears.linears(rows, inner, dtype, parts, "sm_90", some_block())
    weights, biases, vectors = zip(*given, strict=True)
    arrays = [[None if t is None else t.numpy() for t in column] for column in (weights, biases)]
    packed = plan_linears.pack(dtype, zero_point, parts, *arrays, vectors)
    outs = [torch.empty(shape, dtype=TORCH[kind], device=DEVICE) for _, shape, kind in plan.buffers[-len(parts) :]]
    run(plan, [x.to(DEVICE), *(torch.from_numpy(a).to(DEVICE) for a in packed), *outs])
    expected = [
        finished(gw.linear(x, weight, bias, zero_point), part.tail, values, None, 1).to(torch.int32)
        for part, (weight, bias, values) in zip(parts, given, strict=True)
    ]
    text = f"{rows}x{inner} {dtype} {[part.outer for part in parts]}"
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
    q_zero_point, scale = random.choice((0, 7)), 0.0005
    p_zero_point, p_qmin, p_qmax = (0, 0, 255) if p_dtype == "uint8" else (-128, -128, 127)
    q = codes(q_dtype, (outer, heads, rows, width))
    k, v = codes("int8", (outer, heads, width, keys)), codes("int8", (outer, keys, heads, width))
    mask = random.choice((None, torch.randn(outer, 1, 1, keys) * 3 - 10000.0 * (torch.rand(outer, 1, 1, keys) < 0.3)))
    tail, values = some_tail(random.choice(("rescale", "dyadic", "scale", "none")), 400, width)
    step = float(np.float32(1 / 255))
    swapped = random.random() < 0.5
    out_shape = (outer, rows, heads, width) if swapped else (outer, heads, rows, width)
    row, head = (width * heads, width) if swapped else (width, width * rows)
    shape = IntegerAttention(
        outer, heads, rows, width, keys, width,
        q=Heads(0, heads * rows * width, rows * width, width, 1),
        k=Heads(0, heads * width * keys, width * keys, keys, 1),
        v=Heads(0, keys * heads * width, width, heads * width, 1),
        mask=None if mask is None else Heads(0, keys, 0, 0, 1),
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


# -- float -------------------------------------------------------------------------------------------------------------------

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def float_type() -> str:
    return random.choice(("float32", "float16") if DEVICE == "cpu" else ("float32", "float16", "bfloat16"))


def float_tail() -> FloatTail:
    function = random.choice((None, None, "exp", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh", "hardsigmoid", "hardswish"))
    low, high = random.choice(((None, None), (0.0, None), (0.0, 6.0)))
    return FloatTail(random.random() < 0.5, function, low, high)


FUNCTIONS = {
    None: lambda x: x,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "hardswish": torch.nn.functional.hardswish,
}


def bounded(
    exact: torch.Tensor, magnitude: torch.Tensor, tail: FloatTail, unit: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, bound of its error) behind a tail: sums are off by `unit` of their magnitude. Slopes of the functions are below
    1.2; exp's is itself."""
    wanted = FUNCTIONS[tail.function](exact)
    wanted = wanted if tail.low is None else wanted.clamp(tail.low, tail.high)
    bound = unit * magnitude * 1.2 * (wanted.abs().clamp(min=1) if tail.function == "exp" else 1)
    bound = bound + 200 * 2.0**-23 * wanted.abs() + 3e-7
    return wanted, bound + (EPSILON[dtype] * wanted.abs() + 2.0**-24 if dtype != "float32" else 0)


def beyond(
    out: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, tail: FloatTail, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out with the exact value wherever it keeps the bound, exact)."""
    wanted, bound = bounded(exact, magnitude, tail, (depth + 4) * 2.0**-23, str(out.dtype).removeprefix("torch."))
    return torch.where((out.double() - wanted).abs() <= bound, wanted, out.double()), wanted


def float_linear_case() -> Case:
    rows, inner, outer = random.randint(1, 70), random.choice((16, 37, 64, 100)), random.choice((5, 16, 33, 64))
    dtype, tail = float_type(), float_tail()
    x, weight, other = (torch.randn(shape).to(TORCH[dtype]) for shape in ((rows, inner), (outer, inner), (rows, outer)))
    weight = (weight.float() / inner**0.5).to(TORCH[dtype])
    bias = torch.randn(outer)
    plan = plan_float.linear(rows, inner, outer, dtype, tail, "sm_90")
    packed = torch.from_numpy(plan_float.pack_linear(weight.float().numpy())).to(TORCH[dtype])
    out = launched(plan, [x, *([other] if tail.residual else []), packed, plan_float.pack_bias(outer, bias.numpy())])
    add = bias.double() + (other.double() if tail.residual else 0)
    exact, magnitude = x.double() @ weight.double().t() + add, x.double().abs() @ weight.double().abs().t() + add.abs()
    return f"{rows}x{inner}x{outer} {dtype} {tail}", *beyond(out, exact, magnitude, tail, inner)


def float_convolution_case(kind: str) -> Case:
    shape, dtype, tail = some_shape("image" if kind == "planar" else kind), float_type(), float_tail()
    x = torch.randn(shape.batch, shape.channels, shape.height, shape.width).to(TORCH[dtype])
    depth = shape.macs // (shape.batch * shape.filters * shape.out_height * shape.out_width)
    weight = (torch.randn(shape.filters, shape.channels // shape.groups, *shape.kernel) / depth**0.5).to(TORCH[dtype])
    other = torch.randn(shape.batch, shape.filters, shape.out_height, shape.out_width).to(TORCH[dtype])
    bias = torch.randn(shape.filters)
    planar = kind == "planar"
    if shape.depthwise:
        plan = plan_float.depthwise(shape, dtype, tail)
    else:
        plan = plan_float.convolution(shape, dtype, tail, "sm_90", planar)
    packed = torch.from_numpy(plan_float.pack_convolution(shape, weight.float().numpy())).to(TORCH[dtype])
    residual = [lanes(other)] if tail.residual else []
    out = launched(plan, [x if planar else lanes(x), *residual, packed, plan_float.pack_bias(shape.filters, bias.numpy())])
    arguments = shape.stride, shape.padding, shape.dilation, shape.groups
    add = bias.double()[:, None, None] + (other.double() if tail.residual else 0)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, *arguments) + add
    magnitude = torch.nn.functional.conv2d(x.double().abs(), weight.double().abs(), None, *arguments) + add.abs()
    out = out[..., : shape.filters].permute(0, 3, 1, 2)
    return f"{kind} {shape.work} {dtype} {tail}", *beyond(out, exact, magnitude, tail, depth)


def lanes(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, H, W, Cp]; the lanes past C hold what would spoil every sum."""
    n, c, h, w = x.shape
    out = torch.full((n, h, w, padded(c)), float("nan"), dtype=x.dtype)
    out[..., :c] = x.permute(0, 2, 3, 1)
    return out


def float_matmul_case() -> Case:
    batch, rows = random.randint(1, 3), random.randint(1, 40)
    inner, columns = random.choice((16, 33, 64)), random.choice((5, 16, 50))
    dtype, tail, transposed = float_type(), float_tail(), random.random() < 0.5
    shapes = ((batch, rows, inner), (batch, inner, columns), (batch, rows, columns))
    a, b, other = (torch.randn(shape).to(TORCH[dtype]) for shape in shapes)
    a = (a.float() / inner**0.5).to(TORCH[dtype])
    plan = plan_float.matmul(batch, rows, inner, columns, transposed, dtype, tail, "sm_90")
    given = b.transpose(1, 2).contiguous() if transposed else b
    out = launched(plan, [a, *([other] if tail.residual else []), given])
    add = other.double() if tail.residual else torch.zeros(())
    exact, magnitude = a.double() @ b.double() + add, a.double().abs() @ b.double().abs() + add.abs()
    return f"{shapes} {transposed} {dtype} {tail}", *beyond(out, exact, magnitude, tail, inner)


def float_attention_case() -> Case:
    outer, heads, rows, width = random.randint(1, 2), random.randint(1, 3), random.randint(1, 40), random.choice((16, 20, 64))
    keys, dtype = random.choice((rows, random.randint(1, 150))), float_type()
    q, k, v = (torch.randn(outer, length, heads, width).to(TORCH[dtype]) for length in (rows, keys, keys))
    blocked = -10000.0 * (torch.rand(outer, 1, 1, keys) < 0.3)
    mask = random.choice((None, (torch.randn(outer, 1, 1, keys) + blocked).to(TORCH[dtype])))
    place = lambda length: Heads(0, length * heads * width, width, heads * width, 1)  # noqa: E731
    shape = plan_float.FloatAttention(
        outer, heads, rows, width, keys, width, width**-0.5, place(rows), place(keys), place(keys),
        None if mask is None else Heads(0, keys, 0, 0, 1), place(rows),
    )  # fmt: skip
    given = [q, k, v, *([] if mask is None else [mask])]
    plan = plan_float.attention(shape, [tensor.numel() for tensor in given], (outer, rows, heads, width), dtype)
    out = launched(plan, [tensor.reshape(-1) for tensor in given])
    qd, kd, vd = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    scores = qd @ kd.transpose(2, 3) * width**-0.5 + (0 if mask is None else mask.double())
    exact = (torch.softmax(scores, -1) @ vd).transpose(1, 2)
    # Scores off by 2^-20, probabilities rounded to the type of the values, one rounding more of the result.
    bound = (2.0**-19 + 2 * EPSILON[dtype]) * (torch.softmax(scores, -1) @ vd.abs()).transpose(1, 2)
    kept = (out.double() - exact).abs() <= bound
    return f"{q.shape} {keys} keys {dtype} {mask is not None}", torch.where(kept, exact, out.double()), exact


# -- codes of a table ----------------------------------------------------------------------------------------------------------


def some_codes(rows: int, taps: int, channels: int) -> tuple[plan_coded.Codes, list[torch.Tensor], torch.Tensor]:
    """A weight of rows x (channels, taps), its buffers, and its values by `gw.decode`."""
    rule, bits = random.choice(("integers", "minifloat", "table")), random.choice((2, 3, 4, 4, 5, 8))
    bits = min(bits, 4) if rule == "minifloat" else bits  # larger powers leave half precision
    entries = (1 << bits) - (rule == "minifloat")
    table, numbers = torch.randn(entries), {}
    if rule == "integers":
        table, numbers = torch.arange(entries).float() - 3, {"first": -3}
    if rule == "minifloat":  # one mantissa bit; entry n on either side of `origin`
        origin = entries // 2
        sizes = [(n & 1) + 2 * (n >= 2) for n in range(origin + 1)]
        positive = [size * 2.0 ** (max(n >> 1, 1) - 1 - 4) for n, size in enumerate(sizes)][1:]
        table = torch.tensor([-v for v in reversed(positive)] + [0.0, *positive])
        numbers = {"origin": origin, "mantissa": 1, "lowest": -4}
    count = taps * channels
    group = random.choice((count, 8, 32))
    groups = -(-count // group)
    with_zero = random.random() < 0.5
    shape = plan_coded.Codes(rows, count, bits, group, groups, entries, with_zero, taps, rule, **numbers)
    codes = torch.randint(0, entries, (rows, count), dtype=torch.uint8)
    scale = torch.rand(rows, groups) + 0.5
    zero = torch.randint(0, 4, (rows, groups)).float() if with_zero else None
    value = gw.decode(codebook.pack(codes, bits), bits, [rows, count], table, scale, group, zero)
    order = torch.arange(count).reshape(channels, taps).t().reshape(-1)
    full = torch.zeros(padded(rows), count, dtype=torch.uint8)
    full[:rows] = codes[:, order]
    stream = codebook.pack(full, bits).reshape(shape.panels, 16, -1).transpose(1, 2).contiguous()
    grouped = [torch.nn.functional.pad(t, (0, 0, 0, padded(rows) - rows)) for t in (scale, zero) if t is not None]
    grouped = [t.reshape(shape.panels, 16, groups).transpose(1, 2).contiguous() for t in grouped]
    tables = [torch.nn.functional.pad(table, (0, padded(entries) - entries))] if rule == "table" else []
    return shape, [stream, *grouped, *tables], value


def coded_linear_case() -> Case:
    rows, inner, outer = random.randint(1, 4), random.choice((24, 64, 200, 1000)), random.choice((5, 16, 40))
    dtype, tail = float_type(), float_tail()
    shape, buffers, weight = some_codes(outer, 1, inner)
    x, other, bias = torch.randn(rows, inner) / inner**0.5, torch.randn(rows, outer), torch.randn(outer)
    x, other, weight = x.to(TORCH[dtype]), other.to(TORCH[dtype]), weight.double() / 8
    buffers[1] = buffers[1] / 8
    plan = plan_coded.linear(rows, shape, dtype, tail)
    out = launched(plan, [x, *([other] if tail.residual else []), *buffers, plan_float.pack_bias(outer, bias.numpy())])
    add = bias.double() + (other.double() if tail.residual else 0)
    exact, magnitude = x.double() @ weight.t() + add, x.double().abs() @ weight.abs().t() + add.abs()
    return f"{rows}x{inner}x{outer} {shape} {dtype} {tail}", *beyond(out, exact, magnitude, tail, inner)


def coded_decode_case() -> Case:
    """What decoding gives is what packing the decoded weight gives."""
    kernel, channels = random.choice(((1, 1), (3, 3))), random.choice((1, 3, 20, 32))
    outer, taps = random.choice((5, 16, 40)), kernel[0] * kernel[1]
    channels = max(channels, 2) if taps == 1 else channels
    groups = outer if channels == 1 else 1
    shape, buffers, weight = some_codes(outer, taps, channels)
    out = launched(plan_coded.decode(shape), buffers)
    image = Convolution(1, outer if groups > 1 else channels, 9, 9, outer, kernel, groups=groups)
    values = weight.reshape(outer, channels, *kernel).numpy()
    expected = plan_float.pack_convolution(image, values) if taps > 1 else plan_float.pack_linear(weight.numpy())
    return f"{outer}x{channels}x{kernel} {shape}", out, torch.from_numpy(expected)


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


def main(cases: dict[str, Callable[[], Case]]) -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    for group in sys.argv[3:] or cases:
        for index in range(count):
            random.seed(seed + index)
            torch.manual_seed(seed + index)
            try:
                text, out, expected = cases[group]()
            except Exception as error:  # one kernel that does not compile must not hide the others
                cause = f"{error} {error.__cause__ or ''}"[-2000:]
                print(json.dumps({"group": group, "case": f"seed {seed + index}", "error": cause}), flush=True)
                continue
            wrong = int((out != expected).sum()) if out.shape == expected.shape else -1
            row = {"group": group, "case": text, "wrong": wrong, "values": len(expected.unique())}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(CASES)
