"""Cases of the float kernels and of weights as codes of a table, for `triton_worker`: within a stated bound of float64."""

from __future__ import annotations

import random

import torch
from graphwright.backends.tvm.cuda.kernels import plan_coded, plan_float
from graphwright.backends.tvm.cuda.kernels.plan_attention import Heads
from graphwright.backends.tvm.cuda.kernels.plan_float import FloatTail
from graphwright.backends.tvm.kernels.base import Convolution, padded
from graphwright.ir.dialect import codebook, gw
from triton_cases import DEVICE, TORCH, Case, launched, some_shape

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
