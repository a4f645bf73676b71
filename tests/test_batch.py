"""A symbolic batch made concrete: same values, static shapes, and refusals."""

import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.batch import with_batch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import OptionError, TargetError
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse


class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 2)
        self.linear = torch.nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = torch.nn.functional.pad(x, (0, 1, 0, 1))  # on one side, as strided convolutions of TensorFlow want it
        y = torch.nn.functional.max_pool2d(torch.relu(self.convolution(x)), 4)
        return self.linear(y.permute(0, 2, 3, 1).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def integer():
    torch.manual_seed(0)
    program = capture(Pooled().eval(), torch.randn(1, 3, 8, 8), dynamic_batch=True)
    data = Calibration.for_program(program, [torch.randn(2, 3, 8, 8)])
    return PassManager().run(program, parse("canonicalize,quantize,lower-integer"), PassContext(calibration=data)).program


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_values_equal_the_symbolic_program_and_the_compiled_one(integer, batch):
    x = torch.randn(batch, 3, 8, 8)
    fixed = with_batch(integer, batch)
    assert [spec.shape for spec in (*fixed.input_specs, *fixed.output_specs)] == [(batch, 3, 8, 8), (batch, 5)]
    assert torch.equal(fixed(x)[0], integer(x)[0])
    compiled = TVMBackend().compile(fixed, Target.parse("cpu"))
    assert torch.equal(torch.from_numpy(load_bytes(compiled.library)(x.numpy())[0]), integer(x)[0])


def test_the_symbolic_program_is_untouched_and_still_refused_by_the_backend(integer):
    with_batch(integer, 3)
    assert integer.input_specs[0].shape == (None, 3, 8, 8)
    with pytest.raises(TargetError, match="symbolic"):
        TVMBackend().compile(integer, Target.parse("cpu"))


def test_a_fixed_batch_is_not_changed(integer):
    with pytest.raises(OptionError, match="no free batch dimension"):
        with_batch(with_batch(integer, 3), 4)
    assert with_batch(with_batch(integer, 3), 3).input_specs[0].shape == (3, 3, 8, 8)
    with pytest.raises(OptionError, match="at least one sample"):
        with_batch(integer, 0)
