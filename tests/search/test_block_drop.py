"""Evolutionary block dropping: the loss is that of the program without the blocks, and the best set of all is found."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from block_models import images, transformer
from graphwright.ir.errors import OptionError
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.prune.blocks import find_blocks
from graphwright.passes.prune.remove_blocks import without
from graphwright.search.block_drop import DropLoss, drop_blocks, problem_of
from graphwright.search.problem import InfeasibleError


def kl(program, other, samples) -> float:
    total = 0.0
    for sample in samples:
        p, q = (y.log_softmax(-1) for y in (program(*sample)[0], other(*sample)[0]))
        total += float((p.exp() * (p - q)).sum(-1).mean()) / len(samples)
    return total


def test_the_loss_is_that_of_the_smaller_program():
    program, samples = transformer(2), images(transformer(2), 3)
    blocks = find_blocks(program).branches
    loss = DropLoss(program, blocks, samples)
    for chosen in product((0, 1), repeat=len(blocks)):
        names = [b.name for b, keep in zip(blocks, chosen, strict=True) if not keep]
        assert loss(chosen, 3) == pytest.approx(kl(program, without(program.clone(), names), samples.samples), abs=1e-6)


def test_the_best_of_all_sets_is_found_and_its_text_replays():
    torch.manual_seed(0)
    program, samples = transformer(3), images(transformer(3), 8)
    blocks = find_blocks(program).branches
    loss, problem = DropLoss(program, blocks, samples), problem_of(program, blocks, [0.0] * len(blocks), 0.6)
    best = min(loss(c, 8) for c in product((0, 1), repeat=len(blocks)) if problem.meets(c))
    found = drop_blocks(program, samples, 0.6, generations=8)
    assert found.fitness == pytest.approx(best)
    result = PassManager().run(program, parse(found.pipeline), PassContext())
    assert kl(program, result.program, samples.samples) == pytest.approx(best, abs=1e-6)


def test_bad_input_is_refused():
    program, samples = transformer(2), images(transformer(2), 8)
    with pytest.raises(OptionError, match="a share of MACs"):
        drop_blocks(program, samples, 1.5)
    with pytest.raises(InfeasibleError):
        drop_blocks(program, samples, 0.001)
