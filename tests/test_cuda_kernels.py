"""Memory-bound kernels for CUDA: functions of loops compute what the CPUs' do, and row kernels have the dialect's bits."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cuda_emulation
import numpy as np
import pytest
import runner
import tvm
from graphwright.backends.target import Target
from graphwright.backends.tvm.cuda import schedule, tir
from graphwright.backends.tvm.cuda.kernels import activation_f32, decode_rows, layer_norm_exact, pooling_f32, softmax_exact
from graphwright.backends.tvm.cuda.launch import triton_call
from graphwright.backends.tvm.cuda.triton_aot import compile_kernel
from graphwright.backends.tvm.kernels import decode_rows as cpu_decode
from graphwright.backends.tvm.kernels import elementwise_int8, layout, pooling_int8
from graphwright.backends.tvm.kernels import pooling_f32 as cpu_pooling
from graphwright.backends.tvm.kernels.base import Convolution, Tail
from graphwright.backends.tvm.kernels.emit import arguments, build
from graphwright.backends.tvm.kernels.float_base import Activation
from graphwright.backends.tvm.kernels.isa import T
from graphwright.backends.tvm.kernels.quantize_image import Quantize
from graphwright.backends.tvm.target import cuda_target, generating
from graphwright.ir.errors import UnsupportedOpError

SM90 = Target("cuda", "sm_90")
RNG = np.random.default_rng(5)


def size(most: int) -> int:
    return int(RNG.integers(1, most + 1))


def cases() -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """(generator, arguments) of random shapes."""
    shape = (size(3), size(40), size(9), size(9))
    dense = tuple(size(12) for _ in range(size(3)))
    kernel, stride, padding = (size(3), size(3)), (size(3), size(3)), (0, size(2) - 1)
    height, width = size(9) + 3, size(9) + 3
    out = ((height - kernel[0]) // stride[0] + 1, (width + 2 * padding[1] - kernel[1]) // stride[1] + 1)
    pool = pooling_int8.Pool(size(2), size(40), height, width, kernel, stride, padding, (1, 1), *out)
    rescale, dyadic = Tail("rescale", "uint8", 3, 0, 255), Tail("dyadic", "int8", -2, -128, 127)
    return [
        (layout.to_channels, (shape, "int8")),
        (layout.from_channels, (shape, "float32")),
        (layout.pad_channels, ((1, 4, 5, 16), (1, 0), (size(2), 1), 7, "uint8")),
        (layout.concatenate_channels, (size(9), (size(40), size(40)), "uint8")),
        (layout.slice_channels, (size(9), 40, 3, 3 + size(37), "int8")),
        (layout.add_lanes, (size(9), size(40), "int8")),
        (layer_norm_exact.apply_statistics, (size(9), size(40))),
        (elementwise_int8.quantize, (dense, 0.05, 7, 0, 255, "uint8")),
        (elementwise_int8.rescale, ((2, *dense), len(dense), rescale)),
        (elementwise_int8.rescale, ((2, *dense), 0, dyadic)),
        (elementwise_int8.lookup, (dense, "int8", "uint8")),
        (pooling_int8.max_pool2d, (pool, "int8")),
        (pooling_int8.sum_pool2d, (pool, "uint8", 9, rescale)),
        (pooling_int8.dense_sum, ((size(4), size(30), size(5)), (1,), "int8", -3, 2, Tail("none", "int32"))),
    ]


def inputs_of(function: Any) -> list[np.ndarray]:
    """Random operands for every buffer but the last: shifts and scales as they really are."""
    arrays = []
    for buffer in function.params[:-1]:
        shape, dtype = [int(d) for d in buffer.shape], str(buffer.dtype)
        if dtype.startswith("float"):
            arrays.append((RNG.standard_normal(shape) * 3).astype(dtype))
        elif buffer.name == "shift":
            arrays.append(RNG.integers(20, 40, shape).astype(dtype))
        else:
            info = np.iinfo(dtype)
            arrays.append(RNG.integers(max(info.min, -(1 << 20)), min(info.max, 1 << 20) + 1, shape).astype(dtype))
    return arrays


def on_cpu(function: Any, inputs: list[np.ndarray], out: np.ndarray) -> np.ndarray:
    run = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target="llvm")
    arguments = [tvm.runtime.tensor(x) for x in (*inputs, out)]
    run["main"](*arguments)
    return arguments[-1].numpy()


def emulated(functions: dict[str, Any], folder) -> Callable[..., np.ndarray]:
    """A function (name, inputs, out) that runs one of `functions`, scheduled for threads, on this CPU."""
    nests = tir.split_nests(functions, cuda_target(SM90))
    module = tvm.IRModule({n.symbol: n.function for kernel in nests.values() for n in kernel.launches})
    library = ctypes.CDLL(str(cuda_emulation.emulate(tir.cuda_source(module, cuda_target(SM90)), folder)))

    def run(name: str, inputs: list[np.ndarray], out: np.ndarray) -> np.ndarray:
        out = out.copy()
        buffers = [np.ascontiguousarray(x) for x in inputs] + [out]
        buffers += [np.zeros(count, np.uint8) for count in nests[name].scratch]
        pointers = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
        slots = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(pointers) + 8 * i for i in range(len(buffers))))
        for launch in nests[name].launches:
            getattr(library, f"emulate_{launch.symbol}")((ctypes.c_uint * 6)(*launch.grid, *launch.block), slots)
        return out

    return run


def output_of(function: Any) -> np.ndarray:
    buffer = function.params[-1]
    return np.full([int(d) for d in buffer.shape], 77, str(buffer.dtype))


def test_functions_of_loops_compute_what_they_do_on_cpus(tmp_path):
    """Every element of every output is written, whatever the shape: what no thread wrote would keep its 77."""
    specs = [case for _ in range(3) for case in cases()]
    with generating(SM90):
        functions = {f"k{i}": generator(*spec) for i, (generator, spec) in enumerate(specs)}
    run = emulated(functions, tmp_path)
    for name, (generator, spec) in zip(functions, specs, strict=True):
        inputs, out = inputs_of(functions[name]), output_of(functions[name])
        expected = on_cpu(generator(*spec), inputs, out)
        np.testing.assert_array_equal(run(name, inputs, out), expected, f"{generator.__name__}{spec}")


def test_float_kernels_agree_with_the_cpus(tmp_path):
    window = Convolution(2, 20, 9, 8, 20, (3, 2), (2, 1), (1, 1), groups=20)
    kinds = ("exp", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh", "hardsigmoid", "hardswish")
    codes = (5, 21, 3, 8, 8, True)
    with generating(SM90):
        functions = {
            "max": pooling_f32.max_pool(window),
            "mean": pooling_f32.mean_pool(window),
            "decode": decode_rows.decode_rows(*codes),
            **{kind: activation_f32.activation(99, Activation(high=6.0, function=kind)) for kind in kinds},
        }
    run = emulated(functions, tmp_path)
    on_cpus = {
        "max": cpu_pooling.max_pool(window),
        "mean": cpu_pooling.mean_pool(window),
        "decode": cpu_decode.decode_rows(*codes),
    }
    for name, function in on_cpus.items():
        inputs, out = inputs_of(function), output_of(function)
        np.testing.assert_allclose(run(name, inputs, out), on_cpu(function, inputs, out), rtol=1e-6, err_msg=name)
    x = np.linspace(-7, 7, 99, dtype=np.float32)
    for kind in kinds:
        expected = np.minimum(reference(kind, x.astype(np.float64)), 6.0)
        np.testing.assert_allclose(run(kind, [x], np.zeros(99, np.float32)), expected, rtol=3e-6, atol=3e-6, err_msg=kind)


def reference(kind: str, x: np.ndarray) -> np.ndarray:
    import torch

    functional = torch.nn.functional
    named = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    if kind == "gelu_tanh":
        return functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    return named.get(kind, getattr(functional, kind, None))(torch.from_numpy(x)).numpy()  # type: ignore[misc]


def test_long_sums_are_shared_by_a_block():
    pool = pooling_int8.Pool(1, 16, 20, 20, (20, 20), (1, 1), (0, 0), (1, 1), 1, 1)
    with generating(SM90):
        function = pooling_int8.sum_pool2d(pool, "uint8", 0, Tail("none", "int32"))
    nests = tir.split_nests({"long": function}, cuda_target(SM90))["long"]
    assert [(launch.grid, launch.block) for launch in nests.launches] == [((16, 1, 1), (schedule.THREADS, 1, 1))]
    source = tir.cuda_source(tvm.IRModule({"long": nests.launches[0].function}), cuda_target(SM90))
    assert "__shfl_down_sync" in source and "__syncthreads" in source


def test_code_for_cpus_is_refused():
    def body() -> None:
        x, y = arguments(("X", (16,), "float32"), ("Y", (16,), "float32"))
        T.buffer_store(y, x.vload([0], "float32x16"), [T.Ramp(0, 1, 16)])

    with pytest.raises(UnsupportedOpError, match="kernel 'vectors' has no version for CUDA"):
        schedule.schedule_for_threads("vectors", build("vectors", body))


# -- rows ----------------------------------------------------------------------------------------------------------------------

#: Interprets the row kernels; Triton decides so when they are defined, so this is a process of its own.
INTERPRETER = """
import json
import torch
from graphwright.backends.tvm.cuda.kernels import layer_norm_exact, reduce_exact, softmax_exact, triton_rows
from graphwright.backends.tvm.cuda.launch import triton_call
from graphwright.backends.tvm.kernels.quantize_image import Quantize
from graphwright.ir.dialect import exact, gw

