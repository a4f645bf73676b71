"""Rank allocation: from limits on bytes, multiply-accumulates or time to the ranks of a factorization pass.

    float program -> decompositions of every layer -> what each rank loses and costs -> Problem -> solver
                                                                                                  |
                                          factorize-...{ranks=[layer=rank, ...]}, which replays it

A layer's loss at a rank is its error in the method's own metric (read off its singular values), times what a unit of that error
costs the network: measured once a layer, at a middle rank, as the divergence of the outputs from the float model's. Errors alone
do not add up over layers: on the small GPT (30% fewer weights, whitened SVD) the divergence was 0.90 nats with them, 0.37 with
one ratio for all layers, and 0.26 so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ir.content import content_key
from ..ir.data import Sample
from ..ir.errors import OptionError
from ..ir.program import Program, origin_of
from ..passes.base import PassContext
from ..passes.factorize.base import Factorize, replace
from ..passes.factorize.decomposition import Decomposition, Rank, rank_text
from ..passes.fold.layer import layer_of
from ..passes.outputs import class_scores, is_classifier
from .cost.bops import products
from .planner import Surroundings
from .problem import Limit, Problem, Solution
from .solvers import solve

#: The choice of a layer that stays as it is.
WHOLE = "whole"

#: What a limit bounds, all absolute.
METRICS = {
    "weight_bytes": "bytes of the float32 parameters",
    "macs": "multiply-accumulates of one run",
    "microseconds": "time of a run, from kernels timed in place on this machine",
}

#: A thin pair must take at most this share of its layer's measured time: clocks and neighbours move a kernel by a few percent.
FASTER = 0.97


@dataclass(frozen=True)
class LayerRanks:
    """The choices of one layer, `whole` last. All arrays are (choices,).

    Attributes:
        ranks: as in pipeline text, ascending.
        loss: expected divergence of the network where only this layer is cut.
        weights: parameters without biases. macs: of one run.
        microseconds: measured; None before `priced`.
    """

    origin: str
    ranks: tuple[str, ...]
    loss: np.ndarray
    weights: np.ndarray
    macs: np.ndarray
    microseconds: np.ndarray | None = None

    def keep(self, wanted: np.ndarray) -> LayerRanks:
        """The choices where `wanted` (choices,) is true."""
        times = None if self.microseconds is None else self.microseconds[wanted]
        ranks = tuple(rank for rank, wants in zip(self.ranks, wanted, strict=True) if wants)
        return LayerRanks(self.origin, ranks, self.loss[wanted], self.weights[wanted], self.macs[wanted], times)


@dataclass(frozen=True)
class RankTables:
    """Everything a solver may ask about one program and method. fixed_...: what belongs to no layer that can be factorized."""

    method: Factorize
    layers: tuple[LayerRanks, ...]
    fixed_bytes: int
    fixed_macs: int
    fixed_microseconds: float | None = None

    def priced(self, microseconds: Mapping[str, Mapping[str, float]], fixed: float) -> RankTables:
        """With measured times, origin -> rank -> microseconds; ranks that are not faster than the whole layer are gone.

        Ranks without a measurement are gone, too. fixed: microseconds of a run outside these layers.
        """
        layers = []
        for layer in self.layers:
            times = microseconds[layer.origin]
            row = np.array([times.get(rank, math.inf) for rank in layer.ranks])
            if not math.isfinite(row[-1]):
                raise OptionError(f"no measured time of '{layer.origin}' as it is; price it at rank '{WHOLE}'")
            faster = row <= FASTER * row[-1]
            faster[-1] = True
            layers.append(dataclasses.replace(layer, microseconds=row).keep(faster))
        return dataclasses.replace(self, layers=tuple(layers), fixed_microseconds=fixed)

    def problem(self, limits: Mapping[str, float]) -> Problem:
        """The allocation problem; every metric is counted, those without a limit up to infinity.

        Raises:
            OptionError: an unknown metric, or microseconds where nothing was priced.
        """
        for metric in limits:
            if metric not in METRICS:
                raise OptionError(f"no limit '{metric}' on ranks; there are {', '.join(METRICS)}")
            if metric == "microseconds" and self.fixed_microseconds is None:
                raise OptionError("a limit on microseconds needs prices (see search/cost/ranks.py), measured on the target")
        rows = [
            ("weight_bytes", [4.0 * layer.weights for layer in self.layers], float(self.fixed_bytes)),
            ("macs", [layer.macs for layer in self.layers], float(self.fixed_macs)),
        ]
        if self.fixed_microseconds is not None:
            rows.append(("microseconds", [x.microseconds for x in self.layers], self.fixed_microseconds))  # type: ignore[misc]
        bounds = tuple(Limit(name, tuple(costs), limits.get(name, math.inf), fixed) for name, costs, fixed in rows)
        origins = tuple(layer.origin for layer in self.layers)
        return Problem(origins, tuple(x.ranks for x in self.layers), tuple(x.loss for x in self.layers), bounds)

    def allocate(self, limits: Mapping[str, float], solver: str = "ilp") -> tuple[Solution, Factorize | None]:
        """The ranks of least loss within `limits`, and the pass that makes them; None where every layer stays whole.

        Raises:
            InfeasibleError: naming each limit that no plan meets and the least value there is.
        """
        problem = self.problem(limits)
        solution = solve(problem, solver)
        rules = tuple(f"{origin}={rank}" for origin, rank in problem.names(solution.chosen).items() if rank != WHOLE)
        return solution, dataclasses.replace(self.method, ranks=rules) if rules else None


def rank_tables(
    program: Program, method: Factorize, around: Surroundings, multiple: int = 16, steps: int = 12, probes: int = 8
) -> RankTables:
    """Losses and costs of every layer of a canonical program at up to `steps` ranks.

    Args:
        method: a factorization; its `skip` and data options count, its ratio, energy and ranks do not.
        multiple: of what a rank is one; see `Backend.channel_multiple`.
        probes: samples on which a unit of a layer's error is weighed.

    Raises:
        OptionError: no calibration samples.
    """
    if around.samples is None:
        raise OptionError("rank allocation needs calibration samples: pass calibration=... (CLI: --calibration FILE.npz)")
    method = dataclasses.replace(method, ratio=None, energy=None, ranks=())
    key = content_key(program, around.samples.samples, method, multiple, steps, probes, around.seed)
    kept = around.store.remember("ranks", key, lambda: _losses(program, method, around, multiple, steps, probes))
    layers = []
    for row in kept:
        arrays = (np.array(row[name], dtype=np.float64) for name in ("loss", "weights", "macs"))
        layers.append(LayerRanks(row["origin"], tuple(row["ranks"]), *arrays))
    weights, macs = (sum(getattr(layer, name)[-1] for layer in layers) for name in ("weights", "macs"))
    every = sum(t.numel() * t.element_size() for t in program.parameters().values())
    whole_macs = sum(work.macs for work in products(program))
    batch = _batch(program)
    layers = [dataclasses.replace(layer, macs=layer.macs * batch) for layer in layers]
    return RankTables(method, tuple(layers), int(every - 4 * weights), int(whole_macs - batch * macs))


def candidates(found: Decomposition, multiple: int, steps: int) -> list[Rank]:
    """Up to `steps` ranks that save something, evenly spaced, the smallest and the largest among them."""
    ranks = [rank for rank in found.ranks(multiple) if found.saves(rank)]
    if len(ranks) <= steps:
        return ranks
    return [ranks[round(i)] for i in np.linspace(0, len(ranks) - 1, steps)]


def _losses(
    program: Program, method: Factorize, around: Surroundings, multiple: int, steps: int, probes: int
) -> list[dict[str, Any]]:
    assert around.samples is not None
    samples = around.samples.samples[:probes]
    divergence = Divergence.of(program, samples)
    layers, _ = method.layers(program)
    context = PassContext(around.samples, seed=around.seed, memo=around.memo)
    rows = []
    for done, found in enumerate(method.decompositions(program, layers, context, {}), 1):
        ranks = candidates(found, multiple, steps)
        errors = np.array([found.error(rank) for rank in ranks] + [0.0])
        if ranks:
            middle = len(ranks) // 2
            errors *= divergence(_with(program, found, ranks[middle])) / max(errors[middle], 1e-12)
        rows.append(
            {
                "origin": origin_of(found.layer.node),
                "ranks": [rank_text(rank) for rank in ranks] + [WHOLE],
                "loss": errors.tolist(),
                "weights": [found.parameters(rank) for rank in (*ranks, None)],
                "macs": [found.macs(rank) for rank in (*ranks, None)],
            }
        )
        around.progress(done, len(layers), "rank losses")
    return rows


def _with(program: Program, found: Decomposition, rank: Rank) -> Program:
    """A clone in which only this layer is factorized."""
    changed = program.clone()
    layer = layer_of(changed, next(n for n in changed.nodes if n.name == found.layer.node.name))
    assert layer is not None
    replace(changed, layer, found.parts(rank))
    changed.sweep()
    return changed


@dataclass(frozen=True)
class Divergence:
    """How far a rewritten program's outputs are from the original's, mean over samples.

    KL(p || q) of a classifier's classes in nats, mean over its positions; else the squared error of the outputs relative to their
    square, summed over the outputs.
    """

    samples: Sequence[Sample]
    expected: tuple[tuple[torch.Tensor, ...], ...]
    logarithm: Callable[[torch.Tensor], torch.Tensor] | None

    @classmethod
    def of(cls, program: Program, samples: Sequence[Sample]) -> Divergence:
        logarithm = None
        if is_classifier(program):
            logits = class_scores(program.outputs[0]) is program.outputs[0]
            # log_softmax leaves log-probabilities as they are.
            logarithm = _log_softmax if logits else _log_of_probabilities
        return cls(samples, tuple(program(*sample) for sample in samples), logarithm)

    def __call__(self, program: Program) -> float:
        return sum(
            self._of_sample(program(*sample), expected) for sample, expected in zip(self.samples, self.expected, strict=True)
        ) / len(self.samples)

    def _of_sample(self, actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
        if self.logarithm is not None:
            p, q = self.logarithm(expected[0]), self.logarithm(actual[0])
            return float((p.exp() * (p - q)).sum(-1).mean())
        pairs = ((a.double(), e.double()) for a, e in zip(actual, expected, strict=True))
        return sum(float((a - e).square().sum() / e.square().sum().clamp_min(1e-30)) for a, e in pairs)


def _log_softmax(values: torch.Tensor) -> torch.Tensor:
    return values.double().log_softmax(-1)


def _log_of_probabilities(values: torch.Tensor) -> torch.Tensor:
    return values.double().clamp_min(1e-30).log()


def _batch(program: Program) -> int:
    """Samples of one run; 1 where the batch is symbolic."""
    size = program.input_specs[0].shape[0] if program.input_specs and program.input_specs[0].shape else 1
    return size or 1
