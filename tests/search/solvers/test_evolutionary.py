"""EvoPress: finds what single-layer scores do not show, keeps the limits, repeats by seed, and survives kill -9."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from graphwright.ir.errors import OptionError
from graphwright.search.problem import InfeasibleError
from graphwright.search.solvers import evolutionary, ilp
from graphwright.search.store import Store
from graphwright.tools.bench.solvers import network

ROOT = Path(__file__).resolve().parents[3]
SEARCH = {"generations": 8, "offspring": 12, "stages": ((4, 8), (2, 32), (1, 128)), "seed": 3}


def coupled_loss(problem, chosen, samples):
    """What single scores do not show: neighbours lowered together hurt; fewer samples give a noisier value."""
    single = problem.total_loss(chosen)
    together = sum(0.02 * max(0, a - 3) * max(0, b - 3) for a, b in pairwise(chosen))
    noise = np.random.default_rng([samples, *chosen]).normal(0, 0.05 / samples)
    return single + together + float(noise)


def search(problem, **changes):
    return evolutionary.solve(problem, lambda c, n: coupled_loss(problem, c, n), **{**SEARCH, **changes})


def test_it_improves_on_the_integer_program_where_losses_do_not_add_up():
    problem = network(2, items=12)
    start = ilp.solve(problem).chosen
    found = search(problem, generations=25)
    assert found.fitness < 0.95 * coupled_loss(problem, start, 128)
    assert found.fitness == coupled_loss(problem, found.solution.chosen, 128)
    assert problem.meets(found.solution.chosen)
    assert list(found.history) == sorted(found.history, reverse=True), "the parent competes in the last selection"


def test_every_plan_evaluated_meets_the_limits_and_most_only_on_few_samples():
    problem, asked = network(4, items=10), []

    def evaluate(chosen, samples):
        asked.append((chosen, samples))
        return coupled_loss(problem, chosen, samples)

    found = evolutionary.solve(problem, evaluate, **SEARCH)
    assert all(problem.meets(chosen) for chosen, _ in asked)
    assert len(set(asked)) == len(asked) == found.evaluations, "nothing is evaluated twice"
    counts = [sum(n == samples for _, n in asked) for samples in (8, 32, 128)]
    assert counts[0] > 2 * counts[1] > 2 * counts[2]


def test_seeds_repeat_and_differ():
    problem = network(2, items=12)
    assert search(problem) == search(problem)
    assert search(problem) != search(problem, seed=4)


def test_a_loss_that_is_not_a_number_ranks_last():
    problem = network(2, items=6)
    start = ilp.solve(problem).chosen
    found = evolutionary.solve(problem, lambda c, n: 1.0 if c == start else float("nan"), **SEARCH)
    assert found.solution.chosen == start and found.fitness == 1.0


def test_one_plan_within_the_limits_is_its_own_answer():
    problem = network(2, items=3)
    cheapest = replace(problem, limits=tuple(replace(x, most=x.total((7, 7, 7))) for x in problem.limits))
    assert search(cheapest).solution.chosen == (7, 7, 7)


@pytest.mark.parametrize(
    "stages", [(), ((4, 8), (2, 32)), ((4, 8), (4, 16), (1, 32)), ((4, 8), (1, 8)), ((40, 8), (1, 32))], ids=str
)
def test_stages_that_do_not_narrow_down_are_refused(stages):
    with pytest.raises(OptionError, match="must narrow 12 offspring down to 1"):
        search(network(2, items=3), stages=stages)


def test_a_start_above_the_limits_and_limits_without_a_plan_are_refused():
    problem = network(2, items=5)
    with pytest.raises(OptionError, match="exceeds a limit"):
        search(problem, start=(0,) * 5)
    with pytest.raises(InfeasibleError, match="weight_bytes: limit 1"):
        search(replace(problem, limits=(replace(problem.limits[0], most=1.0),)))


# Run by the test below in a process of its own: prints the plan found.
_SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
from graphwright.search.solvers import evolutionary
from graphwright.search.store import Store
from test_evolutionary import SEARCH, coupled_loss, network
problem = network(2, items=12)
def evaluate(chosen, samples):
    time.sleep(0.01)
    return coupled_loss(problem, chosen, samples)
print(evolutionary.solve(problem, evaluate, **SEARCH, store=Store({folder!r}), key="net"))
"""


def test_a_run_killed_in_the_middle_goes_on_and_ends_in_the_same_plan(tmp_path):
    problem = network(2, items=12)
    undisturbed = search(problem)
    paths = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / ".link")]
    script = _SCRIPT.format(paths=paths, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "evaluation"
    deadline = time.monotonic() + 120
    while len(list(kept.glob("*.json"))) < undisturbed.evaluations // 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    before = len(list(kept.glob("*.json")))
    assert before < undisturbed.evaluations, "it was killed in the middle"

    calls = []

    def evaluate(chosen, samples):
        calls.append(chosen)
        return coupled_loss(problem, chosen, samples)

    resumed = evolutionary.solve(problem, evaluate, **SEARCH, store=Store(tmp_path), key="net")
    assert resumed == undisturbed
    assert len(calls) == undisturbed.evaluations - before, "what the killed run had found was not evaluated again"
