"""merge-parallel: exact for linear layers and convolutions of any geometry, with identities, and only where taps meet."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten
size = st.integers(1, 6)


@given(size, size, st.booleans(), st.booleans(), st.booleans())
def test_parallel_linears_and_the_residual(build, rewrite, ops, inputs, outputs, bias1, bias2, residual):
    b = build((2, 3, inputs))
    y = b(aten.add.Tensor, b.linear(b.x, inputs, outputs, bias1), b.linear(b.x, inputs, outputs, bias2))
    y = b(aten.add.Tensor, b.x, y) if residual and inputs == outputs else y
    after, row = rewrite(b.returns(y), "merge-parallel")
    assert row.stats == {"merged": 1 + (residual and inputs == outputs)}
    assert ops(after) == {"linear": 1}


@st.composite
def branches(draw):
    """Two convolutions of one input whose taps meet: the smaller kernel is a part of the larger one."""
    groups, rank = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    dilation, stride = ([draw(st.integers(1, 2)) for _ in range(rank)] for _ in range(2))
    first = [draw(st.integers(0, k - 1)) for k in kernel]
    small = [draw(st.integers(1, k - f)) for k, f in zip(kernel, first, strict=True)]
    # A padding of the large kernel that leaves the small one a padding of at least zero; both have the same outputs.
    padding = [d * f + draw(st.integers(0, 2)) for d, f in zip(dilation, first, strict=True)]
    less = [p - d * f for p, d, f in zip(padding, dilation, first, strict=True)]
    extent = [d * k + s + 3 for d, k, s in zip(dilation, kernel, stride, strict=True)]
    return groups, inputs, outputs, kernel, dilation, stride, small, padding, less, extent


@given(branches(), st.booleans(), st.booleans())
def test_parallel_convolutions(build, rewrite, ops, case, bias1, bias2):
    groups, inputs, outputs, kernel, dilation, stride, small, padding, less, extent = case
    b = build((2, inputs, *extent))
    large = b.conv(
        b.x, (outputs, inputs // groups, *kernel), outputs if bias1 else None, stride, padding, dilation, groups=groups
    )
    other = b.conv(b.x, (outputs, inputs // groups, *small), outputs if bias2 else None, stride, less, dilation, groups=groups)
    if large.meta["val"].shape != other.meta["val"].shape:
        return
    after, row = rewrite(b.returns(b(aten.add.Tensor, other, large)), "merge-parallel")
    assert row.modified and ops(after) == {"convolution": 1}


@given(st.sampled_from([1, 2, 4]), st.integers(1, 2), st.sampled_from([1, 3, 5]))
def test_repvgg_block(build, rewrite, ops, groups, dilation, kernel):
    b = build((1, 4, 9, 9))
    weight, padding = (4, 4 // groups, kernel, kernel), dilation * (kernel // 2)
    y = b(aten.add.Tensor, b.conv(b.x, (4, 4 // groups, 1, 1), 4, groups=groups), b.x)
    y = b(aten.add.Tensor, y, b.conv(b.x, weight, 4, padding=padding, dilation=dilation, groups=groups))
    after, row = rewrite(b.returns(y), "merge-parallel")
    assert row.stats == {"merged": 2} and ops(after) == {"convolution": 1}


def test_a_trained_repvgg_block_is_one_convolution(build, rewrite, ops):
    b = build((1, 4, 9, 9))
    branches = [
        b.batch_norm(b.conv(b.x, (4, 4, 3, 3), padding=1), 4),
        b.batch_norm(b.conv(b.x, (4, 4, 1, 1)), 4),
        b.batch_norm(b.x, 4),
    ]
    y = b(aten.add.Tensor, b(aten.add.Tensor, branches[0], branches[1]), branches[2])
    after, row = rewrite(b.returns(b(aten.relu.default, y)), "canonicalize,merge-parallel")
    assert row.stats == {"merged": 2} and ops(after) == {"convolution": 1, "relu": 1}


def test_what_does_not_meet_stays(build, rewrite):
    cases = [
        {"weight": (4, 4, 3, 3), "padding": 2, "dilation": 2},  # taps between taps
        {"weight": (4, 2, 1, 1), "groups": 2},  # other groups
        {"weight": (4, 4, 5, 5), "padding": 2, "dilation": 1, "groups": 1, "x": "relu"},  # of another input
    ]
    for case in cases:
        b = build((1, 4, 8, 8))
        x = b(aten.relu.default, b.x) if case.pop("x", None) else b.x
        y = b(aten.add.Tensor, b.conv(b.x, (4, 4, 3, 3), padding=1), b.conv(x, **case))
        _, row = rewrite(b.returns(y), "merge-parallel")
        assert not row.modified


def test_another_reader_or_a_stride_stops_it(build, rewrite):
    b = build((2, 4))
    left, right = b.linear(b.x, 4, 4), b.linear(b.x, 4, 4)
    _, row = rewrite(b.returns(b(aten.add.Tensor, left, right), right), "merge-parallel")
    assert not row.modified
    b = build((2, 4), (2, 4))
    _, row = rewrite(b.returns(b(aten.add.Tensor, b.linear(b.x, 4, 4), b.inputs[1])), "merge-parallel")
    assert not row.modified
    b = build((1, 4, 1, 1))
    _, row = rewrite(b.returns(b(aten.add.Tensor, b.conv(b.x, (4, 4, 1, 1), stride=2), b.x)), "merge-parallel")
    assert not row.modified
