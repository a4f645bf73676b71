"""quantize-fp8: numbers round as OCP's E4M3 says, which layers multiply them, and what is left to float."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphwright.backends.target import Target
from graphwright.backends.tvm.lower import lower
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.codebook import nearest
from graphwright.ir.dialect.fp8 import E4M3, quantize_rows
from graphwright.ir.errors import PassError, TargetError, UnknownNameError
from graphwright.ir.program import dtype_of, origin_of
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.quantize.codebooks import parse_codebook
from graphwright.search.cost.bops import average_weight_bits, bit_operations
from torch import nn

aten = torch.ops.aten


def quantized(model: nn.Module, *inputs: torch.Tensor, text: str = "canonicalize,quantize-fp8"):
    """(program, stats of its last pass, the float program); calibrated on the inputs."""
    program = capture(model.eval(), inputs)
    context = PassContext(calibration=Calibration.for_program(program, [inputs]))
    result = PassManager().run(program, parse(text), context)
    return result.program, result.certificate[-1], program


def nodes(program, *targets):
    return [n for n in program.nodes if n.target in targets]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Mixed(nn.Module):
    """An image of three channels, dense, grouped and depthwise convolutions, a residual, linear layers, a matmul of both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dense = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 40, 3, padding=1, bias=False)
        self.grouped, self.depthwise = nn.Conv2d(40, 40, 3, padding=1, groups=2), nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.a, self.b = nn.Linear(40, 24), nn.Linear(40, 24)

    def forward(self, x):
        x = torch.relu(self.dense(torch.relu(self.stem(x))))
        x = self.depthwise(torch.relu(self.grouped(x))) + x
        rows = x.flatten(2).transpose(1, 2)
        return self.a(rows) @ self.b(rows).transpose(1, 2)


def mixed() -> tuple[Mixed, torch.Tensor]:
    torch.manual_seed(0)
    return Mixed(), torch.randn(2, 3, 6, 5)


# -- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.013, 7.0])
def test_every_float16_becomes_the_nearest_number_even_mantissas_first(scale):
    """The format's table, written down apart from torch's conversion, holds the numbers."""
    form = parse_codebook("fp8e4m3")
    assert form is not None
    table = form.table()
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()]
    inverse = 1 / torch.tensor(scale)
    expected = table[nearest(x.float() * inverse, table)]
    assert torch.equal(gw.quantize_fp8(x, scale).float(), expected)
    assert len(expected.unique()) == 253 and float(expected.max()) == 448.0


def test_the_ends_of_the_format():
    steps = 2.0**-9
    x = torch.tensor([0.49, 0.5, 0.51, 1.5, 2.5, 7.5]) * steps
    assert (gw.quantize_fp8(x, 1.0).float() / steps).tolist() == [0, 0, 1, 2, 2, 8]
    far = torch.tensor([464.0, 1e30, float("inf"), -465.0, -0.0])
    assert gw.quantize_fp8(far, 1.0).float().tolist() == [448, 448, 448, -448, 0]
    assert gw.quantize_fp8(torch.tensor(float("nan")), 1.0).float().isnan()


