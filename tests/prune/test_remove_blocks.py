"""remove-blocks: exact where a block does nothing, the right blocks by every criterion, typed errors."""

from __future__ import annotations

import pytest
import torch
from block_models import compress, residual, transformer
from graphwright.ir.errors import OptionError, PassError, UnknownNameError
from graphwright.ir.program import Program, Stage
from graphwright.passes.prune.blocks import find_blocks
from hypothesis import given, settings
from hypothesis import strategies as st


def silence(program: Program, *names: str, factor: float = 0.0) -> Program:
    """Scales what the named blocks add by `factor`: the parameters of the last layer before each of their sums."""
    program = program.clone()
    for block in find_blocks(program).named(names):
        inside = [b for b in find_blocks(program).branches if set(b.nodes) <= set(block.nodes)]
        for branch in inside:
            layer = next(
                n
                for n in reversed(branch.nodes)
                if n.target in (torch.ops.aten.linear.default, torch.ops.aten.convolution.default)
            )
            for node in layer.args[1:3]:
                program.replace_parameter(node, program.parameter(node) * factor)
    program.sweep()
    return program


@given(st.sets(st.sampled_from(["blocks.0", "blocks.1.attention", "blocks.1.fc1..fc2", "blocks.2"]), min_size=1))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_removing_what_adds_nothing_is_exact(names):
    program = silence(transformer(3), *names)
    result = compress(program, f"remove-blocks{{blocks=[{','.join(f'{chr(34)}{n}{chr(34)}' for n in sorted(names))}]}}")
    assert result.certificate[-1].max_abs < 1e-6
    assert result.program.stage is Stage.COMPRESSED
    assert len(result.program.parameters()) < len(program.parameters())


def test_resnet_blocks_go_with_their_relu():
    program = silence(residual(), "blocks.1", "blocks.3")
    result = compress(program, "remove-blocks{blocks=[blocks.1,blocks.3]}")
    assert result.certificate[-1].max_abs == 0.0
    assert result.certificate[-1].stats["parameters"] == 4 * 4 * 9 * 2 + 8 + 6 * 6 * 9 * 2 + 12


@pytest.mark.parametrize("criterion", ["block-influence", "angular-distance", "output-distortion"])
def test_every_criterion_finds_the_blocks_that_do_little(criterion):
    program = silence(transformer(4), "blocks.1", "blocks.2", factor=0.01)
    result = compress(program, f"remove-blocks{{count=2,criterion={criterion}}}")
    assert result.certificate[-1].stats["removed"] == "blocks.1, blocks.2"


def test_branches_are_counted_alone():
    program = silence(transformer(3), "blocks.0.attention", "blocks.2.fc1..fc2", factor=0.01)
    for criterion in ("block-influence", "output-distortion"):
        result = compress(program, f"remove-blocks{{count=2,unit=branch,criterion={criterion}}}")
        assert result.certificate[-1].stats["removed"] == "blocks.0.attention, blocks.2.fc1..fc2"


def test_random_follows_the_seed_and_needs_no_data():
    program = transformer(5)
    chosen = {
        compress(program, "remove-blocks{count=2,criterion=random}", False, seed).certificate[-1].stats["removed"]
        for seed in range(6)
    }
    again = compress(program, "remove-blocks{count=2,criterion=random}", False, 3).certificate[-1].stats["removed"]
    assert len(chosen) > 1 and again in chosen


def test_the_text_of_the_chosen_names_replays_the_choice():
    program = transformer(3)
    first = compress(program, "remove-blocks{count=1}")
    replayed = compress(program, f"remove-blocks{{blocks=[{first.certificate[-1].stats['removed']}]}}")
    assert str(replayed.program.graph) == str(first.program.graph)


def test_bad_input_is_refused():
    with pytest.raises(OptionError, match="one of the two"):
        compress(transformer(1), "remove-blocks")
    with pytest.raises(OptionError, match="one of the two"):
        compress(transformer(1), "remove-blocks{blocks=[a],count=1}")
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks\.0\.attention'"):
        compress(transformer(2), "remove-blocks{blocks=[blocks.0.atention]}")
    with pytest.raises(PassError, match="9 blocks are to go, but 'test' has 2"):
        compress(transformer(2), "remove-blocks{count=9}")
    with pytest.raises(PassError, match="no 3 consecutive blocks"):
        compress(residual(), "remove-blocks{count=3,criterion=angular-distance}")
    with pytest.raises(PassError, match="needs calibration data"):
        compress(transformer(2), "remove-blocks{count=1}", calibrated=False)
