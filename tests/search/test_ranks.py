"""Rank allocation: plans meet their limits as predicted, replay from text, and never hold a rank that is not faster."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from factorize_models import Convolutions
from graphwright.backends.base import Backend, Compiled, KernelRow, StepTimes
from graphwright.backends.target import Target
from graphwright.ir.errors import OptionError, TargetError
from graphwright.passes.factorize.lord import FactorizeLord
from graphwright.passes.factorize.svd import FactorizeSvd
from graphwright.passes.factorize.tucker import FactorizeTucker
from graphwright.passes.pipeline import Pipeline, parse, pass_text
from graphwright.search.cost.bops import WEIGHTED, multiplications, products
from graphwright.search.cost.ranks import priced
from graphwright.search.cost.uniform import Pricing
from graphwright.search.planner import Surroundings
from graphwright.search.problem import InfeasibleError
from graphwright.search.ranks import WHOLE, Divergence, rank_tables
from graphwright.search.store import Store
from quantize_models import Block, ConvNet, prepared, run

SHAPE = (2, 5, 32)


def tables_of(method=None, model=Block, shape=SHAPE, **options):
    program, context = prepared(model, shape)
    return (
        program,
        context,
        rank_tables(program, method or FactorizeSvd(), Surroundings(context.calibration), **{"multiple": 4, **options}),
    )


@pytest.mark.parametrize("method", [FactorizeSvd(), FactorizeLord(), FactorizeTucker()], ids=lambda m: m.name)
def test_the_plan_meets_its_limits_as_predicted_and_replays_from_text(method):
    program, context, tables = tables_of(method, Convolutions, (2, 3, 16, 16))
    problem = tables.problem({})
    whole = problem.totals([len(row) - 1 for row in problem.choices])
    bytes_before = sum(4 * t.numel() for t in program.parameters().values())
    assert whole == {"weight_bytes": bytes_before, "macs": sum(w.macs for w in products(program))}
    solution, chosen = tables.allocate({"weight_bytes": 0.75 * bytes_before, "macs": 0.8 * whole["macs"]})
    result = run(program, str(parse(pass_text(chosen))), context)
    after = result.program
    biases = 4 * 24 if method.name == "factorize-lord" else 0  # `wide` has no bias before
    reached = sum(4 * t.numel() for t in after.parameters().values())
    assert solution.totals["weight_bytes"] <= reached <= solution.totals["weight_bytes"] + biases
    assert reached <= 0.75 * bytes_before + biases
    assert sum(w.macs for w in products(after)) == solution.totals["macs"] <= 0.8 * whole["macs"]


def test_losses_fall_with_the_rank_and_are_measured_on_the_network():
    program, context, tables = tables_of()
    divergence = Divergence.of(program, context.calibration.samples[:8])
    for layer in tables.layers:
        assert layer.ranks[-1] == WHOLE and layer.loss[-1] == 0
        assert (np.diff(layer.loss) <= 0).all() and (np.diff(layer.weights) > 0).all()
        middle = (len(layer.ranks) - 1) // 2
        cut = run(program, f'factorize-svd{{ranks=["{layer.origin}={layer.ranks[middle]}"]}}', context).program
        assert layer.loss[middle] == pytest.approx(divergence(cut), rel=1e-4)


def test_ranks_by_the_solver_lose_less_than_one_ratio():
    program, context, tables = tables_of(multiple=2, steps=20)
    ratio = run(program, "factorize-svd{ratio=0.6,multiple=2}", context)
    kept = sum(4 * t.numel() for t in ratio.program.parameters().values())
    _, chosen = tables.allocate({"weight_bytes": kept})
    planned = run(program, pass_text(chosen), context).program
    divergence = Divergence.of(program, context.calibration.samples)
    assert sum(4 * t.numel() for t in planned.parameters().values()) <= kept
    assert divergence(planned) < divergence(ratio.program)


def test_results_are_kept(tmp_path):
    program, context = prepared(Block, SHAPE)
    around = Surroundings(context.calibration, store=Store(tmp_path))
    first = rank_tables(program, FactorizeSvd(), around)
    calls = []
    again = rank_tables(program, FactorizeSvd(), replace(around, progress=lambda *a: calls.append(a)))
    assert not calls and all(np.array_equal(a.loss, b.loss) for a, b in zip(first.layers, again.layers, strict=True))


def test_bad_limits_are_named():
    _, _, tables = tables_of()
    with pytest.raises(OptionError, match="no limit 'bytes' on ranks"):
        tables.problem({"bytes": 1.0})
    with pytest.raises(OptionError, match="needs prices"):
        tables.problem({"microseconds": 1.0})
    with pytest.raises(InfeasibleError, match="weight_bytes"):
        tables.allocate({"weight_bytes": 100.0})
    program, _ = prepared(Block, SHAPE)
    with pytest.raises(OptionError, match="calibration samples"):
        rank_tables(program, FactorizeSvd(), Surroundings(None))


# -- the guard: no factorization that does not run faster ------------------------------------------------------------------------


def test_slower_ranks_are_never_chosen():
    _, _, tables = tables_of()
    # The solver would cut fc1 first; only its smallest rank is faster there, and no rank of fc2 is.
    times = {layer.origin: dict.fromkeys(layer.ranks[:-1], 10.0) | {WHOLE: 10.0} for layer in tables.layers}
    smallest = tables.layers[2].ranks[0]
    assert tables.layers[2].origin == "fc1"
    times["fc1"][smallest] = 5.0
    guarded = tables.priced(times, fixed=3.0)
    assert {x.origin: x.ranks for x in guarded.layers if len(x.ranks) > 1} == {"fc1": (smallest, WHOLE)}
    solution, chosen = guarded.allocate({"microseconds": 50.0})
    assert chosen.ranks == (f"fc1={smallest}",) and solution.totals["microseconds"] == 48.0
    assert guarded.allocate({"microseconds": 100.0})[1] is None
    with pytest.raises(InfeasibleError, match="microseconds"):
        guarded.allocate({"microseconds": 47.0})
    unmeasured = {origin: {WHOLE: 10.0} for origin in times}
    assert all(layer.ranks == (WHOLE,) for layer in tables.priced(unmeasured, 0.0).layers)
    with pytest.raises(OptionError, match="no measured time of 'qkv'"):
        tables.priced({origin: {} for origin in times}, 0.0)


class Steps(Backend):
    """A machine that computes outputs 16 at a time, and needs 0.2 us to start a kernel."""

    name = "steps"

    def targets(self):
        return []

    def compile(self, program, target, progress=None):
        nodes = [n for n in program.nodes if n.target in WEIGHTED]
        rows = []
        for node in nodes:
            width = program.parameter(node.args[1]).shape[0]
            rows.append(
                KernelRow(node.name, (node.name,), "designed", multiplications(node) * math.ceil(width / 16) * 16 // width)
            )
        return Compiled(target, b"", tuple(rows))

    def latencies(self, programs, repeats=50):
        raise AssertionError("not asked for")

    def profiles(self, programs, repeats=100, threads=None):
        columns = [tuple(0.2 + row.macs / 1e4 for row in compiled.kernels) for compiled, _ in programs]
        return [StepTimes(times, sum(times) + 7.0) for times in columns]


def pricing(time=True):
    return Pricing(Steps(), Target("x86", "avx512-vnni"), time)


@pytest.mark.parametrize("tail", ["", "quantize,lower-integer"])
def test_times_are_read_off_compiled_programs(tail):
    program, context, tables = tables_of(multiple=4, steps=3)
    found = priced(program, tables, parse(tail) if tail else Pipeline(()), pricing(), Surroundings(context.calibration))
    layers = {layer.origin: layer for layer in found.layers}
    # fc1: 64 x 32 on 10 rows.
    macs = 10 * 64 * 32
    assert layers["fc1"].microseconds[-1] == pytest.approx(0.2 + macs / 1e4)
    for rank, spent in zip(layers["fc1"].ranks[:-1], layers["fc1"].microseconds[:-1], strict=True):
        first, second = 10 * 16 * math.ceil(int(rank) / 16) * 32, 10 * 64 * int(rank)
        assert spent == pytest.approx(0.4 + (first + second) / 1e4)
    assert found.fixed_microseconds == pytest.approx(7.0)
    # Of `proj`, 32 x 32 on 10 rows, rank 12 saves weights and no time.
    unguarded = {layer.origin: layer for layer in tables.layers}["proj"].ranks
    assert "12" in unguarded and "12" not in layers["proj"].ranks


def test_no_time_without_a_machine():
    program, context, tables = tables_of()
    with pytest.raises(TargetError, match="needs? a target that runs here"):
        priced(program, tables, Pipeline(()), pricing(time=False), Surroundings(context.calibration))


def test_backends_say_how_many_channels_their_kernels_take():
    from graphwright.backends.tvm.backend import TVMBackend

    assert Steps().channel_multiple(Target("x86", "avx2")) == 1
    assert TVMBackend().channel_multiple(Target("x86", "avx2")) == 16


def test_divergence_of_classes_and_of_values():
    program, context = prepared(ConvNet, (2, 3, 16, 16))
    samples = context.calibration.samples[:2]
    same = Divergence.of(program, samples)
    assert same.logarithm is not None and same(program) == pytest.approx(0.0, abs=1e-9)
    other = run(program, "factorize-svd{ratio=0.5,multiple=2}", context).program
    p, q = (torch.cat([x(*s)[0] for s in samples]).double().log_softmax(-1) for x in (program, other))
    assert same(other) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
