"""merge-linear: exact, and only where nothing grows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten
size = st.integers(1, 6)


@given(size, size, size, st.booleans(), st.booleans(), st.booleans())
def test_merges_when_not_larger(build, rewrite, ops, inputs, hidden, outputs, bias1, bias2, force):
    b = build((2, 3, inputs))
    program = b.returns(b.linear(b.linear(b.x, inputs, hidden, bias1), hidden, outputs, bias2))
    after, row = rewrite(program, "merge-linear{force=true}" if force else "merge-linear")
    merges = force or inputs * outputs <= hidden * (inputs + outputs)
    assert row.modified == merges
    assert ops(after) == {"linear": 1 if merges else 2}
    if merges:
        assert len(after.parameters()) == 1 + (bias1 or bias2)


def test_chains_merge_whole(build, rewrite, ops):
    b = build((2, 4))
    y = b.x
    for _ in range(4):
        y = b.linear(y, 4, 4)
    after, row = rewrite(b.returns(y), "merge-linear")
    assert row.stats == {"merged": 3}
    assert ops(after) == {"linear": 1}


def test_another_reader_or_an_activation_between_stops_it(build, rewrite):
    b = build((2, 4))
    hidden = b.linear(b.x, 4, 4)
    _, row = rewrite(b.returns(b.linear(hidden, 4, 4), hidden), "merge-linear")
    assert not row.modified
    b = build((2, 4))
    _, row = rewrite(b.returns(b.linear(b(aten.relu.default, b.linear(b.x, 4, 4)), 4, 4)), "merge-linear")
    assert not row.modified


def test_a_low_rank_factorization_stays(build, rewrite):
    b = build((2, 16))
    _, row = rewrite(b.returns(b.linear(b.linear(b.x, 16, 2, False), 2, 16)), "merge-linear")
    assert not row.modified


def test_a_computed_weight_stays(build, rewrite):
    b = build((2, 4), (4, 4))
    hidden = b(aten.linear.default, b.x, b.inputs[1], None)
    _, row = rewrite(b.returns(b.linear(hidden, 4, 4)), "merge-linear")
    assert not row.modified