def run(function, *tensors):
    call = triton_call(function)
    kernel, constants = getattr(triton_rows, call.function.partition(":")[2]), dict(call.constants)
    names = [name for name in kernel.arg_names if name not in constants]
    kernel[call.grid](**dict(zip(names, tensors, strict=True)), **constants)

torch.manual_seed(3)
wrong = []
def check(what, got, expected):
    if not torch.equal(got, expected):
        wrong.append(what)

for rows, length in ((5, 7), (3, 16), (2, 100), (1, 1)):
    x, weight, bias = torch.randn(rows, length) * 20, torch.randn(length), torch.randn(length)
    y, q = torch.zeros_like(x), torch.zeros(rows, length, dtype=torch.uint8)
    run(softmax_exact.softmax(rows, length), x, y)
    check(f"softmax {rows} {length}", y, exact.softmax(x))
    expected = exact.layer_norm(x, weight, bias, 1e-5)
    codes = gw.quantize(expected, 0.02, 100, 0, 255, torch.uint8)
    run(layer_norm_exact.layer_norm(rows, length, 1e-5), x, weight, bias, y)
    check(f"layer_norm {rows} {length}", y, expected)
    run(layer_norm_exact.layer_norm(rows, length, 1e-5, Quantize(0.02, 100, 0, 255, "uint8"), False), x, weight, bias, q)
    check(f"layer_norm codes {rows} {length}", q, codes)
    y.zero_(), q.zero_()
    run(layer_norm_exact.layer_norm(rows, length, 1e-5, Quantize(0.02, 100, 0, 255, "uint8")), x, weight, bias, y, q)
    check(f"layer_norm both {rows} {length}", y, expected)
    check(f"layer_norm both codes {rows} {length}", q, codes)
    twin = torch.randn(length), torch.randn(length)
    function = layer_norm_exact.layer_norm_twins(rows, length, 1e-5, Quantize(0.02, 100, 0, 255, "uint8"), "sm_90")
    run(function, x, weight, bias, *twin, y.zero_(), q.zero_())
    check(f"layer_norm twins {rows} {length}", y, expected)
    codes = gw.quantize(exact.layer_norm(x, *twin, 1e-5), 0.02, 100, 0, 255, torch.uint8)
    check(f"layer_norm twins codes {rows} {length}", q, codes)
