"""merge-pointwise-conv: exact at borders and strides, and only where nothing grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st


@given(st.data(), st.booleans(), st.booleans())
def test_pointwise_first(build, rewrite, ops, data, bias1, bias2):
    rank = data.draw(st.sampled_from([1, 2, 3]))
    kernel, stride, padding, dilation = (
        [data.draw(st.integers(a, z)) for _ in range(rank)] for a, z in ((1, 3), (1, 2), (0, 2), (1, 2))
    )
    b = build((1, 2, *[7] * rank))
    hidden = b.conv(b.x, (3, 2, *[1] * rank), 3 if bias1 else None)
    y = b.conv(hidden, (2, 3, *kernel), 2 if bias2 else None, stride=stride, padding=padding, dilation=dilation)
    after, row = rewrite(b.returns(y), "merge-pointwise-conv{force=true}")
    # A padded second layer that is itself 1x1 is no pointwise layer; a bias before padding shows at the borders.
    exact = not (any(padding) and bias1)
    assert row.modified == exact
    assert ops(after) == {"convolution": 1 if exact else 2}


@given(st.data(), st.booleans(), st.booleans())
def test_pointwise_second(build, rewrite, ops, data, bias1, bias2):
    rank = data.draw(st.sampled_from([1, 2, 3]))
    ranges = ((2, 3), (1, 3), (0, 2), (1, 2), (1, 3))
    kernel, stride, padding, dilation, stride2 = ([data.draw(st.integers(a, z)) for _ in range(rank)] for a, z in ranges)
    size = [data.draw(st.integers(5, 9)) for _ in range(rank)]
    b = build((2, 2, *size))
    hidden = b.conv(b.x, (3, 2, *kernel), 3 if bias1 else None, stride=stride, padding=padding, dilation=dilation)
    y = b.conv(hidden, (4, 3, *[1] * rank), 4 if bias2 else None, stride=stride2)
    after, row = rewrite(b.returns(y), "merge-pointwise-conv{force=true}")
    assert row.modified
    assert ops(after) == {"convolution": 1}


def test_merges_by_itself_only_when_nothing_grows(build, rewrite):
    b = build((1, 2, 8, 8))
    _, row = rewrite(b.returns(b.conv(b.conv(b.x, (8, 2, 1, 1)), (8, 8, 3, 3), padding=1)), "merge-pointwise-conv")
    assert row.modified
    assert row.bytes_after < row.bytes_before
    b = build((1, 16, 8, 8))
    _, row = rewrite(b.returns(b.conv(b.conv(b.x, (2, 16, 1, 1)), (16, 2, 3, 3))), "merge-pointwise-conv")
    assert not row.modified
    # Fewer multiply-accumulates before: a strided first layer leaves little to the second.
    b = build((1, 8, 8, 8))
    _, row = rewrite(b.returns(b.conv(b.conv(b.x, (2, 8, 3, 3), stride=4), (8, 2, 1, 1))), "merge-pointwise-conv")
    assert not row.modified


CASES = {
    "several readers": lambda b: [h := b.conv(b.x, (4, 4, 1, 1)), b.conv(h, (4, 4, 3, 3))],
    "depthwise": lambda b: [b.conv(b.conv(b.x, (4, 4, 1, 1)), (4, 1, 3, 3), groups=4)],
    "grouped pointwise": lambda b: [b.conv(b.conv(b.x, (4, 4, 3, 3)), (4, 2, 1, 1), groups=2)],
    "transposed": lambda b: [b.conv(b.conv(b.x, (4, 4, 1, 1)), (4, 4, 3, 3), transposed=True)],
    "two kernels": lambda b: [b.conv(b.conv(b.x, (4, 4, 3, 3)), (4, 4, 3, 3))],
    "strided pointwise first": lambda b: [b.conv(b.conv(b.x, (4, 4, 1, 1), stride=2), (4, 4, 3, 3))],
    "padded pointwise second": lambda b: [b.conv(b.conv(b.x, (4, 4, 3, 3)), (4, 4, 1, 1), padding=1)],
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_must_not_fire(build, rewrite, case):
    b = build((1, 4, 9, 9))
    _, row = rewrite(b.returns(*CASES[case](b)), "merge-pointwise-conv{force=true}")
    assert not row.modified
