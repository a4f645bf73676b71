"""eliminate-common-subexpressions merges equal calls, and nothing that only looks equal."""

from __future__ import annotations

import torch

aten = torch.ops.aten


def test_equal_chains_merge(build, rewrite, ops):
    b = build((2, 3))
    chains = [b(aten.mul.Tensor, b(aten.relu.default, b.x), 2.0) for _ in range(3)]
    after, row = rewrite(b.returns(*chains), "eliminate-common-subexpressions")
    assert row.stats == {"merged": 4}
    assert ops(after) == {"relu": 1, "mul": 1}
    assert len(set(after.outputs)) == 1


def test_lists_and_keywords_are_compared(build, rewrite, ops):
    b = build((2, 3))
    pairs = [b(aten.cat.default, [b.x, b.x], dim) for dim in (0, 0, 1)]
    typed = [b(aten._to_copy.default, b.x, dtype=dtype) for dtype in (torch.float64, torch.float64, torch.float16)]
    after, row = rewrite(b.returns(*pairs, *typed), "eliminate-common-subexpressions")
    assert row.stats == {"merged": 2}
    assert ops(after) == {"cat": 2, "_to_copy": 2}


def test_reads_of_one_tensor_merge_and_equal_values_do_not(build, rewrite):
    b = build((3,))
    shared = torch.zeros(3)
    first, second, other = b.parameter(shared), b.parameter(shared), b.parameter(torch.zeros(3))
    program = b.returns(*(b(aten.add.Tensor, b.x, p) for p in (first, second, other)))
    after, row = rewrite(program, "eliminate-common-subexpressions")
    assert row.stats == {"merged": 2}
    assert len(after.parameters()) == 2


def test_types_of_literals_matter(build, rewrite):
    b = build((3,))
    whole = b(aten._to_copy.default, b.x, dtype=torch.int64)
    _, row = rewrite(b.returns(b(aten.mul.Tensor, whole, 2), b(aten.mul.Tensor, whole, 2.0)), "eliminate-common-subexpressions")
    assert not row.modified


def test_random_calls_stay_apart(build):
    from graphwright.passes.base import PassContext
    from graphwright.passes.fold.eliminate_common_subexpressions import EliminateCommonSubexpressions

    b = build((3,))
    program = b.returns(b(aten.bernoulli.p, b.x, 0.5), b(aten.bernoulli.p, b.x, 0.5))
    assert not EliminateCommonSubexpressions().run(program.clone(), PassContext()).modified
