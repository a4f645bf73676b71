"""share-blocks: exact where the weights are equal already, fewer parameters otherwise, and constants stored once."""

from __future__ import annotations

import pytest
import torch
from block_models import compress, residual, transformer
from graphwright.ir.errors import OptionError, PassError, UnknownNameError
from graphwright.ir.program import Program
from graphwright.passes.prune.blocks import find_blocks


def copied(program: Program, source: str, to: str, noise: float = 0.0) -> Program:
    """Gives the block `to` copies of the parameters of `source`, plus noise."""
    program = program.clone()
    first, second = find_blocks(program).named([source, to])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        value = program.parameter(a)
        program.replace_parameter(b, value + noise * torch.randn_like(value))
    program.sweep()
    return program


def test_sharing_equal_weights_is_exact_and_they_are_there_once():
    program = copied(transformer(3), "blocks.1", "blocks.2")
    result = compress(program, "share-blocks{groups=[blocks.1+blocks.2]}")
    assert result.certificate[-1].max_abs == 0.0
    whole = sum(p.numel() for n in find_blocks(program).layers[2].parameters() if (p := program.parameter(n)) is not None)
    assert result.certificate[-1].stats == {"groups": "blocks.1+blocks.2", "parameters": whole}


@pytest.mark.parametrize("criterion", ["block-influence", "output-distortion"])
def test_count_shares_and_replays(criterion):
    program = transformer(4)
    first = compress(program, f"share-blocks{{count=2,criterion={criterion}}}")
    groups = first.certificate[-1].stats["groups"]
    replayed = compress(program, f"share-blocks{{groups=[{', '.join(f'{chr(34)}{g}{chr(34)}' for g in groups.split(', '))}]}}")
    assert str(replayed.program.graph) == str(first.program.graph)
    assert sum(p.numel() for p in first.program.parameters().values()) < sum(p.numel() for p in program.parameters().values())


def test_output_distortion_finds_the_nearly_equal_pair():
    program = copied(transformer(4), "blocks.2", "blocks.3", noise=1e-4)
    result = compress(program, "share-blocks{count=1}")
    assert result.certificate[-1].stats["groups"] == "blocks.2+blocks.3"


def test_three_blocks_share_one_set():
    result = compress(transformer(3), "share-blocks{groups=[blocks.0+blocks.1+blocks.2]}")
    layers = find_blocks(result.program).layers
    assert layers[0].parameters() == layers[1].parameters() == layers[2].parameters()


def test_bad_input_is_refused():
    with pytest.raises(OptionError, match="name the groups"):
        compress(transformer(1), "share-blocks")
    with pytest.raises(OptionError, match="joined by"):
        compress(transformer(1), "share-blocks{groups=[blocks.1]}")
    with pytest.raises(UnknownNameError, match="did you mean"):
        compress(transformer(2), "share-blocks{groups=[blocks.0+blocks.9]}")
    with pytest.raises(PassError, match="do not follow each other"):
        compress(transformer(3), "share-blocks{groups=[blocks.0+blocks.2]}")
    with pytest.raises(PassError, match="has 1 that can"):
        compress(residual(), "share-blocks{count=2}")
    with pytest.raises(PassError, match="differ in structure"):
        compress(transformer(2), 'share-blocks{groups=["blocks.0.attention+blocks.0.fc1..fc2"]}')


def test_named_groups_need_no_data():
    assert compress(transformer(2), "share-blocks{groups=[blocks.0+blocks.1]}", calibrated=False).certificate[-1].modified
