"""GPFQ against the recursion written out on the data."""

import torch
from graphwright.passes.quantize.gpfq import gpfq
from graphwright.passes.quantize.rounding import Steps
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), size=st.integers(1, 9))
def test_equals_the_running_sum_on_the_rows(seed, groups, size):
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(groups, 30, size, generator=generator, dtype=torch.float64)
    inputs = exact + 0.1 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, 4, size, generator=generator, dtype=torch.float64)
    scale = weight.abs().amax(2, keepdim=True) / 3
    steps = Steps(scale, torch.full_like(scale, -3), torch.full_like(scale, 3))
    chosen = gpfq(weight, inputs.transpose(1, 2) @ exact, inputs.transpose(1, 2) @ inputs, steps)
    for g in range(groups):
        for o in range(4):
            u = torch.zeros(30, dtype=torch.float64)
            for t in range(size):
                u = u + weight[g, o, t] * exact[g, :, t]
                y = inputs[g, :, t]
                q = torch.round((y @ u) / (y @ y) / scale[g, o, 0]).clamp(-3, 3)
                assert q == chosen[g, o, t]
                u = u - q * scale[g, o, 0] * y


def test_a_column_that_is_never_read_keeps_the_nearest_code():
    weight = torch.tensor([[[0.9, -1.2]]], dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    gram = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    assert gpfq(weight, gram, gram, Steps(one, -3 * one, 3 * one)).tolist() == [[[1.0, -1.0]]]