for shape, axis in (((3, 21, 5), 1), ((4, 33), -1), ((2, 3, 4), 0)):
    x = torch.randn(shape)
    expected = exact.reduce_sum(x, axis, False)
    y = torch.zeros_like(expected)
    run(reduce_exact.reduce_sum(shape, axis), x, y)
    check(f"reduce_sum {shape} {axis}", y, expected)
    for rows in (shape, (*shape[:-1], 1)):
        weights = torch.randn(rows)
        run(reduce_exact.weighted_sum(shape, axis, False, rows), x, weights, y.zero_())
        check(f"weighted_sum {shape} {axis} {rows}", y, exact.reduce_sum(x * weights, axis, False))
print(json.dumps(wrong))
"""


def test_row_kernels_have_the_dialects_bits():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ".link"}
    done = subprocess.run([sys.executable, "-c", INTERPRETER], capture_output=True, text=True, env=environment, cwd=runner.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("level", ["sm_80", "sm_90"])
def test_row_kernels_compile_ahead_of_time(level, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quantize = Quantize(0.02, 100, 0, 255, "uint8")
    for function in (softmax_exact.softmax(600, 197), layer_norm_exact.layer_norm(197, 192, 1e-6, quantize, False)):
        call = triton_call(function)
        assert call is not None
        kernel = compile_kernel(call, [str(buffer.dtype) for buffer in function.params], level)
        assert kernel.cubin.startswith(b"\x7fELF") and kernel.threads == 32 * call.warps and kernel.hidden == 2
    assert any((tmp_path / "graphwright" / "triton").iterdir())
