"""Times every block of a Triton kernel on this machine's GPU and says whether one beats the analytical guess.

Every block computes the same bits or, of floats, numbers within the same bound, so all that can differ is time. A block that does
not compile or does not fit the chip is left out; the guess must run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....ir.errors import TuningError
from .kernels import timing
from .kernels.plans import Buffer, Plan
from .launch import TritonCall, call_before, triton_call

#: A choice replaces the guess where it takes less than this share of the guess's time.
NOISE = 0.97

#: Graphs timed for each block; the least time and the median count.
REPEATS = 9

Choice = dict[str, int | bool]


@dataclass(frozen=True)
class Timed:
    """choice: None where the guess stays. Microseconds of the winner and of the guess; candidates: blocks that ran."""

    choice: Choice | None
    microseconds: float
    guess_microseconds: float
    candidates: int


def plan_of(function: Any) -> Plan:
    """The launch that a function of the Relax module stands for."""
    call = triton_call(function)
    if call is None:
        buffers = ", ".join(str(p.name) for p in function.params)
        raise TuningError(f"the kernel of ({buffers}) is no Triton kernel: it has no blocks to choose from")
    buffers = [(str(p.name), tuple(int(d) for d in p.shape), str(p.dtype)) for p in function.params]
    before = call_before(function)
    if before is None:
        return _plan(call, buffers, None)
    first, scratch = before
    return _plan(call, [scratch, *buffers[1:]], _plan(first, [buffers[0], scratch], None))


def _plan(call: TritonCall, buffers: Sequence[Buffer], first: Plan | None) -> Plan:
    return Plan(call.function, dict(call.constants), call.grid, tuple(buffers), call.warps, call.stages, first)


@functools.cache
def compiler() -> timing.Compiler:
    """One pool of compiling processes for the whole run; forked before this process touches the GPU."""
    return timing.Compiler()


def machine() -> str:
    """The GPU's name. Raises TuningError where torch sees none."""
    compiler()  # its processes must not inherit a GPU that was touched
    if not torch.cuda.is_available():
        raise TuningError("no GPU to measure on: this torch sees none; tune on the machine that will run the program")
    return torch.cuda.get_device_name()


def measure(choices: Sequence[Choice], build: Callable[[Choice | None], Any]) -> Timed:
    """Times the guess, build(None), and each of `choices`.

    Raises:
        TuningError: no GPU, or the guess does not run on it.
    """
    plans = {None: plan_of(build(None))} | {tuple(choice.items()): plan_of(build(choice)) for choice in choices}
    machine()
    futures = {name: compiler().start(plan) for name, plan in plans.items()}
    tensors = timing.operands(plans[None])
    times: dict[Any, float] = {}
    for name, plan in plans.items():
        error = futures[name].result()
        taken, error = (float("inf"), error) if error else timing.timed(plan, tensors, REPEATS)
        if error and name is None:
            raise TuningError(f"the guessed block of {plan.function} does not run here: {error}")
        if not error:
            times[name] = taken
    best = min(times, key=lambda name: times[name])
    if times[best] > NOISE * times[None]:
        best = None
    return Timed(None if best is None else dict(best), times[best], times[None], len(times))