def test_rows_of_weights_reach_448_and_zeros_stay():
    weight = torch.randn(6, 5, 3, 3)
    weight[2] = 0
    codes, scale = quantize_rows(weight, 1e-12)
    assert codes.dtype == E4M3 and float(scale[2]) == pytest.approx(1e-12)
    largest = codes.float().abs().amax((1, 2, 3))
    assert largest.tolist() == [448, 448, 0, 448, 448, 448]
    restored = codes.float() * scale[:, None, None, None]
    assert ((restored - weight).abs() <= weight.abs() * 2.0**-4 + scale[:, None, None, None] * 2.0**-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_multiply_what_the_codes_mean(dtype):
    torch.manual_seed(0)
    x, w = gw.quantize_fp8(torch.randn(2, 7, 33), 0.01), gw.quantize_fp8(torch.randn(5, 33), 0.01)
    scale, bias = torch.rand(5) * 1e-4, torch.randn(5)
    exact = x.double() @ w.double().t() * scale + bias
    out = gw.linear_fp8(x, w, scale, bias, dtype)
    assert out.dtype is dtype and torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    x, w = gw.quantize_fp8(torch.randn(2, 17, 8, 9), 0.01), gw.quantize_fp8(torch.randn(5, 17, 3, 3), 0.01)
    exact = F.conv2d(x.double(), w.double(), None, 2, 1, 2) * scale[:, None, None] + bias[:, None, None]
    out = gw.convolution_fp8(x, w, scale, bias, [2, 2], [1, 1], [2, 2], dtype)
    assert out.dtype is dtype and torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


# -- the pass ----------------------------------------------------------------------------------------------------------------


def test_dense_layers_multiply_8_bit_floats_and_the_stats_name_the_others():
    model, x = mixed()
    program, row, source = quantized(model, x)
    layers = nodes(program, gw.convolution_fp8.default, gw.linear_fp8.default)
    assert [origin_of(n) for n in layers] == ["dense", "a", "b"]
    assert row.stats["layers"] == 3 and row.stats["activations"] == 2
    assert row.stats["left_float"] == {
        "stem": "3 input channels, fewer than 16",
        "grouped": "2 groups",
        "depthwise": "40 groups",
    }
    assert {n.args[0].target for n in layers} == {gw.quantize_fp8.default}
    assert nodes(program, aten.matmul.default) and len(nodes(program, aten.convolution.default)) == 3
    assert row.effect == "lossy" and row.modified
    assert 1e-4 < relative(program(x)[0], source(x)[0]) < 0.08


def test_scales_are_the_largest_magnitudes_by_448():
    torch.manual_seed(0)
    model, x = nn.Linear(20, 9), torch.randn(4, 20)
    program, _, _ = quantized(model, x)
    (layer,) = nodes(program, gw.linear_fp8.default)
    step = float(x.abs().max()) / 448
    assert layer.args[0].args[1] == pytest.approx(step)
    scale = program.parameter(layer.args[2])
    assert torch.allclose(scale, step * model.weight.detach().abs().amax(1) / 448)
    assert program.parameter(layer.args[1]).dtype is E4M3


def test_layers_count_as_work_of_8_bits():
    program, _, source = quantized(nn.Sequential(nn.Conv2d(16, 20, 3), nn.ReLU(), nn.Conv2d(20, 8, 1)), torch.randn(1, 16, 6, 5))
    assert bit_operations(source) == 16 * bit_operations(program) > 0
    assert average_weight_bits(program) == 8


def test_skipped_layers_stay_float():
    model, x = mixed()
    program, row, _ = quantized(model, x, text="canonicalize,quantize-fp8{skip=[a,dense]}")
    assert [origin_of(n) for n in nodes(program, gw.linear_fp8.default, gw.convolution_fp8.default)] == ["b"]
    assert row.stats["left_float"]["a"] == "skip"
    with pytest.raises(UnknownNameError, match="'skip' of quantize-fp8: 'dens'; did you mean 'dense'"):
        quantized(model, x, text="canonicalize,quantize-fp8{skip=[dens]}")


def test_a_weight_that_two_layers_share_is_stored_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(torch.relu(self.linear(x)))

    program, _, _ = quantized(Shared(), torch.randn(3, 16))
    first, second = nodes(program, gw.linear_fp8.default)
    assert first.args[1] is second.args[1] and first.args[2] is not second.args[2]
    assert sum(t.dtype is E4M3 for t in program.parameters().values()) == 1


def test_a_layer_right_behind_another_reads_codes_of_its_result():
    torch.manual_seed(0)
    program, _, source = quantized(
        nn.Sequential(nn.Conv2d(16, 20, 3), nn.Conv2d(20, 16, 3, padding=1)), x := torch.randn(1, 16, 5, 5)
    )
    first, second = nodes(program, gw.convolution_fp8.default)
    assert second.args[0].args[0] is first and relative(program(x)[0], source(x)[0]) < 0.08


def test_a_program_without_such_layers_is_refused_with_the_reasons():
    with pytest.raises(PassError, match="no layer to quantize in '.*': '.*': 3 input channels, fewer than 16"):
        quantized(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 8, 8))
    with pytest.raises(PassError, match="it has none"):
        quantized(nn.ReLU(), torch.randn(3))


def test_a_second_run_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    program, row, _ = quantized(model, torch.randn(3, 16), text="canonicalize,quantize-fp8,quantize-fp8")
    assert not row.modified and len(nodes(program, gw.linear_fp8.default)) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_float_behind_it_makes_the_values_between_layers_half_precision(dtype):
    model, x = mixed()
    program, row, source = quantized(model, x, text=f"canonicalize,quantize-fp8,cast-float{{dtype={dtype}}}")
    half = getattr(torch, dtype)
    layers = nodes(program, gw.linear_fp8.default, gw.convolution_fp8.default, aten.convolution.default, aten.matmul.default)
    assert {dtype_of(n) for n in layers} == {half} and row.stats["layers"] == 7
    assert {dtype_of(n.args[0]) for n in nodes(program, gw.quantize_fp8.default)} == {half}
    scales = [program.parameter(n.args[2]) for n in nodes(program, gw.linear_fp8.default)]
    assert {scale.dtype for scale in scales} == {torch.float32}
    assert {s.dtype for s in (*program.input_specs, *program.output_specs)} == {torch.float32}
    assert relative(program(x)[0], source(x)[0]) < 0.08


def test_half_precision_before_it_is_refused():
    model, x = mixed()
    with pytest.raises(PassError, match="quantize-fp8 computes in float32.*|cast-float.*quantize-fp8.*"):
        quantized(model, x, text="canonicalize,cast-float,quantize-fp8")


def test_a_pass_that_asks_for_gradients_behind_it_is_told_so():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    program, _, _ = quantized(model, torch.randn(3, 16), text='canonicalize,quantize-fp8{skip=["0"]}')
    calibration = Calibration.for_program(program, [(torch.randn(3, 16),)])
    context = PassContext(calibration=calibration)
    with pytest.raises(PassError, match="put quantize-fp8 behind every pass that trains"):
        PassManager().run(program, parse("factorize-fwsvd{ratio=0.5,multiple=1}"), context)
    with pytest.raises(PassError, match=r"distill cannot differentiate gw.quantize_fp8"):
        PassManager().run(program, parse("distill{epochs=1}"), context)


@pytest.mark.parametrize("target", ["x86:avx512-vnni", "arm64:cortex-a76", "cuda:sm_80", "cuda:sm_86"])
def test_targets_without_such_products_name_the_layer_and_the_way_out(target):
    program, _, _ = quantized(nn.Linear(16, 8), torch.randn(3, 16))
    pattern = f"{target} has no products of 8-bit floats, which '.*' .*cuda:sm_89, cuda:sm_90, or leave quantize-fp8 out"
    with pytest.raises(TargetError, match=pattern):
        lower(program, Target.parse(target))
