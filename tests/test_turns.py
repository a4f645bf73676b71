"""Programs that are timed take turns: a machine that slows down slows all of them."""

from __future__ import annotations

import itertools
import statistics

import pytest
from graphwright.backends.tvm.profile import BURST, LOST, WARM_UP_RUNS, in_turns


def test_a_drift_of_the_clock_hits_all_alike():
    clock = itertools.count()
    calls = [lambda name=name: (name, next(clock)) for name in "ab"]
    found = in_turns(calls, 4 * BURST)
    assert [[name for name, _ in results] for results in found] == [["a"] * 4 * BURST, ["b"] * 4 * BURST]
    times = [[at for _, at in results] for results in found]
    assert all(later > earlier for results in times for earlier, later in itertools.pairwise(results))
    assert statistics.median(times[1]) - statistics.median(times[0]) == BURST + LOST
    assert min(times[0]) == len(calls) * WARM_UP_RUNS + LOST


@pytest.mark.parametrize("count", [1, BURST, 2 * BURST + 3])
def test_one_program_runs_through(count):
    clock = itertools.count()
    (results,) = in_turns([lambda: next(clock)], count)
    assert results == list(range(WARM_UP_RUNS, WARM_UP_RUNS + count))
