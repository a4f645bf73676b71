"""merge-reshapes: chains collapse, round trips vanish, data movement with other readers stays."""

from __future__ import annotations

import torch
from graphwright.ir.capture import capture
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten


def test_chain_becomes_one_reshape(build, rewrite, ops):
    b = build((2, 3, 4))
    y = b(aten.reshape.default, b.x, [6, 4])
    y = b(aten.unsqueeze.default, y, 0)
    y = b(aten.reshape.default, y, [4, 6])
    after, row = rewrite(b.returns(y), "merge-reshapes")
    assert row.stats == {"merged": 2}
    assert ops(after) == {"reshape": 1}


def test_round_trip_vanishes(build, rewrite, ops):
    b = build((2, 3, 4))
    y = b(aten.squeeze.dims, b(aten.unsqueeze.default, b.x, 1), [1])
    after, _ = rewrite(b.returns(b(aten.relu.default, y)), "merge-reshapes")
    assert ops(after) == {"relu": 1}


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_permutes_compose(build, rewrite, ops, first, second):
    b = build((2, 3, 4, 5))
    inner = b(aten.permute.default, b.x, [d - 4 for d in first])
    program = b.returns(b(aten.relu.default, b(aten.permute.default, inner, list(second))))
    after, row = rewrite(program, "merge-reshapes")
    assert row.stats == {"merged": 1}
    identity = [first[d] for d in second] == list(range(4))
    assert ops(after)["permute"] == (0 if identity else 1)


def test_a_permute_with_another_reader_stays(build, rewrite):
    b = build((2, 3, 4))
    inner = b(aten.permute.default, b.x, [0, 2, 1])
    _, row = rewrite(b.returns(b(aten.permute.default, inner, [1, 0, 2]), inner), "merge-reshapes")
    assert not row.modified


def test_a_reshape_with_another_reader_is_bypassed_and_kept(build, rewrite, ops):
    b = build((2, 3, 4))
    inner = b(aten.reshape.default, b.x, [6, 4])
    after, row = rewrite(b.returns(b(aten.reshape.default, inner, [24]), inner), "merge-reshapes")
    assert row.modified
    assert all(n.args[0] is after.inputs[0] for n in after.nodes if n.op == "call_function")


def test_squeeze_and_unsqueeze_are_reshapes(build, rewrite, ops):
    b = build((2, 1, 3))
    outputs = [b(aten.squeeze.dims, b.x, [1]), b(aten.squeeze.default, b.x), b(aten.unsqueeze.default, b.x, -1)]
    after, row = rewrite(b.returns(*outputs), "merge-reshapes")
    assert row.stats == {"merged": 3}
    assert ops(after) == {"reshape": 3}


def test_keys_transposed_in_a_merged_batch(build, rewrite, ops):
    b = build((2, 3, 4, 5))
    merged = b(aten.permute.default, b(aten.reshape.default, b.x, [-1, 4, 5]), [0, 2, 1])
    after, _ = rewrite(b.returns(b(aten.reshape.default, merged, [2, 3, 5, 4])), "merge-reshapes,remove-no-ops,merge-reshapes")
    assert ops(after) == {"permute": 1}
    (node,) = [n for n in after.nodes if n.op == "call_function"]
    assert node.args == (after.inputs[0], [0, 1, 3, 2])


def test_a_reshape_that_takes_other_dimensions_apart_stays(build, rewrite):
    b = build((6, 4, 10))
    moved = b(aten.permute.default, b(aten.reshape.default, b.x, [6, 4, 10]), [0, 2, 1])
    _, row = rewrite(b.returns(b(aten.reshape.default, moved, [6, 5, 2, 4])), "merge-reshapes")
    assert not row.modified


def test_reshape_across_permute_stays(build, rewrite):
    b = build((2, 3, 4))
    y = b(aten.reshape.default, b(aten.permute.default, b.x, [0, 2, 1]), [2, 12])
    _, row = rewrite(b.returns(y), "merge-reshapes")
    assert not row.modified


def test_symbolic_batch(rewrite, ops):
    class Net(torch.nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 3, 4).unsqueeze(1).flatten(1)

    program = capture(Net(), torch.randn(2, 3, 2, 2), dynamic_batch=True)
    after, row = rewrite(program, "remove-no-ops,merge-reshapes")
    assert row.modified
    assert ops(after)["reshape"] == 1
    assert "unsqueeze" not in ops(after)
