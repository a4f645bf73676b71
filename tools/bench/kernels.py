"""Rates of the designed kernels, int8 or float32, layer by layer, on this machine.

    python -m graphwright.tools.bench.kernels --network efficientnet-lite0 --level avx512-vnni --threads 2
    python -m graphwright.tools.bench.kernels --dtype float32 --threads 2
    python -m graphwright.tools.bench.kernels --convolution 96,56,24,1,1,0 --repeats 500

Each distinct layer is compiled alone and timed in a warm loop; the figure is the least of `--repeats` batches, which on a shared
machine is the one least disturbed. Operands come from the cache, so a network's sum is a lower bound of its latency.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from ...backends.tvm.kernels.base import Convolution


@dataclass(frozen=True)
class Layer:
    """One convolution (square kernel, symmetric padding) or, with size 0, one linear layer of one row."""

    channels: int
    size: int
    filters: int
    kernel: int
    stride: int
    depthwise: bool = False


#: EfficientNet-lite0: (expansion, kernel, stride, channels out, repeats) of each stage, after a 3x3 stride-2 stem of 32 filters.
LITE0_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def efficientnet_lite0(resolution: int = 224) -> Counter[Layer]:
    """The distinct layers of EfficientNet-lite0 and how often each occurs (Tan and Le, arXiv:1905.11946; lite: no squeeze)."""
    layers: Counter[Layer] = Counter([Layer(3, resolution, 32, 3, 2)])
    channels, size = 32, resolution // 2
    for expansion, kernel, first_stride, filters, repeats in LITE0_STAGES:
        for index in range(repeats):
            stride, wide = (first_stride if index == 0 else 1), channels * expansion
            if expansion > 1:
                layers[Layer(channels, size, wide, 1, 1)] += 1
            layers[Layer(wide, size, wide, kernel, stride, depthwise=True)] += 1
            size //= stride
            layers[Layer(wide, size, filters, 1, 1)] += 1
            channels = filters
    layers[Layer(channels, size, 1280, 1, 1)] += 1
    layers[Layer(1280, 0, 1000, 1, 1)] += 1
    return layers


def shape_of(layer: Layer, batch: int) -> Convolution:
    from ...backends.tvm.kernels.base import Convolution

    groups, pad = (layer.channels if layer.depthwise else 1), layer.kernel // 2
    return Convolution(
        batch, layer.channels, layer.size, layer.size, layer.filters,
        (layer.kernel, layer.kernel), (layer.stride, layer.stride), (pad, pad), groups=groups,
    )  # fmt: skip


def int8_case(layer: Layer, level: str, batch: int) -> tuple[PrimFunc, list[np.ndarray], int]:
    """(kernel, its arrays in order, multiply-accumulates)."""
    from ...backends.tvm.kernels import convolution_int8, linear_int8
    from ...backends.tvm.kernels.base import Tail, padded

    rng = np.random.default_rng(0)
    tail, scale = Tail("rescale", "uint8", 3, 0, 255, shrinks=True), np.full(1, 1e-4, np.float32)
    if layer.size:
        shape = shape_of(layer, batch)
        weight = rng.integers(-127, 128, (layer.filters, layer.channels // shape.groups, *shape.kernel)).astype(np.int8)
        spec, macs = convolution_int8.ConvolutionInt8(shape, "uint8", 7), shape.macs
        x_shape = (batch, layer.size, layer.size, padded(layer.channels))
        y_shape = (batch, shape.out_height, shape.out_width, padded(layer.filters))
        function = convolution_int8.build(spec, tail, level)
        packed = convolution_int8.pack(spec, tail, level, weight, None, scale=scale)
    else:
        weight = rng.integers(-127, 128, (layer.filters, layer.channels)).astype(np.int8)
        spec = linear_int8.LinearInt8(batch, layer.channels, layer.filters, "uint8", 7)
        macs = batch * layer.channels * layer.filters
        x_shape, y_shape = (batch, layer.channels), (batch, layer.filters)
        function, packed = linear_int8.build(spec, tail, level), linear_int8.pack(spec, tail, level, weight, None, scale=scale)
    return function, [rng.integers(0, 256, x_shape).astype(np.uint8), *packed, np.zeros(y_shape, np.uint8)], macs


def float32_case(layer: Layer, level: str, batch: int) -> tuple[PrimFunc, list[np.ndarray], int]:
    """(kernel, its arrays in order, multiply-accumulates)."""
    from ...backends.tvm.kernels import convolution_f32, depthwise_f32, linear_f32
    from ...backends.tvm.kernels.base import padded
    from ...backends.tvm.kernels.float_base import RELU6, FloatSpec, MatrixProduct

    rng = np.random.default_rng(0)
    bias, spec = convolution_f32.pack_bias(layer.filters, None), FloatSpec(RELU6, level=level)
    if not layer.size:
        weight = linear_f32.pack_weight(rng.standard_normal((layer.filters, layer.channels)))
        x, y = rng.standard_normal((batch, layer.channels)).astype(np.float32), np.zeros((batch, layer.filters), np.float32)
        function = linear_f32.linear(MatrixProduct(batch, layer.channels, layer.filters), FloatSpec(level=level))
        return function, [x, weight, bias, y], batch * layer.channels * layer.filters
    shape = shape_of(layer, batch)
    weight = rng.standard_normal((layer.filters, layer.channels // shape.groups, *shape.kernel))
    planar = layer.channels == 3  # a network's input
    interleaved = (batch, layer.size, layer.size, padded(layer.channels))
    x = rng.standard_normal((batch, layer.channels, layer.size, layer.size) if planar else interleaved).astype(np.float32)
    y = np.zeros((batch, shape.out_height, shape.out_width, padded(layer.filters)), np.float32)
    if layer.depthwise:
        return depthwise_f32.depthwise(shape, spec), [x, depthwise_f32.pack_weight(shape, weight), bias, y], shape.macs
    function = convolution_f32.convolution(shape, spec, planar)
    return function, [x, convolution_f32.pack_weight(shape, weight), bias, y], shape.macs


CASES = {"int8": int8_case, "float32": float32_case}


def measure(layer: Layer, dtype: str, level: str, mcpu: str, repeats: int, batch: int) -> tuple[float, int]:
    """(least microseconds, multiply-accumulates) of one layer."""
    import tvm

    function, arrays, macs = CASES[dtype](layer, level, batch)
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "num-cores": os.cpu_count() or 1})
    run = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)["main"]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(10):
            run(*tensors)
        best = min(best, (time.perf_counter() - start) / 10)
    return best * 1e6, macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["efficientnet-lite0"], default="efficientnet-lite0")
    parser.add_argument("--convolution", help="one layer instead: CHANNELS,SIZE,FILTERS,KERNEL,STRIDE,DEPTHWISE (0 or 1)")
    parser.add_argument("--dtype", choices=sorted(CASES), default="int8")
    parser.add_argument("--level", help="kernel level; default: avx512-vnni for int8, avx512 for float32")
    parser.add_argument("--mcpu", default="cascadelake", help="LLVM processor name of the level")
    parser.add_argument("--threads", type=int, default=0, help="TVM worker threads; 0: every core")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    if options.threads:
        os.environ["TVM_NUM_THREADS"] = str(options.threads)
    level = options.level or {"int8": "avx512-vnni", "float32": "avx512"}[options.dtype]
    if options.convolution:
        *sizes, depthwise = (int(text) for text in options.convolution.split(","))
        layers = Counter([Layer(*sizes, depthwise=bool(depthwise))])
    else:
        layers = efficientnet_lite0()
    total_us = total_macs = 0.0
    print(f"{'layer':<34} {'times':>5} {'us':>9} {'GOP/s':>8}")
    for layer, count in layers.items():
        us, macs = measure(layer, options.dtype, level, options.mcpu, options.repeats, options.batch)
        total_us, total_macs = total_us + us * count, total_macs + macs * count
        kind = "depthwise" if layer.depthwise else "dense" if layer.size else "linear"
        text = f"{kind} {layer.channels}x{layer.size}^2 -> {layer.filters} k{layer.kernel} s{layer.stride}"
        print(f"{text:<34} {count:>5} {us:>9.1f} {2 * macs / us / 1e3:>8.0f}", flush=True)
    rate = 2 * total_macs / total_us / 1e3
    print(f"sum {total_us / 1e3:.3f} ms, {total_macs / 1e6:.0f} M multiply-accumulates, {rate:.0f} GOP/s")


if __name__ == "__main__":
    main()
