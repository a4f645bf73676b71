"""Ranks under limits, from pipeline to pipeline, and the verb that prints them."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.ir.errors import OptionError
from graphwright.ir.onnx_export import export_onnx
from graphwright.passes.pipeline import parse
from graphwright.search.cost.bops import products
from graphwright.search.planner import Surroundings
from graphwright.search.problem import InfeasibleError
from graphwright.search.store import Store
from graphwright.tools.cli.options import app
from graphwright.tools.ranks import plan_ranks
from quantize_models import Block, prepared, run
from typer.testing import CliRunner


def wide(width: int = 96):
    return prepared(Block, (1, 5, width), width=width)


def test_the_pipeline_replays_the_plan():
    program, context = wide()
    around = Surroundings(context.calibration)
    pipeline = parse("factorize-lord,quantize,lower-integer")
    plan = plan_ranks(program, pipeline, {"macs": 0.7, "size": 0.8}, "x86:avx2", around)
    assert parse(str(plan.pipeline)) == plan.pipeline
    assert [p.name for p in plan.pipeline] == ["factorize-lord", "quantize", "lower-integer"]
    assert all(int(rule.rpartition("=")[2]) % 16 == 0 for rule in plan.pipeline.passes[0].ranks)  # the target's kernels
    factorized = run(program, str(plan.pipeline), context).program
    macs = [sum(w.macs for w in products(p)) for p in (factorized, program)]
    assert macs[0] == plan.solution.totals["macs"] <= 0.7 * macs[1]


def test_by_measured_time(tmp_path):
    """Whatever the clock says: every rank taken was faster than its layer, and the prediction is within the limit."""
    program, context = wide(64)
    around = Surroundings(context.calibration, store=Store(tmp_path))
    plan = plan_ranks(program, parse("factorize-svd"), {"latency": 1.0}, "cpu", around)
    assert plan.solution.totals["microseconds"] <= plan.whole["microseconds"] * (1 + 1e-9)
    for layer in plan.tables.layers:
        assert (layer.microseconds[:-1] < layer.microseconds[-1]).all()
    # Losing nothing is best where nothing has to be saved.
    assert plan.solution.loss == 0 and str(plan.pipeline) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize", "one factorization, but 'quantize' has 0"),
        ("factorize-svd,factorize-lord", "has 2"),
        ("factorize-svd{ratio=0.5}", "says already how far factorize-svd goes"),
    ],
)
def test_pipelines_that_cannot_be_searched(text, message):
    program, context = wide()
    with pytest.raises(OptionError, match=message):
        plan_ranks(program, parse(text), {"macs": 0.7}, "x86:avx2", Surroundings(context.calibration))


def test_a_limit_below_the_floor_names_the_least_value():
    program, context = wide()
    with pytest.raises(InfeasibleError, match=r"macs: limit .* smallest feasible .* as limits: macs=0\.\d+") as caught:
        plan_ranks(program, parse("factorize-svd"), {"macs": 0.01}, "x86:avx2", Surroundings(context.calibration))
    assert caught.value.smallest["macs"] > 0


def test_the_verb(tmp_path):
    program, context = wide()
    export_onnx(program, tmp_path / "model.onnx")
    samples = np.concatenate([x.numpy() for (x,) in context.calibration.samples])
    np.savez(tmp_path / "calib.npz", **{program.input_specs[0].name: samples})
    arguments = ["ranks", str(tmp_path / "model.onnx"), "--macs", "0.8x", "--calibration", str(tmp_path / "calib.npz")]
    arguments += ["--cache", str(tmp_path / "cache"), "-p", "canonicalize,factorize-svd", "--target", "x86:avx2"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "canonicalize,factorize-svd{ranks=[" in done.output
