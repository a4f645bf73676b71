"""Kernels that multiply 8-bit floats, in Triton's interpreter or on a GPU, against `gw::` in float64. As `triton_worker`:

TRITON_INTERPRET=1 python triton_fp8_worker.py SEED COUNT [GROUP ...]
"""

from __future__ import annotations

import random
from math import ceil

import torch
import torch.nn.functional as F
from graphwright.backends.tvm.cuda.kernels import plan_float, plan_fp8
from graphwright.backends.tvm.cuda.kernels.plan_float import FloatTail
from graphwright.backends.tvm.cuda.kernels.plan_store import Store
from graphwright.backends.tvm.cuda.kernels.plans import Plan, run
from graphwright.backends.tvm.kernels.base import Convolution, padded
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.fp8 import E4M3, inverse_of
from triton_cases import DEVICE, TORCH, Case, launched, main, some_block
from triton_float_cases import bounded, float_tail, float_type

#: Of codes that a kernel makes of its result.
SCALE = 0.33

#: Products that one sum takes in half of the cases: several sums, the last one shorter.
FEW = 96


def numbers(*shape: int) -> torch.Tensor:
    """e4m3 numbers of all magnitudes, subnormal ones and the largest among them."""
    return (torch.randn(shape) * torch.exp2(torch.randint(-9, 7, shape).float())).clamp(-448, 448).to(E4M3)


def lanes(x: torch.Tensor, fill: float) -> torch.Tensor:
    """[N, C, H, W] -> [N, H, W, Cp]; the lanes past C hold `fill`."""
    n, c, h, w = x.shape
    out = torch.full((n, h, w, padded(c)), fill).to(x.dtype)
    out[..., :c] = x.permute(0, 2, 3, 1)
    return out


def some_store() -> Store:
    return random.choice((Store(), Store(True, True), Store(False, True)))


def outputs(plan: Plan, inputs: list[torch.Tensor], store: Store) -> dict[str, torch.Tensor]:
    """What the plan writes, by buffer."""
    count, inputs = store.outputs, [*inputs, *([inverse_of(SCALE).reshape(1)] if store.codes else [])]
    written = [torch.full(shape, 77, dtype=TORCH[dtype], device=DEVICE) for _, shape, dtype in plan.buffers[-count:]]
    for tensor, (name, shape, dtype) in zip(inputs, plan.buffers[:-count], strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, TORCH[dtype]), (name, tensor.shape, shape)
    run(plan, [*(tensor.to(DEVICE) for tensor in inputs), *written])
    return {name: tensor.cpu() for (name, _, _), tensor in zip(plan.buffers[-count:], written, strict=True)}


