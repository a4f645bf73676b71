"""optimize() under limits that 8 bits do not meet: every layer gets the format that loses least within them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphwright import optimize
from graphwright.ir.capture import capture
from graphwright.ir.errors import DataError, OptionError, UnknownNameError
from graphwright.ir.program import Stage
from graphwright.passes.pipeline import parse
from graphwright.passes.quantize.annotate import Quantize
from graphwright.search import planner
from graphwright.search.problem import InfeasibleError
from graphwright.search.sensitivity import parse_scorers
from graphwright.tools.analyze import analyze
from graphwright.tools.bit_search import BitSearch
from graphwright.tools.defaults import search_pipeline
from graphwright.tools.plan import Plan
from graphwright.tools.report import ConstraintError
from graphwright.tools.report_page import page
from models import small_cnn, small_inputs

ARGUMENTS = {"example_inputs": small_inputs(), "calibration": [small_inputs(16, seed=1)], "measure": False}


def formats_of(result):
    quantize = next(p for p in parse(result.plan.pipeline) if isinstance(p, Quantize))
    return dict(rule.rpartition("=")[::2] for rule in quantize.weights)


@pytest.fixture(scope="module")
def agreement():
    return agreement_on(small_inputs(64, seed=5))


def agreement_on(x):
    """evaluate: the share of these samples whose class the float model gives too."""
    labels = small_cnn()(x).argmax(1)
    return lambda predict: float((predict(x).argmax(1) == labels).float().mean())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A search whose scores and prices are computed by the first test that needs them."""
    return BitSearch(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def result(shared):
    return optimize(small_cnn(), constraints={"average_bits": 5.0}, search=shared, **ARGUMENTS)


@pytest.fixture(scope="module")
def uniform():
    """8 bits everywhere."""
    return optimize(small_cnn(), **ARGUMENTS)


def test_the_plan_meets_the_limit_with_more_than_one_format(result):
    assert result.program.stage is Stage.INTEGER
    assert result.report.average_bits <= 5.0
    assert len(set(formats_of(result).values())) > 1
    assert result.plan.search["predicted"]["average_bits"] == pytest.approx(result.report.average_bits, abs=1e-3)
    assert result.plan.search["layers"] == formats_of(result)


def test_the_report_shows_the_plan_among_the_best_ones(result):
    search = result.report.search
    assert search.allocation == formats_of(result) and search.metric == "average_bits"
    assert [plan.totals["average_bits"] for plan in (search.front[0], search.front[-1])] == pytest.approx([2.0, 8.0])
    assert search.chosen.loss == pytest.approx(min(p.loss for p in search.front if p.totals["average_bits"] <= 5.0), rel=2e-3)
    text = page(result.report)
    assert "Search: which layer gets which format" in text and "plot-front" in text
    json.dumps(result.report.to_json())


def test_the_plan_replays_to_the_same_program(result, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(result.plan.to_json()))
    plan = Plan.read(path)
    again = optimize(small_cnn(), pipeline=plan.pipeline, seed=plan.seed, search=None, **ARGUMENTS)
    before, after = result.program.parameters(), again.program.parameters()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_plan_for_another_model_is_refused(result):
    program = capture(small_cnn(), small_inputs())
    result.plan.require_model(program)
    moved = program.clone()
    node = next(n for n in moved.nodes if n.op == "get_attr")
    moved.replace_parameter(node, moved.parameter(node).detach() * 2)
    moved.sweep()
    with pytest.raises(OptionError, match="made for 'SmallCNN' with hash|was made for"):
        result.plan.require_model(moved)


def test_eight_bits_stay_where_they_meet_the_limits():
    result = optimize(small_cnn(), constraints={"bops": 0.5}, search=BitSearch(), **ARGUMENTS)
    assert not formats_of(result) and result.report.average_bits == 8.0


def test_fewer_bit_operations_than_eight_bits_need(uniform, shared):
    limit = 0.7 * uniform.report.bops
    result = optimize(small_cnn(), constraints={"bops": limit}, search=shared, **ARGUMENTS)
    assert result.report.bops <= limit


def test_a_smaller_artifact_than_eight_bits_give(uniform, shared):
    size = uniform.artifact.size / uniform.report.rows[0].size_bytes
    least = optimize(small_cnn(), constraints={"average_bits": 2.0}, search=shared, **ARGUMENTS).artifact.size
    limit = (size + least / uniform.report.rows[0].size_bytes) / 2
    result = optimize(small_cnn(), constraints={"size": limit}, **ARGUMENTS)
    assert result.report.reached()["size"] <= limit


def test_one_calibration_image_is_warned_about():
    alone = {**ARGUMENTS, "calibration": [small_inputs(1)]}
    result = optimize(small_cnn(), constraints={"average_bits": 5.0}, **alone)
    assert any("calibration" in note and "interval" in note for note in result.report.notes)


def test_limits_no_plan_meets_are_named_as_they_are_stated(shared):
    with pytest.raises(InfeasibleError, match=r"artifact_bytes.*smallest feasible.*as limits: size=\d"):
        optimize(small_cnn(), constraints={"size": 0.001}, search=shared, **ARGUMENTS)


def test_limits_no_plan_meets_are_named_with_the_smallest_value(shared):
    with pytest.raises(InfeasibleError, match=r"average_bits.*1\.5.*2"):
        optimize(small_cnn(), constraints={"average_bits": 1.5}, search=shared, **ARGUMENTS)


@pytest.mark.parametrize("scorer", ["fisher", "hessian-trace{loss=labels}", "output-distortion{loss=labels}"])
def test_missing_labels_are_noticed_before_the_calibration_data_is_read(scorer):
    def batches():
        raise AssertionError("read")
        yield

    with pytest.raises(DataError, match="needs a label for each calibration sample"):
        optimize(small_cnn(), search=BitSearch(scorer=scorer), **{**ARGUMENTS, "calibration": batches()})
    program = capture(small_cnn(), small_inputs())
    with pytest.raises(DataError, match="needs a label for each calibration sample"):
        analyze(program, parse(search_pipeline(program)), parse_scorers(f"sqnr,{scorer}"), BitSearch(), batches())


def test_without_a_search_a_limit_is_only_checked():
    with pytest.raises(ConstraintError, match="average_bits: limit 5, reached 8"):
        optimize(small_cnn(), constraints={"average_bits": 5.0}, search=None, **ARGUMENTS)


def test_the_least_bits_within_a_drop(agreement, tmp_path):
    search = BitSearch(minimize="average_bits", cache=tmp_path)
    result = optimize(small_cnn(), constraints={"max_drop": 0.1}, evaluate=agreement, search=search, **ARGUMENTS)
    assert result.report.average_bits < 8.0
    assert result.report.reached()["max_drop"] <= 0.1
    assert len(result.report.search.evaluations) > 1, "the report shows each plan the bisection measured"
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    again = optimize(small_cnn(), constraints={"max_drop": 0.1}, evaluate=agreement, search=search, **ARGUMENTS)
    assert again.plan == result.plan
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")} == kept, "a second run computes nothing anew"

    # The float model agrees with itself on any samples: the scores of plans on others must not be taken for these.
    calls, other = [], agreement_on(small_inputs(32, seed=6))
    arguments = {**ARGUMENTS, "evaluate": lambda predict: calls.append(1) or other(predict), "search": search}
    on_others = optimize(small_cnn(), constraints={"max_drop": 0.1}, **arguments)
    assert len(calls) == 2 + len(on_others.report.search.evaluations), "the float model, each plan and the result"


@pytest.mark.parametrize(
    ("search", "limits", "error", "message"),
    [
        (BitSearch(formats=("int9",)), {"average_bits": 4}, OptionError, "'int9' is no weight format"),
        (BitSearch(formats=("int4g64",)), {"average_bits": 4}, OptionError, "compute in float"),
        (BitSearch(formats=()), {"average_bits": 4}, OptionError, "at least one weight format"),
        (BitSearch(scorer="sqrn"), {"average_bits": 4}, UnknownNameError, "did you mean 'sqnr'"),
        (BitSearch(scorer="sqnr,sqnr"), {"average_bits": 4}, OptionError, "takes one scorer"),
        (BitSearch(scorer="activation-trace"), {"average_bits": 4}, OptionError, "scores activations"),
        (BitSearch(solver="lip"), {"average_bits": 4}, UnknownNameError, "did you mean 'ilp'"),
        (BitSearch(minimize="siez"), {}, UnknownNameError, "did you mean 'size'"),
        (BitSearch(minimize="size"), {}, OptionError, "needs the limit max_drop"),
        (BitSearch(minimize="size", solver="greedy"), {}, OptionError, "leave out solver=greedy"),
    ],
)
def test_bad_searches(search, limits, error, message):
    with pytest.raises(error, match=message):
        optimize(small_cnn(), constraints=limits, search=search, **ARGUMENTS)


def test_a_bad_search_is_refused_before_anything_is_computed(monkeypatch):
    from graphwright.tools.job import Job

    monkeypatch.setattr(Job, "run", lambda *_: pytest.fail("8 bits ran before the search was checked"))
    with pytest.raises(OptionError, match="'int9' is no weight format"):
        optimize(small_cnn(), constraints={"size": 0.1}, search=BitSearch(formats=("int9",)), **ARGUMENTS)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("canonicalize", "one quantize pass"),
        ('canonicalize,quantize{weights=["*=int4"]},lower-integer', "names weight formats already"),
        ("canonicalize,quantize", "no lower-integer pass"),
    ],
)
def test_pipelines_that_cannot_be_searched(pipeline, message):
    with pytest.raises(OptionError, match=message):
        optimize(small_cnn(), constraints={"average_bits": 4}, pipeline=pipeline, **ARGUMENTS)


