"""reduce-tokens: equal to a plain implementation of token merging, exact on equal tokens, refused where it cannot be right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from block_models import Transformer, canonical, compress, transformer, transformer_module
from graphwright.backends.loader import load
from graphwright.ir.batch import with_batch
from graphwright.ir.data import Calibration
from graphwright.ir.dialect import gw
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.program import shape_of
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.prune.token_axis import find_attentions, protected_tokens
from graphwright.tools.optimize import optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def plain(
    model: Transformer, x: torch.Tensor, merge: tuple[int, ...], prune: tuple[int, ...], proportional: bool
) -> torch.Tensor:
    """One image through the network with merging and dropping, token by token."""
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    protected = int(model.readout == "class")
    if protected:
        tokens = torch.cat([model.first, tokens], 1)
    y = (tokens + model.position)[0]
    size = torch.ones(len(y))
    for block, m, p in zip(model.blocks, merge, prune, strict=True):
        attention = block.attention
        qkv = attention.qkv(block.norm1(y)).reshape(len(y), 3, attention.heads, -1).permute(1, 2, 0, 3)
        scores = qkv[0] @ qkv[1].transpose(1, 2) / qkv.shape[-1] ** 0.5
        weights = (scores + (size.log() if proportional else 0.0)).softmax(-1)
        y = y + attention.proj((weights @ qkv[2]).transpose(0, 1).flatten(1))
        keys = qkv[1]
        if p:
            score = weights[:, : 1 if protected else None].mean((0, 1))
            score[:protected] = torch.inf
            kept = score.topk(len(y) - p).indices.sort().values
            y, size, keys = y[kept], size[kept], keys[:, kept]
        unit = F.normalize(keys.mean(0), dim=-1)
        edges = []
        for a in range(0, len(y), 2):
            b = max((b for b in range(1, len(y), 2) if b >= protected), key=lambda b: float(unit[a] @ unit[b]))
            if a >= protected:
                edges.append((float(unit[a] @ unit[b]), a, b))
        into = {a: b for _, a, b in sorted(edges, reverse=True)[:m]}
        parts = [[t, *(a for a, b in into.items() if b == t)] for t in range(len(y)) if t not in into]
        y = torch.stack([(y[part] * size[part, None]).sum(0) / size[part].sum() for part in parts])
        size = torch.stack([size[part].sum() for part in parts])
        y = y + block.fc2(block.gelu(block.fc1(block.norm2(y))))
    y = model.norm(y)
    return model.head(y[0] if protected else (y * size[:, None]).sum(0) / size.sum())


small = st.integers(0, 1)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.sampled_from(["mean", "class"]), st.booleans(), st.tuples(*[st.integers(0, 2)] * 2, small), st.tuples(small, small, small)
)
def test_equal_to_a_plain_implementation(readout, proportional, merge, prune):
    merge = merge if any((*merge, *prune)) else (1, 0, 0)
    model, program = transformer_module(3, readout, batch=2)
    counts = [",".join(map(str, numbers)) for numbers in (merge, prune)]
    text = f"reduce-tokens{{merge=[{counts[0]}],prune=[{counts[1]}],proportional={str(proportional).lower()}}}"
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    result = compress(program, text, calibrated=False).program
    with torch.no_grad():
        expected = torch.stack([plain(model, image[None], merge, prune, proportional) for image in x])
    torch.testing.assert_close(result(x)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("readout", ["mean", "class"])
def test_merging_equal_tokens_changes_nothing(readout):
    torch.manual_seed(0)
    model = Transformer(3, readout)
    with torch.no_grad():
        model.position.zero_()
    program, x = canonical(model, 1, 1, 12, 12), torch.full((1, 1, 12, 12), 0.7)
    merged = compress(program, "reduce-tokens{per_layer=2}", calibrated=False)
    torch.testing.assert_close(merged.program(x)[0], program(x)[0], atol=1e-5, rtol=1e-5)
    left, protected = (4, 1) if readout == "class" else (3, 0)
    assert merged.certificate[-1].stats == {"merged": "2, 2, 2", "pruned": 0, "tokens": left, "protected": protected}
    without = compress(program, "reduce-tokens{per_layer=2,proportional=false}", calibrated=False).program
    assert readout == "mean" or not torch.allclose(without(x)[0], program(x)[0], atol=1e-5)


def test_layers_behind_compute_on_fewer_tokens():
    program = compress(transformer(3, batch=2), "reduce-tokens{merge=[3],prune=[0,2]}").program
    assert [shape_of(n)[2] for n in program.nodes if n.target is torch.ops.aten.softmax.int] == [9, 6, 4]


def test_the_integer_artifact_has_the_bits_of_its_program(tmp_path):
    x = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    text = "canonicalize,reduce-tokens{merge=[2,2],prune=[1,0]},quantize,align-scales,lower-integer"
    result = optimize(transformer(2), pipeline=text, calibration=[x[:4]], measure=False)
    result.artifact.save(tmp_path / "model.gw")
    model = load(tmp_path / "model.gw")
    assert {gw.match_tokens.default, gw.keep_tokens.default} <= {n.target for n in result.program.nodes}
    for image in x:
        np.testing.assert_array_equal(np.asarray(model(image[None].numpy())), result.program(image[None])[0].numpy())


@pytest.mark.parametrize("readout", ["mean", "class"])
def test_a_free_batch_stays_free(readout):
    text = "reduce-tokens{merge=[2,1,1],prune=[0,1]}"
    fixed, free = (compress(transformer_module(3, readout, 2, free)[1], text).program for free in (False, True))
    assert free.input_specs[0].shape[0] is None
    x = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    many = free(x)[0]
    torch.testing.assert_close(many, torch.cat([fixed(x[i : i + 2])[0] for i in (0, 2)] + [fixed(x[3:])[0][1:]]))
    torch.testing.assert_close(with_batch(free, 2)(x[:2])[0], many[:2])


def test_a_batch_of_as_many_as_there_are_tokens_is_no_token_axis():
    """Sizes are compared as symbols: as numbers, a batch of 9 would be taken for the 9 tokens, and be fixed."""
    program = compress(transformer_module(2, "mean", 9, free=True)[1], "reduce-tokens{merge=[3,1]}").program
    assert [program(torch.randn(n, 1, 12, 12))[0].shape for n in (1, 9)] == [(1, 5), (9, 5)]


def test_distill_trains_what_lost_tokens():
    program = transformer_module(3, "mean", 2, free=True)[1]
    x = torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    context = PassContext(calibration=Calibration.for_program(program, [x]))
    text = "reduce-tokens{per_layer=3},distill{epochs=8,batch_size=16,learning_rate=0.003,loss=squared}"
    result = PassManager().run(program, parse(text), context)
    stats = result.certificate[-1].stats
    assert stats["samples"] == 64 and stats["held_out_after"] < stats["held_out_before"]
    tables = [value for name, value in result.program.parameters().items() if name.startswith("log_sizes")]
    assert tables, "attentions behind merged tokens look up the logarithm of their size"
    for table in tables:  # a function, which training leaves alone
        torch.testing.assert_close(table[1:, 0], torch.arange(1.0, len(table)).log())


def test_an_artifact_for_a_batch_is_made_of_a_free_one(tmp_path):
    x = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    free = transformer_module(2, "class", 2, free=True)[1]
    context = PassContext(calibration=Calibration.for_program(free, [x]))
    text = "reduce-tokens{merge=[2,2],prune=[1,0]},quantize,align-scales,lower-integer"
    integer = PassManager().run(free, parse(text), context).program
    optimize(with_batch(integer, 4), pipeline="", measure=False).artifact.save(tmp_path / "model.gw")
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "model.gw")(x.numpy())), integer(x)[0].numpy())


class Flat(nn.Module):
    """A transformer whose head reads every token at its place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer(1)
        self.head = nn.Linear(9 * 8, 3)

    def forward(self, x):
        tokens = self.body.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.body.blocks(tokens).flatten(1))


