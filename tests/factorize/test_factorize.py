"""The data-free factorizations as passes: what they take, how ranks are chosen, what they leave alone and say so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from factorize_models import Convolutions, largest_difference, layers_of
from graphwright.ir.errors import OptionError, UnknownNameError
from graphwright.ir.program import Stage, origin_of
from graphwright.passes.fold.merge_linear import MergeLinear
from graphwright.passes.fold.merge_pointwise_conv import MergePointwiseConv
from graphwright.passes.pipeline import parse
from quantize_models import Block, prepared, run, seeded, targets
from torch import nn

SHAPE = (2, 3, 16, 16)
METHODS = ["factorize-svd", "factorize-spatial", "factorize-tucker"]


@pytest.mark.parametrize("method", METHODS)
def test_really_smaller_and_still_plain_layers(method):
    program, context = prepared(Convolutions, SHAPE)
    result = run(program, f"{method}{{ratio=0.7,multiple=4}}", context)
    row = result.certificate[-1]
    assert row.stage == "compressed" and result.program.stage is Stage.COMPRESSED
    assert set(targets(result.program)) == set(targets(program))
    assert row.stats["layers"] == 5
    assert row.stats["weights"] <= 0.7 * row.stats["weights_before"]
    whole = sum(t.numel() for t in program.parameters().values())
    assert sum(t.numel() for t in result.program.parameters().values()) == whole - (
        row.stats["weights_before"] - row.stats["weights"]
    )
    assert 0 < largest_difference(program, result.program, SHAPE) < 1.0


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_whole_is_said(method):
    program, context = prepared(Convolutions, SHAPE)
    whole = run(program, f'{method}{{ratio=0.7,multiple=4,skip=["wi*"]}}', context).certificate[-1].stats["whole"]
    assert "16 groups" in whole["depthwise"]
    assert whole["up"] == "transposed convolution"
    assert whole["wide"] == "skipped"


def test_a_ratio_below_the_least_rank_is_said():
    program, context = prepared(Block, (2, 5, 32))
    whole = run(program, "factorize-svd{ratio=0.3,multiple=16}", context).certificate[-1].stats["whole"]
    assert whole["fc1"] == "no rank that is a multiple of 16 keeps 0.3 of its weights"


@pytest.mark.parametrize("method", METHODS)
def test_explicit_ranks_replay_what_energy_chose(method):
    program, context = prepared(Convolutions, SHAPE)
    first = run(program, f"{method}{{energy=0.8,multiple=2}}", context)
    stats = first.certificate[-1].stats
    assert stats["layers"] >= 2 and max(stats["errors"].values()) <= 0.2 + 1e-6
    rules = ",".join(f'"{origin}={rank}"' for origin, rank in stats["ranks"].items())
    text = f"{method}{{ranks=[{rules}]}}"
    assert str(parse(str(parse(text)))) == str(parse(text))
    second = run(program, text, context)
    assert second.certificate[-1].stats["ranks"] == stats["ranks"]
    assert largest_difference(first.program, second.program, SHAPE) == 0.0


def test_the_last_matching_rule_counts_and_other_layers_stay_whole():
    program, context = prepared(Block, (2, 5, 32))
    stats = run(program, 'factorize-svd{ranks=["fc*=8","fc2=4"]}', context).certificate[-1].stats
    assert stats["ranks"] == {"fc1": "8", "fc2": "4"}
    assert stats["whole"]["qkv"] == "no rule in 'ranks'"


def test_origins_of_the_thin_layers_tell_them_apart():
    program, context = prepared(Block, (2, 5, 32))
    changed = run(program, 'factorize-svd{ranks=["fc1=8"]}', context).program
    assert [origin_of(layer.node) for layer in layers_of(changed)] == ["qkv", "proj", "fc1.0", "fc1.1", "fc2", "head"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('factorize-svd{ranks=["fc1=33"]}', "'fc1' is larger than its full rank 32"),
        ('factorize-svd{ranks=["fc1=0"]}', "least rank is 1"),
        ('factorize-svd{ranks=["fc1=8x4"]}', "takes 1 number"),
        ('factorize-svd{ranks=["fc1"]}', "write LAYER=RANK"),
        ('factorize-svd{ranks=["fc1=half"]}', "write LAYER=RANK"),
        ('factorize-svd{ranks=["fc9=8"]}', "name in 'ranks' of factorize-svd: 'fc9'"),
        ('factorize-svd{ratio=0.5,skip=["fc9"]}', "name in 'skip' of factorize-svd: 'fc9'"),
        ("factorize-svd", "exactly one of the options"),
        ("factorize-svd{ratio=0.5,energy=0.9}", "ratio and energy"),
        ("factorize-svd{ratio=1.0}", "must lie in (0, 1)"),
        ("factorize-svd{energy=0.0}", "must lie in (0, 1)"),
        ("factorize-svd{ratio=0.5,multiple=0}", "at least 1"),
    ],
)
def test_bad_options_are_named(text, message):
    program, context = prepared(Block, (2, 5, 32))
    with pytest.raises((OptionError, UnknownNameError), match=message.replace("(", r"\(").replace(")", r"\)")):
        run(program, text, context)


def test_a_rank_that_saves_nothing_is_not_made():
    program, context = prepared(Block, (2, 5, 32))
    result = run(program, 'factorize-svd{ranks=["fc1=24"]}', context)
    assert result.certificate[-1].stats["layers"] == 0
    assert result.program.parameters().keys() == program.parameters().keys()
    assert "rank 24 saves no weights" in result.certificate[-1].stats["whole"]["fc1"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_shared_weights_stay_shared():
    program, context = prepared(Tied, (2, 32))
    stats = run(program, "factorize-svd{ratio=0.5}", context).certificate[-1].stats
    assert stats["layers"] == 0 and set(stats["whole"].values()) == {"its weight has 2 readers"}


@pytest.mark.parametrize("method", METHODS)
def test_merge_passes_leave_factors_apart(method):
    program, context = prepared(Convolutions, SHAPE)
    changed = run(program, f"{method}{{ratio=0.8,multiple=1}}", context).program
    for merge in (MergeLinear(), MergePointwiseConv()):
        assert not merge.run(changed.clone(), context).modified


def test_options_are_those_of_the_base():
    options = {f.name: f.default for f in dataclasses.fields(parse("factorize-svd").passes[0])}  # type: ignore[arg-type]
    assert options == {"ratio": None, "energy": None, "ranks": (), "skip": (), "multiple": 8}
    assert seeded(Block).qkv.weight.shape == (96, 32)
