"""merge-conv: exact for any strides, groups and kernels, and only where nothing grows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten


@st.composite
def chains(draw):
    """Shapes of two convolutions in a row, the second without padding; grouped and depthwise ones, too."""
    rank = draw(st.sampled_from([1, 2]))
    kinds = draw(st.sampled_from(["dense", "depthwise", "grouped", "depthwise then dense", "dense then depthwise"]))
    a, b, c = (draw(st.integers(1, 3)) for _ in range(3))
    groups = {
        "dense": (1, 1),
        "depthwise": (4, 4),
        "grouped": (2, 2),
        "depthwise then dense": (4, 1),
        "dense then depthwise": (1, 4),
    }[kinds]
    sizes = {
        "dense": (a, b, c),
        "depthwise": (4, 4, 4),
        "grouped": (2 * a, 2 * b, 2 * c),
        "depthwise then dense": (4, 4, c),
        "dense then depthwise": (a, 4, 4),
    }[kinds]
    kernels, strides = ([[draw(st.integers(1, 3)) for _ in range(rank)] for _ in range(2)] for _ in range(2))
    padding = [draw(st.integers(0, 2)) for _ in range(rank)]
    return sizes, groups, kernels, strides, padding


@given(chains(), st.booleans(), st.booleans())
def test_forced_merges_are_exact(build, rewrite, ops, chain, bias1, bias2):
    (a, b_, c), groups, kernels, strides, padding = chain
    b = build((2, a, *[13] * len(padding)))
    h = b.conv(b.x, (b_, a // groups[0], *kernels[0]), b_ if bias1 else None, strides[0], padding, groups=groups[0])
    y = b.conv(h, (c, b_ // groups[1], *kernels[1]), c if bias2 else None, strides[1], groups=groups[1])
    after, row = rewrite(b.returns(y), "merge-conv{force=true}")
    assert row.stats == {"merged": 1} and ops(after) == {"convolution": 1}


def test_it_merges_where_that_saves(build, rewrite):
    b = build((1, 4, 9, 9))
    _, row = rewrite(b.returns(b.conv(b.conv(b.x, (4, 4, 3, 1)), (4, 4, 1, 1))), "merge-conv")
    assert row.modified
    b = build((1, 4, 9, 9))
    _, row = rewrite(b.returns(b.conv(b.conv(b.x, (4, 4, 3, 3)), (4, 4, 3, 3))), "merge-conv")
    assert not row.modified  # 25 taps instead of 18


def test_padding_readers_and_dilation_stop_it(build, rewrite):
    for options in ({"padding": 1}, {"dilation": 2}):
        b = build((1, 2, 9, 9))
        _, row = rewrite(b.returns(b.conv(b.conv(b.x, (2, 2, 3, 3)), (2, 2, 3, 3), **options)), "merge-conv{force=true}")
        assert not row.modified
    b = build((1, 2, 9, 9))
    hidden = b.conv(b.x, (2, 2, 3, 3))
    _, row = rewrite(b.returns(b.conv(hidden, (2, 2, 3, 3)), hidden), "merge-conv{force=true}")
    assert not row.modified
