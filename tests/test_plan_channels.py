"""Channels under limits, from pipeline to pipeline, and the verb that prints them."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.onnx_export import export_onnx
from graphwright.passes.pipeline import Pipeline, parse
from graphwright.passes.prune.coupling import coupled_groups
from graphwright.search.channels import macs_of
from graphwright.search.planner import Surroundings
from graphwright.search.problem import InfeasibleError
from graphwright.tools.channels import plan_channels
from graphwright.tools.cli.options import app
from quantize_models import prepared, run
from torch import nn
from typer.testing import CliRunner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize(("multiple", "step"), [(None, 16), (4, 4)])
def test_the_pipeline_replays_the_plan(multiple, step):
    program, context = prepared(Net, (1, 3, 8, 8))
    pipeline = parse("prune-channels{criterion=l2},quantize,lower-integer")
    plan = plan_channels(program, pipeline, {"macs": 0.5, "size": 0.6}, "x86:avx2", Surroundings(context.calibration), multiple)
    assert parse(str(plan.pipeline)) == plan.pipeline
    assert [p.name for p in plan.pipeline] == ["prune-channels", "quantize", "lower-integer"]
    assert plan.plan.counts.keys() == plan.sizes.keys() == {"a", "b"}
    assert all(count % step == 0 for count in plan.plan.counts.values())
    pruned = run(program, str(Pipeline(plan.pipeline.passes[:1])), context)
    assert {g.name: g.size for g in coupled_groups(pruned.program) if not g.pinned} == plan.plan.counts
    assert macs_of(pruned.program) == pytest.approx(plan.plan.totals["macs"]) and plan.whole["macs"] == macs_of(program)
    assert macs_of(pruned.program) <= 0.5 * macs_of(program)


def test_a_limit_on_latency_stands_alone_and_is_measured():
    program, context = prepared(Net, (1, 3, 8, 8))
    around = Surroundings(context.calibration)
    with pytest.raises(OptionError, match="searched by itself"):
        plan_channels(program, parse("prune-channels"), {"latency": 0.9, "macs": 0.5}, "cpu", around)
    with pytest.raises(OptionError, match="does not run on this machine"):
        plan_channels(program, parse("prune-channels"), {"latency": 0.9}, "arm64:cortex-a72", around)


@pytest.mark.parametrize(
    ("text", "limit", "error", "message"),
    [
        ("quantize", 0.5, OptionError, "one prune-channels, but 'quantize' has 0"),
        ("prune-channels{ratio=0.5}", 0.5, OptionError, "has a ratio or counts already"),
        (
            "prune-channels",
            1e-6,
            InfeasibleError,
            r"smallest feasible .* as limits: macs=0.* \(counts are multiples of 16 here\)",
        ),
        ("prune-channels{ignore=[a,b]}", 0.5, OptionError, "no group of channels that can be cut"),
    ],
)
def test_searches_that_cannot_be_made(text, limit, error, message):
    program, context = prepared(Net, (1, 3, 8, 8))
    with pytest.raises(error, match=message):
        plan_channels(program, parse(text), {"macs": limit}, "x86:avx2", Surroundings(context.calibration))


def test_data_is_asked_for():
    program, _ = prepared(Net, (1, 3, 8, 8))
    with pytest.raises(PassError, match="needs calibration data"):
        plan_channels(program, parse("prune-channels"), {"macs": 0.5}, "x86:avx2", Surroundings(None))


def test_the_verb_prints_a_pipeline_that_parses(tmp_path):
    import numpy as np

    program, _ = prepared(Net, (1, 3, 8, 8))
    export_onnx(program, tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32))
    arguments = ["channels", str(tmp_path / "net.onnx"), "--calibration", str(tmp_path / "x.npz")]
    done = CliRunner().invoke(app, [*arguments, "--macs", "0.5x", "-p", "canonicalize,prune-channels{criterion=l1}"])
    assert done.exit_code == 0, done.output
    line = done.stdout.strip().splitlines()[-1]
    assert [p.name for p in parse(line)] == ["canonicalize", "prune-channels"] and "keep=" in line
    missing = CliRunner().invoke(app, arguments)
    assert isinstance(missing.exception, OptionError) and "name at least one limit" in str(missing.exception)
