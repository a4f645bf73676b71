"""merge-siblings: exact, in the order of the layers, and not where the result is too wide."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=2, max_size=4))
def test_linears_of_one_input(build, rewrite, ops, inputs, layers):
    b = build((2, 3, inputs))
    program = b.returns(*[b.linear(b.x, inputs, outputs, bias) for outputs, bias in layers])
    after, row = rewrite(program, "merge-siblings{widest=99.0}")
    assert row.stats == {"merged": len(layers)}
    assert ops(after) == {"linear": 1, "slice": len(layers)}
    assert len(after.parameters()) == 1 + any(bias for _, bias in layers)


def test_too_wide_or_alone_stays(build, rewrite):
    b = build((2, 4))
    _, row = rewrite(b.returns(b.linear(b.x, 4, 9), b.linear(b.x, 4, 9)), "merge-siblings")
    assert not row.modified
    b = build((2, 4))
    _, row = rewrite(b.returns(b.linear(b.linear(b.x, 4, 4), 4, 4)), "merge-siblings")
    assert not row.modified


def test_a_layer_between_two_siblings_may_read_the_first(build, rewrite, ops):
    b = build((2, 4))
    first = b.linear(b.x, 4, 4)
    middle = b(aten.relu.default, first)
    after, row = rewrite(b.returns(b(aten.mul.Tensor, middle, b.linear(b.x, 4, 4))), "merge-siblings")
    assert row.modified and ops(after)["linear"] == 1
