"""Blocks: found in pre-norm, post-norm and convolutional networks, named by their modules, and nothing found that cannot go."""

from __future__ import annotations

import pytest
import torch
from block_models import PostNorm, canonical, residual, transformer
from graphwright.ir.errors import UnknownNameError
from graphwright.passes.prune.blocks import blocks_text, find_blocks
from torch import nn


def test_a_transformer_has_branches_and_layers():
    blocks = find_blocks(transformer(3))
    assert [b.name for b in blocks.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [b.name for b in blocks.branches[:2]] == ["blocks.0.attention", "blocks.0.fc1..fc2"]
    assert len({b.structure for b in blocks.layers}) == 1
    assert all(a.exit is b.entry for a, b in zip(blocks.layers, blocks.layers[1:], strict=False))
    assert [str(p.target) for p in blocks.branches[1].parameters()][-1] == "blocks_0_fc2_bias"


def test_a_single_layer_is_its_branches():
    blocks = find_blocks(transformer(1))
    assert [b.name for b in blocks.layers] == [b.name for b in blocks.branches] == ["blocks.0.attention", "blocks.0.fc1..fc2"]


def test_a_projection_cannot_go_and_relus_belong_to_their_blocks():
    blocks = find_blocks(residual())
    assert [b.name for b in blocks.layers] == ["blocks.0", "blocks.1", "blocks.3"]
    assert all(b.exit.target is torch.ops.aten.relu.default for b in blocks.layers)
    assert blocks.layers[0].structure == blocks.layers[1].structure != blocks.layers[2].structure


def test_the_norm_behind_the_sum_belongs_to_a_post_norm_block():
    torch.manual_seed(0)
    blocks = find_blocks(canonical(PostNorm(), 2, 6)).layers
    assert len(blocks) == 3
    assert {b.exit.target for b in blocks} == {torch.ops.aten.layer_norm.default}


class Leaking(nn.Module):
    """The branch's inner value is read outside, too; and the sum with the doubled value has no path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        y = x + self.second(hidden)
        return y + y, hidden


def test_a_branch_that_is_read_outside_is_no_block():
    program = canonical(Leaking(), 2, 4)
    assert find_blocks(program).branches == ()
    assert "no residual block" in blocks_text(program)


def test_text_names_structure_and_parts():
    text = blocks_text(transformer(2))
    assert text.splitlines()[0].startswith("blocks.0: %add -> %add_2") and text.splitlines()[0].endswith("kind 1")
    assert text.splitlines()[1].startswith("  blocks.0.attention: ")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown block 'blocks.7'; did you mean 'blocks\.\d'"):
        find_blocks(transformer(2)).named(["blocks.7"])
