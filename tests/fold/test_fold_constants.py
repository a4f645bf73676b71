"""fold-constants: what depends on parameters only is computed once, and never at a price in memory."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.passes.pipeline import parse

aten = torch.ops.aten


def test_a_transposed_weight_becomes_a_parameter(build, rewrite, ops):
    b = build((2, 3))
    weight = b.random(4, 3)
    y = b(aten.matmul.default, b.x, b(aten.mul.Tensor, b(aten.permute.default, weight, [1, 0]), 2))
    after, row = rewrite(b.returns(y), "fold-constants")
    assert row.stats == {"folded": 1, "too_large": 0}
    assert ops(after) == {"matmul": 1}
    (value,) = after.parameters().values()
    assert value.shape == (3, 4)
    assert value.is_contiguous()


def test_calls_without_inputs_fold(build, rewrite, ops):
    b = build((3, 3))
    ones = b(aten.full.default, [3, 3], 1.0, dtype=torch.float32)
    after, _ = rewrite(b.returns(b(aten.add.Tensor, b.x, b(aten.tril.default, ones))), "fold-constants")
    assert ops(after) == {"add": 1}


def test_several_results_fold_one_by_one(build, rewrite, ops):
    import operator

    b = build((2,))
    parts = b(aten.split_with_sizes.default, b.random(4, 2), [1, 3])
    used = b(operator.getitem, parts, 1)
    after, _ = rewrite(b.returns(b(aten.add.Tensor, b.x, used)), "fold-constants")
    assert ops(after) == {"add": 1}
    (value,) = after.parameters().values()
    assert value.shape == (3, 2)
    assert value.untyped_storage().nbytes() == 3 * 2 * 4


def test_a_constant_output_folds(build, rewrite, ops):
    b = build((2,))
    after, row = rewrite(b.returns(b.x, b(aten.relu.default, b.random(3))), "fold-constants")
    assert row.modified
    assert ops(after) == {}


def test_a_broadcast_is_not_stored(build, rewrite, ops):
    b = build((64, 64, 64))
    wide = b(aten.expand.default, b.random(64, 1, 1), [64, 64, 64])
    _, row = rewrite(b.returns(b(aten.add.Tensor, b.x, wide)), "fold-constants{free_bytes=1024}")
    assert not row.modified
    assert row.stats == {"folded": 0, "too_large": 1}
    assert row.bytes_after == 64 * 4


def test_max_growth_allows_more(build, rewrite, ops):
    b = build((8, 64))
    wide = b(aten.expand.default, b.random(1, 64), [8, 64])
    program = b.returns(b(aten.add.Tensor, b.x, wide))
    for growth, folds in ((7.9, False), (8.0, True)):
        _, row = rewrite(program, f"fold-constants{{max_growth={growth},free_bytes=0}}")
        assert row.modified == folds


def test_the_folded_prefix_of_a_large_value_is_stored(build, rewrite, ops):
    b = build((64, 64))
    row = b(aten.relu.default, b.random(1, 64))
    after, result = rewrite(
        b.returns(b(aten.add.Tensor, b.x, b(aten.expand.default, row, [64, 64]))), "fold-constants{free_bytes=0}"
    )
    assert result.stats == {"folded": 1, "too_large": 1}
    assert ops(after) == {"expand": 1, "add": 1}


def test_inputs_and_random_numbers_are_no_constants(build, rewrite):
    b = build((2, 3))
    y = b(aten.matmul.default, b.x, b.random(3, 4))
    _, row = rewrite(b.returns(y), "fold-constants")
    assert not row.modified


def test_random_calls_are_not_evaluated(build):
    from graphwright.passes.base import PassContext

    b = build((3,))
    program = b.returns(b(aten.add.Tensor, b.x, b(aten.bernoulli.p, b.random(3), 0.5)))
    assert not parse("fold-constants").passes[0].run(program.clone(), PassContext()).modified


def test_options_are_checked():
    with pytest.raises(OptionError, match="zero or more"):
        parse("fold-constants{max_growth=-1.0}")
