"""Choosing the block of a Triton kernel by measurement: the fastest that runs, and only where it clearly beats the guess."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.cuda import measure as measuring
from graphwright.backends.tvm.cuda.kernels import blocks, linear_int8, plan_int8, timing
from graphwright.backends.tvm.kernels.base import Tail
from graphwright.backends.tvm.kernels.layout import to_channels
from graphwright.backends.tvm.kernels.linear_int8 import LinearInt8
from graphwright.backends.tvm.tuning.families import FAMILIES
from graphwright.backends.tvm.tuning.measure import measure
from graphwright.ir.errors import TuningError

SPEC = (LinearInt8(128, 384, 1536, "uint8", 0), Tail("rescale", "uint8", 0, 0, 255), "sm_90")
GUESS = blocks.choose(plan_int8.linear_problem(128, 384, 1536), "sm_90")


class FakeCompiler:
    def start(self, plan):
        done = Future()
        done.set_result("does not fit" if plan.constants["BM"] == 16 else "")
        return done


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which a launch takes what `times` says of its (rows, columns), 10 where it says nothing."""
    times: dict[tuple[int, int], float] = {}
    monkeypatch.setattr(measuring, "compiler", FakeCompiler)
    monkeypatch.setattr(measuring, "machine", lambda: "a GPU")
    monkeypatch.setattr(timing, "operands", lambda plan: [torch.zeros(1)])

    def timed(plan, tensors, repeats):
        taken = times.get((plan.constants["BM"], plan.constants["BN"]), 10.0)
        return taken, "" if taken < float("inf") else "refused"

    monkeypatch.setattr(timing, "timed", timed)
    return times


def measured():
    return measure(linear_int8.build, SPEC, Target("cuda", "sm_90"), 1)


def test_the_fastest_block_that_runs_is_chosen(gpu):
    gpu[(64, 128)], gpu[(16, 16)] = 4.0, 1.0  # the second does not compile
    found = measured()
    assert found.choice is not None and (found.choice["rows"], found.choice["columns"]) == (64, 128)
    assert (found.microseconds, found.guess_microseconds) == (4.0, 10.0)
    assert FAMILIES[linear_int8.build].chosen(SPEC, found.choice)[3].rows == 64


def test_a_block_that_is_hardly_faster_does_not_replace_the_guess(gpu):
    gpu[(64, 128)] = 9.9
    assert measured().choice is None and measured().microseconds == 10.0


def test_a_guess_that_does_not_run_is_an_error_that_names_the_kernel(gpu):
    gpu[(GUESS.rows, GUESS.columns)] = float("inf")
    with pytest.raises(TuningError, match="triton_int8:linear does not run here: refused"):
        measured()


def test_a_kernel_of_another_road_has_no_blocks():
    with pytest.raises(TuningError, match="no Triton kernel"):
        measuring.plan_of(to_channels((1, 3, 4, 4), "float32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_tuning_says_so(monkeypatch):
    monkeypatch.setattr(measuring, "compiler", FakeCompiler)
    with pytest.raises(TuningError, match="no GPU to measure on"):
        measure(linear_int8.build, SPEC, Target("cuda", "sm_90"), 1)
