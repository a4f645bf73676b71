"""optimize() under a limit on multiply-accumulates: channels are cut first, and everything else goes on from there."""

from __future__ import annotations

import json

import pytest
import torch
from graphwright import optimize
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.program import Stage
from graphwright.passes.pipeline import parse
from graphwright.passes.prune.prune_channels import PruneChannels
from graphwright.search import channels
from graphwright.search.problem import InfeasibleError
from graphwright.tools import optimize as module
from graphwright.tools.bit_search import BitSearch
from graphwright.tools.finetune import Finetune
from graphwright.tools.plan import Plan
from models import small_inputs
from torch import nn


class Net(nn.Module):
    """Two groups of channels that can be cut, `a` and `b`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


ARGUMENTS = {"example_inputs": small_inputs(), "calibration": [small_inputs(16, seed=1)], "measure": False}


def counts(pipeline):
    prune = next(p for p in parse(str(pipeline)) if isinstance(p, PruneChannels))
    return {name: int(count) for name, _, count in (item.rpartition("=") for item in prune.keep)}


@pytest.fixture(scope="module")
def result():
    return optimize(Net(), constraints={"macs": 0.6}, **ARGUMENTS)


def test_channels_are_cut_to_the_limit_and_the_rest_gets_8_bits(result):
    assert result.program.stage is Stage.INTEGER and result.report.average_bits == 8.0
    assert 0.3 < result.report.macs <= 0.6 and result.report.reached()["macs"] == result.report.macs
    assert [p.name for p in parse(result.plan.pipeline)][:3] == ["canonicalize", "prune-channels", "equalize"]
    decided = result.plan.search["channels"]
    assert {name: after for name, (_, after) in decided["counts"].items()} == counts(result.plan.pipeline)
    assert decided["predicted"]["macs"] == pytest.approx(result.report.macs, abs=1e-3)
    assert result.report.bops == pytest.approx(result.report.macs / 16, rel=1e-6), (
        "relative to the float model, not to what is left"
    )


def test_the_plan_replays_to_the_same_program(result, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(result.plan.to_json()))
    plan = Plan.read(path)
    again = optimize(Net(), pipeline=plan.pipeline, seed=plan.seed, search=None, **ARGUMENTS)
    before, after = result.program.parameters(), again.program.parameters()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_a_number_above_one_counts_multiply_accumulates(result):
    whole = sum(x.macs for x in _products())
    assert counts(optimize(Net(), constraints={"macs": int(0.6 * whole)}, **ARGUMENTS).plan.pipeline) == counts(
        result.plan.pipeline
    )


def _products():
    from graphwright.ir.capture import capture
    from graphwright.search.cost.bops import products

    return products(capture(Net(), small_inputs()))


def test_bits_are_searched_on_the_smaller_network_and_fine_tuning_stands_between():
    tuning = Finetune(data=[small_inputs(32, seed=7)], device="cpu", batch_size=16)
    limits = {"macs": 0.6, "average_bits": 5.0}
    result = optimize(Net(), constraints=limits, finetune=tuning, **ARGUMENTS)
    assert result.report.macs <= 0.6 and result.report.average_bits <= 5.0
    names = [p.name for p in parse(result.plan.pipeline)]
    assert names[:3] == ["canonicalize", "prune-channels", "distill"] and {"channels", "layers"} <= set(result.plan.search)


def test_the_pipeline_says_where_and_how(result):
    text = "canonicalize,prune-channels{criterion=l2,reconstruct=false,ignore=[a]},quantize,lower-integer"
    found = optimize(Net(), constraints={"macs": 0.8}, pipeline=text, **ARGUMENTS)
    prune = next(p for p in parse(found.plan.pipeline) if isinstance(p, PruneChannels))
    assert (prune.criterion, prune.reconstruct) == ("l2", False) and set(counts(found.plan.pipeline)) == {"b"}


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    search = BitSearch(cache=tmp_path)
    first = optimize(Net(), constraints={"macs": 0.6}, search=search, **ARGUMENTS)
    assert any(path.is_file() for path in (tmp_path / "channels").iterdir())

    def refuse(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(channels, "reconstruct", refuse)
    again = optimize(Net(), constraints={"macs": 0.6}, search=search, **ARGUMENTS)
    assert again.plan.pipeline == first.plan.pipeline


def test_a_killed_search_goes_on(tmp_path, monkeypatch):
    measured = []

    class Killed(Exception):
        pass

    real = channels.reconstruct

    def counted(*arguments, **options):
        if len(measured) == 3:
            raise Killed
        measured.append(None)
        return real(*arguments, **options)

    search = BitSearch(cache=tmp_path)
    monkeypatch.setattr(channels, "reconstruct", counted)
    with pytest.raises(Killed):
        optimize(Net(), constraints={"macs": 0.6}, search=search, **ARGUMENTS)
    assert len(list((tmp_path / "channels").iterdir())) == 1, "two counts of the first group, one of the second"


@pytest.mark.parametrize(
    ("limit", "options", "error", "message"),
    [
        (1e-4, {}, InfeasibleError, r"macs: limit .*, smallest feasible .* as limits: macs=0\.0\d+"),
        (0.0, {}, InfeasibleError, "smallest feasible"),
        (float("nan"), {}, OptionError, "'macs' .* at least 0, not nan"),
        ("half", {}, OptionError, "must be a number"),
        (0.5, {"pipeline": "canonicalize,prune-channels{ratio=0.5},quantize"}, OptionError, "has a ratio or counts already"),
        (0.5, {"pipeline": "canonicalize,prune-channels,prune-channels,quantize"}, OptionError, "one prune-channels"),
        (0.5, {"calibration": None}, PassError, "needs calibration"),
    ],
)
def test_limits_that_cannot_be_met(limit, options, error, message):
    with pytest.raises(error, match=message):
        optimize(Net(), constraints={"macs": limit}, **{**ARGUMENTS, **options})


def test_the_limits_are_listed():
    assert "macs" in module.CONSTRAINTS
