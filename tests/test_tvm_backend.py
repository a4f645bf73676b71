"""The TVM backend: compiled integer programs equal the torch reference bit for bit, and what it refuses."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from graphwright.backends.host import host_arch
from graphwright.backends.target import Target
from graphwright.backends.tvm import lower as lowering
from graphwright.backends.tvm import target as targets
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.ir.capture import capture
from graphwright.ir.dialect import gw
from graphwright.ir.errors import TargetError, UnsupportedOpError
from graphwright.ir.program import Stage
from integer_graphs import codes, integers, normal, program, scales
from torch import nn
from tvm_programs import HERE, check_bits, compiled, kinds

U8, S8 = torch.uint8, torch.int8

needs_cross_compiler = pytest.mark.skipif(
    bool(targets.linker(Target("arm64", "cortex-a76")).missing), reason="no C compiler for AArch64"
)


# -- convolutions and their tails ----------------------------------------------------------------------------------------------


def convolution_parameters(filters: int, channels: int, kernel: int, around: float) -> dict[str, torch.Tensor]:
    return {
        "w": integers(-127, 128, filters, channels, kernel, kernel),
        "b": integers(-5000, 5000, filters, dtype=torch.int32),
        "s": scales(filters, around),
        "m": integers(1 << 20, 1 << 21, filters, dtype=torch.int32),
        "h": integers(29, 32, filters, dtype=torch.int32),
    }


def test_convolution_takes_each_tail():
    def every_tail(p, x):
        q = gw.quantize(x, 0.03, 118, 0, 255, U8)
        conv = functools.partial(gw.convolution, q, p.w, p.b, [2, 1], [1, 0], [1, 1], 1, 118)
        rescaled = gw.rescale(conv(), p.s, 3, 0, 255, U8, 1)
        dyadic = gw.rescale_dyadic(conv(), p.m, p.h, -7, -128, 127, S8, 1)
        return rescaled, dyadic, gw.scale(conv(), p.s, 1), conv()

    graph = program(every_tail, normal(2, 5, 9, 7), **convolution_parameters(20, 5, 3, 1e-3))
    names = kinds(check_bits(graph, (normal(2, 5, 9, 7),)))
    assert names["convolution_int"] == 4 and names["quantize_image"] == 1
    assert "rescale" not in names


@pytest.mark.parametrize("groups", [2, 24])
def test_grouped_and_depthwise_convolution(groups):
    def body(p, x):
        return gw.rescale(gw.convolution(x, p.w, p.b, [1, 1], [1, 1], [1, 1], groups, 9), p.s, 128, 0, 255, U8, 1)

    graph = program(body, codes(1, 24, 6, 5), **convolution_parameters(24, 24 // groups, 3, 1e-3))
    check_bits(graph, (codes(1, 24, 6, 5),))


def test_one_dimensional_convolution():
    def body(p, x):
        return gw.rescale(gw.convolution(x, p.w, None, [2], [1], [1], 1, 0), p.s, 0, -127, 127, S8, 1)

    graph = program(body, codes(2, 6, 11, dtype=S8), w=integers(-127, 128, 10, 6, 3), s=scales(1, 1e-3))
    check_bits(graph, (codes(2, 6, 11, dtype=S8),))


def test_residual_addition_is_fused_into_the_convolution():
    def body(p, x):
        a = gw.rescale(gw.convolution(x, p.w, p.b, [1, 1], [1, 1], [1, 1], 1, 9), p.s, 5, 0, 255, U8, 1)
        return gw.add(x, a, 300000, -400000, 20, 9, 5, 10, 0, 250, U8), a.sum() * 0

    def single(p, x):
        return body(p, x)[0]

    parameters = convolution_parameters(16, 16, 3, 1e-4)
    fused = check_bits(program(single, codes(1, 16, 5, 5), **parameters), (codes(1, 16, 5, 5),))
    assert "add" not in kinds(fused)
    assert fused.kernels[-2].nodes[-1].startswith("add")


def test_a_shared_accumulator_is_rescaled_alone():
    def body(p, x):
        acc = gw.convolution(x, p.w, p.b, [1, 1], [0, 0], [1, 1], 1, 9)
        wide = gw.scale(acc, p.s, 1)
        return gw.rescale(acc, p.s, 5, 0, 255, U8, 1), wide, gw.rescale(acc.flatten(2), p.s[:1], 1, 0, 255, U8, 0)

    with pytest.raises(UnsupportedOpError, match="its scale is computed"):
        compiled(program(body, codes(1, 6, 5, 5), **convolution_parameters(7, 6, 1, 1e-3)))
    parameters = convolution_parameters(7, 6, 1, 1e-3) | {"t": scales(1, 1e-3)}

    def stored(p, x):
        acc = gw.convolution(x, p.w, p.b, [1, 1], [0, 0], [1, 1], 1, 9)
        return gw.rescale(acc, p.s, 5, 0, 255, U8, 1), gw.scale(acc, p.s, 1), gw.rescale(acc.flatten(2), p.t, 1, 0, 255, U8, 0)

    assert kinds(check_bits(program(stored, codes(1, 6, 5, 5), **parameters), (codes(1, 6, 5, 5),)))["rescale"] == 3


# -- linear, matmul, attention -------------------------------------------------------------------------------------------------


def test_linear_on_rows_and_a_residual():
    def body(p, x):
        a = gw.rescale(gw.linear(x, p.w, p.b, 4), p.s, 5, 0, 255, U8, 2)
        b = gw.add(a, x, 300000, 400000, 20, 5, 4, 10, 0, 255, U8)
        return gw.scale(gw.linear(b, p.v, None, 10), p.t, 1)

    parameters = {"w": integers(-127, 128, 20, 20), "b": integers(-9, 9, 20, dtype=torch.int32), "s": scales(20, 1e-3)}
    parameters |= {"v": integers(-127, 128, 7, 20), "t": scales(1, 1e-3)}
    names = kinds(check_bits(program(body, codes(2, 3, 20), **parameters), (codes(2, 3, 20),)))
    assert names == {"linear_int": 2}


def attention(p, x):
    """Rows [1, 12, 48] s8 -> rows u8, three heads of 16."""
    q, k, v = x.reshape(1, 12, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
    scores = gw.scale(gw.matmul(q, k.transpose(-2, -1), 0, 0), p.s, 0)
    weights = gw.quantize(gw.softmax(scores), 1 / 255, 0, 0, 255, U8)
    mixed = gw.rescale(gw.matmul(weights, v, 0, 0), p.t, 100, 0, 255, U8, 0)
    return mixed.transpose(1, 2).reshape(1, 12, 48)


def test_attention():
    graph = program(attention, codes(1, 12, 144, dtype=S8), s=scales(1, 1e-4), t=scales(1, 1e-3))
    names = kinds(check_bits(graph, (codes(1, 12, 144, dtype=S8),), (codes(1, 12, 144, dtype=S8),)))
    assert names == {"attention_int": 1}  # no copy to split the heads, none to merge them


def test_attention_with_a_mask_over_two_batch_axes():
    def body(p, x, mask):
        q, k, v = x.reshape(2, 12, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = gw.scale(gw.matmul(q, k.transpose(-2, -1), 0, 0), p.s, 0) + (1.0 - mask.reshape(2, 1, 1, 12)) * -1e4
        weights = gw.quantize(gw.softmax(scores), 1 / 255, 0, 0, 255, U8)
        return gw.rescale(gw.matmul(weights, v, 0, 0), p.t, 100, 0, 255, U8, 0).transpose(1, 2).reshape(2, 12, 32)

    inputs = (codes(2, 12, 96, dtype=S8), (normal(2, 12) > -0.5).float())
    names = kinds(check_bits(program(body, *inputs, s=scales(1, 1e-4), t=scales(1, 1e-3)), inputs))
    assert names["attention_int"] == 1 and "copy_strided" not in names and "softmax" not in names


def test_attention_whose_parts_have_other_readers_stays_in_parts():
    def body(p, x):
        scores = gw.scale(gw.matmul(x, x.transpose(-2, -1), 0, 0), p.s, 0)
        weights = gw.softmax(scores)
        return weights, gw.matmul(gw.quantize(weights, 1 / 255, 0, 0, 255, U8), x, 0, 0)

    names = kinds(check_bits(program(body, codes(3, 12, 8, dtype=S8), s=scales(1, 1e-4)), (codes(3, 12, 8, dtype=S8),)))
    assert names == {"matmul_int": 2, "softmax": 1, "quantize": 1}


def test_residual_stream_of_a_transformer():
    """The float sum belongs to the layer before it, the quantization to the normalization before it."""

    def body(p, x, y):
        n = gw.layer_norm(x, p.g, p.b, 1e-5)
        q = gw.quantize(n, 0.02, 117, 0, 255, U8)
        total = gw.scale(gw.linear(q, p.w, None, 117), p.s, 2) + n
        last = gw.quantize(gw.layer_norm(total, p.g, p.b, 1e-5), 0.02, -3, -128, 127, S8)
        image = gw.scale(gw.convolution(y, p.v, None, [1, 1], [1, 1], [1, 1], 1, 0), p.t, 1)
        return gw.scale(gw.linear(last, p.w, None, -3), p.s, 2), total, image + p.c

    parameters = {"g": normal(37), "b": normal(37), "w": integers(-127, 128, 37, 37), "s": scales(37, 1e-4)}
    parameters |= {"v": integers(-127, 128, 5, 3, 3, 3), "t": scales(5, 1e-3), "c": normal(2, 5, 6, 7)}
    inputs = (normal(2, 9, 37), codes(2, 3, 6, 7))
    names = kinds(check_bits(program(body, *inputs, **parameters), inputs))
    assert names["layer_norm"] == 2 and "quantize" not in names and "add" not in names


@pytest.mark.parametrize("value_first", [True, False])
def test_twin_normalizations_are_one_kernel(value_first):
    """smooth-quant leaves two of the same rows: a value for the residual stream, and codes of another scale."""

    def body(p, x):
        value = gw.layer_norm(x, p.g, p.b, 1e-5) if value_first else None
        q = gw.quantize(gw.layer_norm(x, p.h, p.c, 1e-5), 0.02, 117, 0, 255, U8)
        value = gw.layer_norm(x, p.g, p.b, 1e-5) if value is None else value
        other = gw.layer_norm(x, p.h, p.c, 1e-3)  # not of the same deviations
        return gw.scale(gw.linear(q, p.w, None, 117), p.s, 2) + value, other

    parameters = {name: normal(37) for name in "gbhc"} | {"w": integers(-127, 128, 37, 37), "s": scales(37, 1e-4)}
    inputs = (normal(2, 9, 37),)
    names = kinds(check_bits(program(body, *inputs, **parameters), inputs))
    assert names == {"layer_norm_twins": 1, "linear_int": 1, "layer_norm": 1}


def test_layer_norm_and_float_islands_keep_every_bit():
    def body(p, x):
        y = (x * p.pos + p.pos) / 3.7 - torch.reciprocal(torch.abs(x) + 1)
        n = gw.layer_norm(y, p.g, p.b, 1e-5)
        total = gw.reduce_sum(n, 1, False)
        # Each of the 185 roots is rounded correctly; a vector library would miss the last bit of one or the other.
        root = gw.square_root(torch.abs(x))
        return gw.quantize(n, 0.02, -3, -128, 127, S8), total, torch.relu(y) * y, root

    graph = program(body, normal(2, 5, 37), pos=normal(1, 5, 37), g=normal(37), b=normal(37))
    result = check_bits(graph, (normal(2, 5, 37),), (normal(2, 5, 37) * 100,))
    assert {row.kind for row in result.kernels if row.name.startswith(("mul", "add", "div", "reciprocal"))} == {"island"}


# -- pools, sums, element-wise -------------------------------------------------------------------------------------------------


def test_pools_and_sums():
    def body(p, x):
        top = gw.max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
        ceil = gw.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], True)
        mean = gw.rescale(gw.sum_pool2d(x, [3, 2], [2, 1], [1, 0], 7), p.s, 7, 0, 255, U8, 1)
        total = gw.sum(x, [2, 3], False, 7)
        gate = gw.rescale(gw.sum(x, [2, 3], True, 7), p.t, 0, 0, 255, U8, 0)
        channel = gw.sum(x, [1], False, 7)
        return top, ceil, mean, total, gate, channel, gw.sum(x, [0, 1, 2, 3], False, 7)

    graph = program(body, codes(2, 19, 9, 8), s=scales(19, 0.2), t=scales(1, 0.02))
    check_bits(graph, (codes(2, 19, 9, 8),))


def test_sum_over_rows_of_a_transformer():
    def body(p, x):
        return gw.rescale(gw.sum(x, [1], False, 3), p.s, 3, 0, 255, U8, 1), gw.sum(x[..., :17], [1], True, 3)

    check_bits(program(body, codes(2, 5, 32), s=scales(32, 0.1)), (codes(2, 5, 32),))


def test_add_multiply_and_lookup_in_both_layouts():
    def body(p, x, rows):
        c = gw.rescale(gw.convolution(x, p.w, None, [1, 1], [0, 0], [1, 1], 1, 0), p.s, 50, 0, 255, U8, 1)
        gate = gw.rescale(gw.sum(c, [2, 3], True, 50), p.t, 0, 0, 255, U8, 0)
        gated = gw.rescale(gw.multiply(c, gate, 50, 0), p.u, 3, -128, 127, S8, 1)
        table = gw.lookup(gated, p.table)
        summed = gw.add(table, c, 12345, 54321, 17, 2, 50, 0, -100, 100, S8)
        plain = gw.add(rows, rows[:, :1], 12345, -54321, 17, 2, 50, 0, -100, 100, S8)
        return summed, plain, gw.multiply(rows, rows, 1, 2), gw.lookup(rows, p.table)

    parameters = {"w": integers(-127, 128, 20, 5, 1, 1), "s": scales(20, 1e-3), "t": scales(1, 0.01), "u": scales(20, 0.01)}
    graph = program(body, codes(1, 5, 4, 6), codes(3, 11), table=codes(256, dtype=U8), **parameters)
    check_bits(graph, (codes(1, 5, 4, 6), codes(3, 11)))


def test_quantize_and_dequantize_at_the_edges_of_the_range():
    def body(p, x):
        u = gw.quantize(x, 0.1, 3, 0, 255, U8)
        s = gw.quantize(x, 0.1, -3, -100, 100, S8)
        return gw.dequantize(u, 0.1, 3), gw.dequantize(s, 0.1, -3), u

    halves = torch.arange(-300, 300, dtype=torch.float32) * 0.05  # half steps: ties must go to even
    extremes = torch.tensor([0.0, -0.0, 1e-42, 3e38, -3e38, float("inf"), -float("inf")])
    x = torch.cat([halves, extremes])
    check_bits(program(body, x), (x,))


# -- sharing, progress, targets, errors ----------------------------------------------------------------------------------------


def test_equal_layers_share_one_function():
    def body(p, x):
        for _ in range(3):
            x = gw.rescale(gw.convolution(x, p.w, p.b, [1, 1], [1, 1], [1, 1], 1, 9), p.s, 9, 0, 255, U8, 1)
        return x

    graph = program(body, codes(1, 16, 5, 5), **convolution_parameters(16, 16, 3, 1e-4))
    lowered = lowering.lower(graph, HERE)
    functions = {variable.name_hint for variable in lowered.module.get_global_vars()}
    assert len([row for row in lowered.kernels if row.name == "convolution_int8"]) == 3
    assert len([name for name in functions if name.startswith("convolution_int8")]) == 1


def test_progress_and_kernel_rows():
    seen = []
    graph = program(lambda p, x: gw.lookup(gw.lookup(x, p.t), p.t), codes(4, 8), t=codes(256))
    result = TVMBackend().compile(graph, HERE, progress=lambda done, total, what: seen.append(what))
    assert [s.split()[0] for s in seen] == ["lower", "lower", "generate", "generate"]
    # Of its table a lookup reads no more than it writes.
    assert [(r.kind, r.bytes) for r in result.kernels] == [("designed", 32 + 32 + 32)] * 2
    assert sum(r.macs for r in result.kernels) == 0


@needs_cross_compiler
@pytest.mark.parametrize("level", ["cortex-a76", "generic"])
def test_cross_compiles_for_arm(level):
    def body(p, x):
        q = gw.quantize(x, 0.03, 118, 0, 255, U8)
        return gw.rescale(gw.convolution(q, p.w, p.b, [1, 1], [1, 1], [1, 1], 1, 118), p.s, 3, 0, 255, U8, 1)

    graph = program(body, normal(1, 5, 6, 6), **convolution_parameters(20, 5, 3, 1e-3))
    library = compiled(graph, Target("arm64", level)).library
    assert library[:4] == b"\x7fELF" and int.from_bytes(library[18:20], "little") == 183  # EM_AARCH64


@pytest.mark.skipif(host_arch() != "x86", reason="the host is no x86")
def test_the_portable_level_gives_the_same_bits():
    parameters = convolution_parameters(20, 5, 3, 1e-3)

    def body(p, x):
        return gw.rescale(gw.convolution(x, p.w, p.b, [1, 1], [1, 1], [1, 1], 1, 118), p.s, 3, 0, 255, U8, 1)

    check_bits(program(body, codes(1, 5, 6, 6), **parameters), (codes(1, 5, 6, 6),), target=Target("x86", "avx2"))


def test_latency_is_positive_and_refuses_another_machine():
    graph = program(lambda p, x: gw.lookup(x, p.t), codes(4, 8), t=codes(256))
    compiled = TVMBackend().compile(graph, HERE)
    assert TVMBackend().latency(compiled, [codes(4, 8)], repeats=3) > 0
    foreign = Target("arm64", "generic") if host_arch() == "x86" else Target("x86", "avx2")
    with pytest.raises(TargetError, match="cannot run"):
        TVMBackend().latency(replace(compiled, target=foreign), [codes(4, 8)], repeats=1)


def test_targets_lists_every_level_and_what_is_missing(monkeypatch):
    rows = {str(row.target): row for row in TVMBackend().targets()}
    assert rows[str(HERE)].emits and rows[str(HERE)].runs
    assert {"x86:avx2", "arm64:cortex-a76", "arm64:generic"} <= set(rows)
    monkeypatch.setattr(targets, "llvm_backends", lambda: frozenset({"x86_64"}))
    with pytest.raises(TargetError, match="no LLVM backend 'aarch64'"):
        targets.require_emit(Target("arm64", "generic"))


def test_missing_cross_compiler_names_the_package(monkeypatch):
    monkeypatch.setattr(targets.shutil, "which", lambda _command: None)
    graph = program(lambda p, x: gw.lookup(x, p.t), codes(4, 8), t=codes(256))
    arch = "arm64" if host_arch() == "x86" else "x86"
    level = "generic" if arch == "arm64" else "avx2"
    package = "gcc-aarch64-linux-gnu" if arch == "arm64" else "gcc-x86-64-linux-gnu"
    with pytest.raises(TargetError, match=f"apt-get install {package}"):
        compiled(graph, Target(arch, level))


def test_other_architectures_are_refused():
    graph = program(lambda p, x: gw.lookup(x, p.t), codes(4, 8), t=codes(256))
    with pytest.raises(TargetError, match="not for onnx"):
        compiled(graph, Target("onnx", "qdq"))


def test_symbolic_shapes_are_refused():
    captured = capture(nn.Linear(4, 3), normal(2, 4), dynamic_batch=True)
    captured.stage = Stage.CANONICAL
    with pytest.raises(TargetError, match="symbolic dimension"):
        compiled(captured)


def test_unsupported_op_names_node_origin_and_neighbours():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.relu(torch.digamma(x))

    captured = capture(Spectrum(), normal(4))
    captured.stage = Stage.CANONICAL
    with pytest.raises(UnsupportedOpError, match=r"(?s)cannot lower aten.digamma.*'digamma'.*read by relu"):
        compiled(captured)


def test_layer_norm_of_many_rows():
    """Enough rows that a vector library would take over a square root in the reference."""
    parameters = {"g": normal(24), "b": normal(24)}
    check_bits(program(lambda p, x: gw.layer_norm(x, p.g, p.b, 1e-5), normal(600, 24), **parameters), (normal(600, 24),))


def test_stages_without_machine_code_are_refused():
    captured = capture(nn.Linear(4, 3), normal(2, 4))
    with pytest.raises(TargetError, match="captured program"):
        compiled(captured)
