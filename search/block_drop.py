"""Evolutionary block dropping (EvoPress, Sieberling et al. 2024, arXiv:2410.14649, section 4.1): which blocks go, by whole plans.

Scores of single blocks do not add up: a set of blocks with a smaller sum of scores can hurt more. So each set is really run. The
plan is the pass that carries it out, `remove-blocks{blocks=[...]}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ..ir.batch import over_samples
from ..ir.content import content_key
from ..ir.data import Calibration
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import PassContext
from ..passes.pipeline import pass_text
from ..passes.prune.block_scores import block_influence
from ..passes.prune.blocks import Block, Unit, find_blocks
from ..passes.prune.remove_blocks import RemoveBlocks
from .cost.bops import multiplications, products
from .problem import Limit, Problem
from .sensitivity.loss import choose
from .sensitivity.network import Values
from .solvers import evolutionary
from .store import Store

DROP, KEEP = 0, 1

#: Samples run at once.
CHUNK = 8


@dataclass(frozen=True)
class Dropped:
    """names: what goes, in graph order; pipeline: the pass that leaves it out; the rest as `evolutionary.Evolved` says."""

    names: tuple[str, ...]
    pipeline: str
    fitness: float
    evaluations: int


class DropLoss:
    """(chosen, samples) -> mean loss of the network without the blocks whose choice is DROP, on its first samples.

    The loss needs no labels: KL divergence from the whole network's class probabilities in nats, or the relative squared error of
    outputs that are no classes.
    """

    def __init__(self, program: Program, blocks: Sequence[Block], samples: Calibration) -> None:
        self.program, self.blocks = program, tuple(blocks)
        self.loss = choose("auto", program)
        self._inputs = tuple(torch.stack(column) for column in zip(*samples.samples, strict=True))
        kept = (KEEP,) * len(self.blocks)
        parts = [self._run(i, self.samples, lambda x: self.loss.target(self._values(x, kept), None)) for i in self._chunks()]
        self._targets = tuple(map(torch.cat, zip(*parts, strict=True)))

    @property
    def samples(self) -> int:
        return len(self._inputs[0])

    def __call__(self, chosen: Sequence[int], samples: int) -> float:
        samples = min(samples, self.samples)

        def one(inputs: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return self.loss.value(self._values(inputs, chosen), target)

        parts = [self._run(first, samples, one, self._targets) for first in range(0, samples, CHUNK)]
        return sum(float(part.double().sum()) for part in parts) / samples

    def _chunks(self) -> range:
        return range(0, self.samples, CHUNK)

    def _values(self, inputs: tuple[torch.Tensor, ...], chosen: Sequence[int]) -> Values:
        """The values on one sample; the exit of a block that goes has the value of its entry."""
        gone = [block for block, choice in zip(self.blocks, chosen, strict=True) if choice == DROP]
        entry = {block.exit: block.entry for block in gone}
        skipped = {node for block in gone for node in block.nodes}
        found: Values = dict(zip(self.program.inputs, inputs, strict=True))
        for node in self.program.nodes:
            if node in entry:
                found[node] = found[entry[node]]
            elif node.op == "get_attr":
                found[node] = self.program.parameter(node)
            elif node.op == "call_function" and node not in skipped:
                args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)  # type: ignore[misc]
                found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return found

    def _run(self, first: int, end: int, function: Callable, *beside: tuple[torch.Tensor, ...]):
        part = slice(first, min(first + CHUNK, end))
        with torch.no_grad():
            return over_samples(function, *(tuple(x[part] for x in values) for values in (self._inputs, *beside)))


def problem_of(program: Program, blocks: Sequence[Block], influence: Sequence[float], macs: float) -> Problem:
    """One item a block, to drop or to keep; at most `macs` of the program's multiply-accumulates. Loss: the block's influence."""
    whole = float(sum(work.macs for work in products(program)))
    counted = {work.node for work in products(program)}
    costs = [float(sum(multiplications(n) for n in block.nodes if n in counted)) for block in blocks]
    limit = Limit("macs", tuple(np.array([0.0, c]) for c in costs), macs * whole, whole - sum(costs))
    loss = tuple(np.array([score, 0.0]) for score in influence)
    return Problem(tuple(b.name for b in blocks), (("drop", "keep"),) * len(costs), loss, (limit,))


def drop_blocks(
    program: Program,
    samples: Calibration,
    macs: float,
    *,
    unit: Unit = "branch",
    generations: int = 20,
    offspring: int = 16,
    seed: int = 0,
    store: Store | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Dropped:
    """The blocks whose removal the network's outputs mind least, found from the plan of least summed block influence.

    Args:
        program: canonical or compressed. samples: an eighth, half and all of them judge in the three stages of a generation.
        macs: share of the program's multiply-accumulates that may remain, in (0, 1).
        unit: whole layers, or every residual branch alone.

    Raises:
        OptionError: a share outside (0, 1), fewer than 8 samples, or nothing to drop. InfeasibleError: more is left even
            without any block.
    """
    blocks = find_blocks(program).of(unit)
    if not 0 < macs < 1 or len(samples) < 8 or not blocks:
        raise OptionError(
            f"block dropping takes a share of MACs in (0, 1), 8 samples or more and a network with blocks, not {macs:g}, "
            f"{len(samples)} samples and '{program.name}' with {len(blocks)} blocks"
        )
    influence = block_influence(program, blocks, samples.samples, PassContext())
    problem, loss = problem_of(program, blocks, influence, macs), DropLoss(program, blocks, samples)
    stages = ((4, len(samples) // 8), (2, len(samples) // 2), (1, len(samples)))
    key = content_key(program, samples.samples, unit)
    found = evolutionary.solve(
        problem,
        loss,
        generations=generations,
        offspring=offspring,
        stages=stages,
        seed=seed,
        store=store,
        key=key,
        progress=progress,
    )
    names = tuple(b.name for b, choice in zip(blocks, found.solution.chosen, strict=True) if choice == DROP)
    return Dropped(names, pass_text(RemoveBlocks(blocks=names)), found.fitness, found.evaluations)
