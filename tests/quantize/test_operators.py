import math

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.passes.quantize import operators as ops
from torch.nn import functional as F

IMAGE = (1, 2, 6, 6)


def last(function, shape=IMAGE):
    """The captured program of a function of one tensor, and the node it returns."""

    class Net(torch.nn.Module):
        def forward(self, x):
            return function(x)

    program = capture(Net(), torch.randn(shape))
    return program, program.outputs[0]


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        (torch.relu, (0.0, math.inf)),
        (F.relu6, (0.0, 6.0)),
        (F.hardtanh, (-1.0, 1.0)),
        (lambda x: F.hardtanh(x, -2, 3), (-2.0, 3.0)),
        (lambda x: x.clamp(max=4), (-math.inf, 4.0)),
        (lambda x: x.clamp(min=-1, max=2), (-1.0, 2.0)),
        (torch.sigmoid, None),
    ],
)
def test_clamp_bounds(function, bounds):
    assert ops.clamp_bounds(last(function)[1]) == bounds


@pytest.mark.parametrize(
    ("function", "factor"),
    [(lambda x: x * 0.5, 0.5), (lambda x: x / 4, 0.25), (lambda x: x * -2.0, None), (lambda x: x * x, None), (torch.relu, None)],
)
def test_positive_factor(function, factor):
    assert ops.positive_factor(*last(function)) == factor


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: F.pad(x, (0, 1, 1, 0)), True),
        (lambda x: F.pad(x, (0, 1), value=1.0), False),
        (lambda x: F.max_pool2d(x, 2), True),
        (lambda x: x.transpose(1, 2), True),
        (lambda x: x[:, :1], True),
        (torch.exp, False),
    ],
)
def test_keeps_encoding(function, expected):
    assert ops.keeps_encoding(last(function)[1]) is expected


@pytest.mark.parametrize(
    ("function", "described"),
    [
        (lambda x: x.mean((2, 3)), ([2, 3], False)),
        (lambda x: x.mean(-1, keepdim=True), ([3], True)),
        (lambda x: F.adaptive_avg_pool2d(x, 1), ([2, 3], True)),
        (lambda x: F.adaptive_avg_pool2d(x, 4), None),
    ],
)
def test_mean_dims(function, described):
    assert ops.mean_dims(last(function)[1]) == described


def test_average_pools():
    assert ops.average_pool(last(lambda x: F.avg_pool2d(x, 3, 2, 1))[1]) == ([3, 3], [2, 2], [1, 1], 9)
    assert ops.average_pool(last(lambda x: F.avg_pool2d(x, (2, 3)))[1]) == ([2, 3], [2, 3], [0, 0], 6)
    assert ops.average_pool(last(lambda x: F.avg_pool2d(x, 2, divisor_override=3))[1]) == ([2, 2], [2, 2], [0, 0], 3)
    assert "ceil_mode" in ops.average_pool(last(lambda x: F.avg_pool2d(x, 4, ceil_mode=True))[1])
    assert "padding" in ops.average_pool(last(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))[1])


def test_only_functions_of_one_tensor_are_unary():
    assert ops.is_unary(*last(lambda x: x + 3)) and ops.is_unary(*last(F.gelu)) and ops.is_unary(*last(torch.relu))
    assert not ops.is_unary(*last(lambda x: x + x)) and not ops.is_unary(*last(lambda x: x.softmax(-1)))
