"""eliminate-dead-code drops calls and parameters, never inputs."""

from __future__ import annotations

import torch
from graphwright.passes.base import PassContext
from graphwright.passes.fold.eliminate_dead_code import EliminateDeadCode

aten = torch.ops.aten


def test_dead_calls_and_parameters_go(build, rewrite, ops):
    b = build((2, 3), (4,))
    y = b(aten.relu.default, b.x)
    program = b.returns(y)
    b(aten.add.Tensor, b(aten.tanh.default, b.x), b.random(3))
    after, row = rewrite(program, "eliminate-dead-code")
    assert row.modified
    assert row.stats == {"removed": 3}
    assert ops(after) == {"relu": 1}
    assert after.parameters() == {}
    assert len(after.inputs) == 2


def test_a_program_without_dead_code_is_not_modified(build):
    b = build((2, 3))
    result = EliminateDeadCode().run(b.returns(b(aten.relu.default, b.x)).clone(), PassContext())
    assert not result.modified


def test_outputs_count_as_readers(build, rewrite):
    b = build((2, 3))
    y = b(aten.relu.default, b.x)
    _, row = rewrite(b.returns(y, b(aten.tanh.default, y), b.x), "eliminate-dead-code")
    assert not row.modified
