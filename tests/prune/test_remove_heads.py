"""remove-heads: really fewer heads, exact where a head adds nothing, the same as the pass it stands for."""

from __future__ import annotations

import pytest
import torch
from block_models import compress, transformer
from graphwright.ir.errors import OptionError, PassError, UnknownNameError
from graphwright.ir.program import shape_of
from graphwright.passes.prune.remove_heads import head_groups


def heads(program) -> list[int]:
    return [shape_of(n)[1] for n in program.nodes if n.target is torch.ops.aten.softmax.int]


def test_a_head_that_adds_nothing_goes_exactly():
    program = transformer(2)
    node = next(n for n in program.nodes if n.op == "get_attr" and n.target == "blocks_1_attention_proj_weight")
    weight = program.parameter(node).clone()
    weight[:, :4] = 0  # what the first of two heads of width 4 adds
    program.replace_parameter(node, weight)
    program.sweep()
    result = compress(program, 'remove-heads{keep=["blocks.1.attention=1"],reconstruct=false}')
    assert heads(result.program) == [2, 1]
    assert result.certificate[-1].relative < 1e-3
    assert {str(n.target): shape_of(n) for n in result.program.nodes if n.op == "get_attr"}.get(
        "blocks_0_attention_qkv_weight"
    ) == (24, 8)


def test_count_takes_from_every_attention():
    result = compress(transformer(2), "remove-heads{count=1,reconstruct=false,criterion=l2}", calibrated=False)
    assert heads(result.program) == [1, 1]


def test_it_is_prune_channels_on_the_groups_of_heads():
    program = transformer(2)
    name = head_groups(program)["blocks.0.attention"].name
    ours = compress(program, 'remove-heads{keep=["blocks.0.attention=1"],reconstruct=false,criterion=l2}').program
    same = compress(program, f'prune-channels{{keep=["{name}=1"],reconstruct=false,criterion=l2}}').program
    x = torch.randn(1, 1, 12, 12)
    assert torch.equal(ours(x)[0], same(x)[0])


def test_bad_input_is_refused():
    with pytest.raises(OptionError, match="one of the two"):
        compress(transformer(1), "remove-heads")
    with pytest.raises(OptionError, match="write ATTENTION=COUNT"):
        compress(transformer(2), "remove-heads{keep=[blocks.0.attention]}")
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks\.0\.attention'"):
        compress(transformer(2), 'remove-heads{keep=["blocks.0.atention=1"]}')
    with pytest.raises(PassError, match="has 2 heads, so 2 cannot go"):
        compress(transformer(2), "remove-heads{count=2}")
