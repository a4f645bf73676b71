"""canonicalize-activation: every spelling of a clamp ends alike."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten

RELUS = {
    "clamp_min": lambda b: b(aten.clamp_min.default, b.x, 0),
    "clamp": lambda b: b(aten.clamp.default, b.x, 0.0),
    "hardtanh": lambda b: b(aten.hardtanh.default, b.x, 0, math.inf),
    "threshold": lambda b: b(aten.threshold.default, b.x, 0, 0),
    "leaky": lambda b: b(aten.leaky_relu.default, b.x, 0.0),
    "maximum": lambda b: b(aten.maximum.default, b.x, b.parameter(torch.tensor(0.0))),
    "maximum from the left": lambda b: b(aten.maximum.default, b.parameter(torch.zeros(1)), b.x),
    "clamp by a tensor": lambda b: b(aten.clamp.Tensor, b.x, b.parameter(torch.tensor(0.0))),
}
SIXES = {
    "relu6": lambda b: b(aten.relu6.default, b.x),
    "hardtanh": lambda b: b(aten.hardtanh.default, b.x, 0, 6),
    "clamp of integers": lambda b: b(aten.clamp.default, b.x, 0, 6),
    "clamp by keyword": lambda b: b(aten.clamp.default, b.x, min=0, max=6),
    "minimum of relu": lambda b: b(aten.minimum.default, b(aten.relu.default, b.x), b.parameter(torch.tensor(6.0))),
    "relu of clamp_max": lambda b: b(aten.relu.default, b(aten.clamp_max.default, b.x, 6.0)),
}


@pytest.mark.parametrize("case", sorted(RELUS))
def test_relu(build, rewrite, ops, case):
    b = build((3, 4))
    after, row = rewrite(b.returns(RELUS[case](b)), "canonicalize-activation")
    assert row.modified
    assert ops(after) == {"relu": 1}


@pytest.mark.parametrize("case", sorted(SIXES))
def test_relu6(build, rewrite, case):
    b = build((3, 4))
    after, row = rewrite(b.returns(SIXES[case](b)), "canonicalize-activation")
    assert row.modified
    (node,) = [n for n in after.nodes if n.op == "call_function"]
    assert node.target is aten.clamp.default
    assert node.args == (after.inputs[0], 0.0, 6.0)
    assert all(type(bound) is float for bound in node.args[1:])


bound = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])
one_range = st.one_of(
    st.tuples(bound, st.none()), st.tuples(st.none(), bound), st.tuples(bound, bound).map(lambda r: (min(r), max(r)))
)


@given(st.lists(one_range, min_size=2, max_size=4))
def test_chains_become_one_clamp(build, rewrite, ops, ranges):
    b = build((5, 7))
    y = b.x
    for low, high in ranges:
        y = b(aten.clamp.default, y, low, high)
    after, row = rewrite(b.returns(y), "canonicalize-activation")
    assert row.modified
    assert sum(ops(after).values()) == 1
    assert set(ops(after)) <= {"clamp", "relu"}


def test_a_clamp_without_bounds_goes(build, rewrite, ops):
    b = build((3,))
    after, _ = rewrite(
        b.returns(b(aten.neg.default, b(aten.hardtanh.default, b.x, -math.inf, math.inf))), "canonicalize-activation"
    )
    assert ops(after) == {"neg": 1}


CASES = {
    "canonical": lambda b: [b(aten.relu.default, b.x), b(aten.clamp.default, b.x, -1.0, 1.0)],
    "leaky": lambda b: [b(aten.leaky_relu.default, b.x, 0.1)],
    "threshold": lambda b: [b(aten.threshold.default, b.x, 0.5, 0.0)],
    "two values": lambda b: [b(aten.maximum.default, b.x, b.random(4))],
    "computed bound": lambda b: [b(aten.clamp.Tensor, b.x, b(aten.neg.default, b.x))],
    "bounds in the wrong order": lambda b: [b(aten.clamp.default, b.x, 1.0, -1.0)],
    "larger result": lambda b: [b(aten.maximum.default, b.x, b.parameter(torch.zeros(1, 1, 1)))],
    "another reader between": lambda b: [r := b(aten.relu.default, b.x), b(aten.clamp.default, r, -1.0, 2.0)],
    "integers": lambda b: [b(aten.clamp.default, b(aten._to_copy.default, b.x, dtype=torch.int64), 0)],
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_must_not_fire(build, rewrite, case):
    b = build((3, 4))
    _, row = rewrite(b.returns(*CASES[case](b)), "canonicalize-activation")
    assert not row.modified