def test_a_search_needs_calibration():
    with pytest.raises(OptionError, match="calibration"):
        optimize(small_cnn(), example_inputs=small_inputs(), constraints={"average_bits": 4}, measure=False)


RUN = """
import sys, torch
from graphwright import optimize
from graphwright.tools.bit_search import BitSearch
sys.path.insert(0, {tests!r})
from models import small_cnn, small_inputs
result = optimize(
    small_cnn(), example_inputs=small_inputs(), calibration=[small_inputs(16, seed=1)], measure=False,
    constraints={{"average_bits": 4.0}}, search=BitSearch(scorer="hessian-trace", cache={cache!r}),
    progress=lambda done, total, what: print(what, done, flush=True),
)
"""


def test_a_run_killed_twice_resumes_to_the_same_plan(tmp_path):
    code = RUN.format(tests=str(Path(__file__).parent), cache=str(tmp_path / "killed"))
    for stage in ("score: hessian-trace 3", "price formats 1"):
        killed = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
        assert killed.stdout is not None
        assert any(line.strip() == stage for line in killed.stdout), "killed too late"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    plans = [
        optimize(
            small_cnn(), constraints={"average_bits": 4.0}, search=BitSearch(scorer="hessian-trace", cache=cache), **ARGUMENTS
        )
        for cache in (tmp_path / "killed", tmp_path / "whole")
    ]
    assert plans[0].plan.pipeline == plans[1].plan.pipeline


def test_evolution_starts_from_the_integer_program_and_keeps_the_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(planner, "GENERATIONS", 3)
    monkeypatch.setattr(planner, "OFFSPRING", 9)
    search = BitSearch(solver="evolutionary", cache=tmp_path)
    result = optimize(small_cnn(), constraints={"average_bits": 5.0}, search=search, **ARGUMENTS)
    assert result.report.average_bits <= 5.0 and len(set(formats_of(result).values())) > 1
    assert list((tmp_path / "evaluation").glob("*.json")), "a killed run goes on from what it evaluated"