def judged(
    out: dict[str, torch.Tensor], sums: tuple[torch.Tensor, torch.Tensor], tail: FloatTail, store: Store, depth: int, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(results with the exact one wherever they keep the bound, exact ones). Codes must be those of a value within the bound.

    sums: the exact ones and their magnitudes.
    """
    kept: list[torch.Tensor] = []
    # The interpreter sums in float32, tensor cores as `triton_fp8` says.
    unit = (depth + 4) * 2.0**-23 + (0 if DEVICE == "cpu" else (ceil(min(depth, plan_fp8.SUMMED) / 32) + 1) * 2.0**-13)
    wanted, bound = bounded(*sums, tail, unit, dtype)
    if store.value:
        value = out["Y"].double()
        kept.append(torch.where((value - wanted).abs() <= bound, wanted, value))
    if store.codes:
        codes = out["Q"].view(E4M3).double()
        low, high = (gw.quantize_fp8(wanted + side, SCALE).double() for side in (-bound, bound))
        kept.append(torch.where((codes >= low) & (codes <= high), wanted, codes))
    return torch.cat(kept), torch.cat([wanted] * len(kept))


def linear_case() -> Case:
    rows, inner, outer = random.randint(1, 70), random.choice((16, 37, 64, 100, 300)), random.choice((5, 16, 33, 64))
    dtype, tail, store, summed = float_type(), float_tail(), some_store(), random.choice((FEW, plan_fp8.SUMMED))
    x, weight, other = numbers(rows, inner), numbers(outer, inner), torch.randn(rows, outer).to(TORCH[dtype])
    scale, bias = (torch.rand(outer) + 0.5) / (300 * inner**0.5), torch.randn(outer)
    plan = plan_fp8.linear(rows, inner, outer, dtype, tail, "sm_90", store, some_block(), summed)
    packed = plan_fp8.pack_linear(weight.view(torch.uint8).numpy())
    vectors = plan_fp8.pack_scale(outer, scale.numpy()), plan_float.pack_bias(outer, bias.numpy())
    given = [x.view(torch.uint8), *([other] if tail.residual else []), *map(torch.from_numpy, (packed, *vectors))]
    add = bias.double() + (other.double() if tail.residual else 0)
    exact = x.double() @ weight.double().t() * scale.double() + add
    magnitude = x.double().abs() @ weight.double().abs().t() * scale.double() + add.abs()
    text = f"{rows}x{inner}x{outer} {dtype} {tail} {store} {summed}"
    return text, *judged(outputs(plan, given, store), (exact, magnitude), tail, store, inner, dtype)


def some_shape() -> Convolution:
    kernel, channels = random.choice(((1, 1), (3, 3), (3, 3), (2, 5))), random.choice((16, 20, 32, 64, 100))
    return Convolution(
        batch=random.choice((1, 2)),
        channels=channels,
        height=random.randint(5, 9),
        width=random.randint(5, 9),
        filters=random.choice((1, 10, 16, 40)),
        kernel=kernel,
        stride=random.choice(((1, 1), (2, 2), (1, 2))),
        padding=random.choice(((0, 0), (1, 1), (2, 1))) if kernel != (1, 1) else (0, 0),
        dilation=random.choice(((1, 1), (1, 1), (2, 1))),
    )


def convolution_case() -> Case:
    shape, dtype, tail, store = some_shape(), float_type(), float_tail(), some_store()
    summed = random.choice((FEW, plan_fp8.SUMMED))
    x = numbers(shape.batch, shape.channels, shape.height, shape.width)
    weight = numbers(shape.filters, shape.channels, *shape.kernel)
    depth = weight[0].numel()
    other = torch.randn(shape.batch, shape.filters, shape.out_height, shape.out_width).to(TORCH[dtype])
    scale, bias = (torch.rand(shape.filters) + 0.5) / (300 * depth**0.5), torch.randn(shape.filters)
    plan = plan_fp8.convolution(shape, dtype, tail, "sm_90", store, some_block(), summed)
    packed = plan_fp8.pack_convolution(shape, weight.view(torch.uint8).numpy())
    vectors = plan_fp8.pack_scale(shape.filters, scale.numpy()), plan_float.pack_bias(shape.filters, bias.numpy())
    residual = [lanes(other, float("nan"))] if tail.residual else []
    given = [lanes(x, float("nan")).view(torch.uint8), *residual, *map(torch.from_numpy, (packed, *vectors))]
    out = {name: tensor[..., : shape.filters].permute(0, 3, 1, 2) for name, tensor in outputs(plan, given, store).items()}
    out = {name: tensor.contiguous() for name, tensor in out.items()}
    by_channel = scale.double()[:, None, None]
    add = bias.double()[:, None, None] + (other.double() if tail.residual else 0)
    arguments = shape.stride, shape.padding, shape.dilation
    exact = F.conv2d(x.double(), weight.double(), None, *arguments) * by_channel + add
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), None, *arguments) * by_channel + add.abs()
    text = f"{shape.work} {dtype} {tail} {store} {summed}"
    return text, *judged(out, (exact, magnitude), tail, store, depth, dtype)


def quantize_case() -> Case:
    """Every float16, and floats of any bits: the bytes of `gw::quantize_fp8`, saturated, subnormal and NaN ones included."""
    if random.random() < 0.5:
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    else:
        x = torch.randint(-(1 << 31), 1 << 31, (20_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
        x[:8_000] = torch.randn(8_000) * torch.exp2(torch.randint(-12, 10, (8_000,)).float())
    scale = random.choice((1.0, 0.013, 7.0))
    plan = plan_fp8.quantize(x.numel(), str(x.dtype).removeprefix("torch."))
    expected = gw.quantize_fp8(x, scale).view(torch.uint8)
    # The sign of a NaN is anybody's.
    return f"{x.dtype} {scale}", unsigned_nan(launched(plan, [x, inverse_of(scale).reshape(1)])), unsigned_nan(expected)


def unsigned_nan(codes: torch.Tensor) -> torch.Tensor:
    return torch.where(codes == 0xFF, 0x7F, codes)


CASES = {"fp8-linear": linear_case, "fp8-convolution": convolution_case, "fp8-quantize": quantize_case}

if __name__ == "__main__":
    main(CASES)