def test_bad_input_is_refused():
    with pytest.raises(OptionError, match="say how many tokens go"):
        compress(transformer(1), "reduce-tokens")
    with pytest.raises(OptionError, match="give one of them"):
        compress(transformer(1), "reduce-tokens{per_layer=2,merge=[1]}")
    with pytest.raises(PassError, match="counts for 3 attentions, but 'test' has 2"):
        compress(transformer(2), "reduce-tokens{merge=[1,1,1]}")
    with pytest.raises(PassError, match=r"cannot drop 0 and merge 6 \(at most 5"):
        compress(transformer(2), "reduce-tokens{merge=[6]}")
    torch.manual_seed(0)
    flat = canonical(Flat(), 1, 1, 12, 12)
    with pytest.raises(PassError, match=r"reads the tokens of 'test'.*say protected=N"):
        compress(flat, "reduce-tokens{merge=[1]}")
    with pytest.raises(PassError, match="folds the tokens into another axis|needs all 9 tokens"):
        compress(flat, "reduce-tokens{merge=[1],protected=0}")
    with pytest.raises(PassError, match="no attention"):
        compress(canonical(nn.Sequential(nn.Linear(4, 4)), 1, 4), "reduce-tokens{merge=[1]}", calibrated=False)


def test_what_is_read_is_protected():
    for readout, expected in (("mean", 0), ("class", 1)):
        program = transformer(2, readout)
        assert protected_tokens(program, find_attentions(program)[-1]) == expected
