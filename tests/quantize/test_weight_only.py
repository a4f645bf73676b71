"""Layers whose weights are codes of a table, from `quantize` to the compiled program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.dialect import gw
from graphwright.ir.errors import CalibrationError, PassError, UnknownNameError
from graphwright.ir.onnx_export import export_onnx
from graphwright.ir.program import Stage
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager, parameter_bytes
from graphwright.passes.pipeline import parse
from torch import nn


class Mixed(nn.Module):
    """Every kind of layer that decodes its own way: dense, depthwise, grouped and pointwise convolutions, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.grouped = nn.Conv2d(20, 40, 3, groups=4)
        self.point = nn.Conv2d(40, 33, 1)
        self.rows = nn.Linear(33, 48)
        self.head = nn.Linear(48, 10, bias=False)

    def forward(self, x):
        x = torch.relu(self.point(self.grouped(torch.relu(self.depthwise(self.stem(x))))))
        x = torch.relu(self.rows(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), 2) @ x


def run(model: nn.Module, x: torch.Tensor, text: str, calibrated: bool = False):
    torch.manual_seed(0)
    program = capture(model.eval(), (x,))
    context = PassContext(Calibration.for_program(program, [(x,)]) if calibrated else None)
    return program, PassManager().run(program, parse(text), context).program


IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", ["int4g64", "uint3g8", "fp4e2m1", "pot4", "fp8e4m3g16", "pe5g24"])
def test_the_artifact_equals_the_reference_and_no_activation_is_quantized(form):
    _, program = run(Mixed(), IMAGE, f'canonicalize,quantize{{weights=["*={form}"]}},lower-integer')
    targets = [n.target for n in program.nodes]
    assert program.stage is Stage.INTEGER and targets.count(gw.decode.default) == 6
    assert gw.quantize.default not in targets and gw.fake_codebook.default not in targets
    result = TVMBackend().compile(program, Target.parse("cpu"))
    (got,) = load_bytes(result.library)(IMAGE.numpy())
    (want,) = program(IMAGE)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-5 * float(want.abs().max()))
    names = " ".join(row.name for row in result.kernels)
    assert "coded_f32" in names and "decode_f32" in names and "decode_rows" in names


def test_the_program_and_the_library_are_smaller():
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 64))
    x = torch.randn(1, 512)
    _, before = run(model, x, "canonicalize")
    _, program = run(model, x, 'canonicalize,quantize{weights=["*=int4g64"]},lower-integer')
    assert parameter_bytes(program) < 0.15 * parameter_bytes(before)
    libraries = [len(TVMBackend().compile(p, Target.parse("cpu")).library) for p in (before, program)]
    assert libraries[0] - libraries[1] > 0.8 * parameter_bytes(before)


def test_matmuls_stay_float_where_every_layer_does():
    x = torch.randn(2, 5, 16)
    text = 'canonicalize,quantize{{weights=["{}=int4g16"]}}'
    _, whole = run(Attention(), x, text.format("*"))
    assert not [n for n in whole.nodes if n.target is gw.fake_quantize.default]
    _, part = run(Attention(), x, text.format("query"), calibrated=True)
    fakes = [n.target for n in part.nodes if n.target in (gw.fake_quantize.default, gw.fake_codebook.default)]
    assert fakes.count(gw.fake_codebook.default) == 1 and fakes.count(gw.fake_quantize.default) > 2


def test_calibration_is_asked_for_where_activations_are_quantized():
    with pytest.raises((CalibrationError, PassError), match="calibration"):
        run(Attention(), torch.randn(2, 5, 16), 'canonicalize,quantize{weights=["query=int4g16"]}')


def test_a_shared_weight_is_stored_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    _, program = run(Tied(), torch.randn(2, 8), 'canonicalize,quantize{weights=["*=int4g8"]}')
    (fake,) = [n for n in program.nodes if n.target is gw.fake_codebook.default]
    assert len(fake.users) == 2


def test_a_rule_without_a_layer_is_refused():
    with pytest.raises(UnknownNameError, match="unknown name in 'weights' of quantize: 'nothing'"):
        run(Mixed(), IMAGE, 'canonicalize,quantize{weights=["nothing=int4g64","*=pot4"]}')


def test_bias_correction_sees_decoded_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.rand(64, 64) + 0.5  # a mean that rounding errors multiply
    program = capture(model.eval(), (x,))
    context = PassContext(Calibration.for_program(program, [(x,)]))
    stats = (
        PassManager()
        .run(program, parse('canonicalize,quantize{weights=["*=int2g64"]},correct-bias'), context)
        .certificate[-1]
        .stats
    )
    assert stats["layers"] == 2 and stats["error_after"] < 0.5 * stats["error_before"]


def test_onnx_holds_the_decoded_values():
    onnxruntime = pytest.importorskip("onnxruntime")
    _, program = run(Mixed(), IMAGE, 'canonicalize,quantize{weights=["*=fp4e2m1g16"]}')
    session = onnxruntime.InferenceSession(export_onnx(program).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    np.testing.assert_allclose(got, program(IMAGE)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("form", ["int3g8", "uint3g8", "pot4", "fp4e2m1g16"])
@pytest.mark.parametrize("order", [True, False])
def test_gptq_chooses_codes_of_tables_by_what_they_do_to_the_output(form, order):
    text = f'canonicalize,quantize{{weights=["*={form}"]}}'
    image = torch.randn(32, *IMAGE.shape[1:], generator=torch.Generator().manual_seed(3))
    source = capture(Mixed().eval(), IMAGE[:1])
    context = PassContext(calibration=Calibration.for_program(source, [image]))

    def outputs(pipeline):
        program = PassManager().run(source, parse(pipeline), context).program
        return torch.cat([program(row[None])[0] for row in image])

    exact = torch.cat([source(row[None])[0] for row in image])
    chosen = f"{text},gptq{{order={str(order).lower()}}}"
    nearest, rounded = (float((outputs(t) - exact).square().sum()) for t in (text, chosen))
    assert rounded < nearest
    # The weights are the same; torch may add products up in another order.
    torch.testing.assert_close(outputs(f"{chosen},lower-integer"), outputs(chosen), rtol=1e-4, atol=1e-6)


def test_rounding_passes_that_take_no_tables_say_so():
    with pytest.raises(PassError, match="adaround chooses codes of integers .* gptq takes tables too"):
        run(Mixed(), IMAGE, 'canonicalize,quantize{weights=["*=int4g8"]},adaround', calibrated=True)
