"""Capture from PyTorch: one flat program that shares the weights, or an error that says what stands in the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphwright.ir.capture import capture
from graphwright.ir.errors import CaptureError, UnsupportedOpError
from graphwright.ir.printer import print_program
from graphwright.ir.program import Stage
from graphwright.ir.verify import verify
from torch import nn

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).mean([2, 3]))


class Pair(nn.Module):
    def forward(self, x, y):
        return {"sum": x + y, "parts": (x * 2, y.sum(0))}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def program(net):
    net.train()
    net.body[1].eval()
    return capture(net, torch.randn(2, 3, 6, 6))


def test_runs_like_the_model_in_eval_mode(net, program):
    x = torch.randn(2, 3, 6, 6)
    modes = {m: m.training for m in net.modules()}
    net.eval()
    expected = net(x).detach()
    for module, training in modes.items():
        module.training = training
    (actual,) = program(x)
    torch.testing.assert_close(actual, expected)
    assert program.stage is Stage.CAPTURED
    assert program.name == "Net"
    verify(program)


def test_training_modes_are_restored_one_by_one(net, program):
    assert net.training
    assert net.body[3].training
    assert not net.body[1].training


def test_weights_are_shared_and_not_copied(net, program):
    addresses = {value.data_ptr() for value in program.parameters().values()}
    assert addresses <= {t.data_ptr() for t in (*net.parameters(), *net.buffers())}
    assert net.head.weight.data_ptr() in addresses
    clone = program.clone()
    assert {v.data_ptr() for v in clone.parameters().values()} == addresses


def test_layers_stay_whole_and_carry_their_module_path(program):
    found = {n.target: n.meta["origin"] for n in program.nodes if n.op == "call_function"}
    assert found[aten.convolution.default] == "body.0"
    assert found[aten.batch_norm.default] == "body.1"
    assert found[aten.relu.default] == "body.2"
    assert found[aten.linear.default] == "head"
    assert "aten.batch_norm(%convolution" in print_program(program)


def test_specs(program):
    assert [str(s) for s in program.input_specs] == ["x: float32[2x3x6x6]"]
    assert [str(s) for s in program.output_specs] == ["linear: float32[2x2]"]


def test_several_inputs_and_outputs_are_flat_and_in_order():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    program = capture(Pair(), (x, y), name="pair")
    assert program.name == "pair"
    assert [s.name for s in program.input_specs] == ["x", "y"]
    for actual, expected in zip(program(x, y), (x + y, x * 2, y.sum(0)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("example", [1, 2])
def test_dynamic_batch(net, example):
    program = capture(net, torch.randn(example, 3, 6, 6), dynamic_batch=True)
    assert program.input_specs[0].shape == (None, 3, 6, 6)
    assert program.output_specs[0].shape == (None, 2)
    for batch in (1, 5):
        assert program(torch.randn(batch, 3, 6, 6))[0].shape == (batch, 2)
    verify(program)


def test_exported_program(net):
    net.eval()
    exported = torch.export.export(net, (torch.randn(2, 3, 6, 6),))
    program = capture(exported, name="exported")
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(program(x)[0], net(x).detach())
    assert program.name == "exported"
    addresses = {value.data_ptr() for value in program.parameters().values()}
    assert net.head.weight.data_ptr() in addresses


def test_tied_weights_share_memory():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    program = capture(Tied(), torch.tensor([[1, 2]]))
    assert len({v.data_ptr() for v in program.parameters().values()}) == 1


def test_tensor_constants_become_parameters():
    class Constant(nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0, 3.0])

    program = capture(Constant(), torch.zeros(2, 3))
    torch.testing.assert_close(program(torch.zeros(2, 3))[0], torch.tensor([[1.0, 2.0, 3.0]] * 2))
    verify(program)


def test_an_input_may_be_returned_or_unused():
    class Odd(nn.Module):
        def forward(self, x, unused):
            return x, torch.relu(x)

    program = capture(Odd(), (torch.randn(3), torch.randn(4)))
    assert len(program.inputs) == 2
    x = torch.randn(3)
    assert torch.equal(program(x, torch.randn(4))[0], x)


def test_example_inputs_are_needed_for_a_module():
    with pytest.raises(CaptureError, match="capturing Net needs example_inputs: one tensor or a tuple of tensors"):
        capture(Net())


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


class Cond(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class WritesInput(nn.Module):
    def forward(self, x):
        return x.add_(1)


class ReturnsNumber(nn.Module):
    def forward(self, x):
        return x, 3


class Fails(nn.Module):
    def forward(self, x):
        return F.linear(x, torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branches, r"cannot capture Branches: .*\n.*branches on tensor values; replace the branch by torch.where"),
        (Cond, r"Cond has control flow .*straight-line code: export each branch on its own"),
        (Counts, r"Counts writes to calls while it runs; a Program is a pure function"),
        (WritesInput, r"WritesInput writes to x while it runs"),
        (ReturnsNumber, r"ReturnsNumber returns the constant 3; every output must be a tensor"),
        (Fails, r"cannot capture Fails: \w+: .*\n.*traceable by torch.export.export, or pass an ExportedProgram or an ONNX file"),
    ],
)
def test_what_cannot_be_captured_is_a_clear_error(model, message):
    module = model()
    module.train()
    with pytest.raises(CaptureError, match=message):
        capture(module, torch.randn(2, 4))
    assert module.training


def test_a_custom_op_is_named_with_its_module():
    @torch.library.custom_op("graphwright_test::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    mystery.register_fake(torch.empty_like)

    class Inner(nn.Module):
        def forward(self, x):
            return mystery(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Inner()

        def forward(self, x):
            return torch.relu(self.block(x))

    with pytest.raises(UnsupportedOpError) as caught:
        capture(Outer(), torch.randn(2, 4))
    assert "'graphwright_test.mystery.default'" in str(caught.value)
    assert "(module block) is not an ATen operator; give it a decomposition" in str(caught.value)
