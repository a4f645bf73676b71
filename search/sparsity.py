"""How sparse each layer becomes: measured output distortion, and the plan of least distortion by dynamic programming.

    float program ── every layer at every level, alone ──> distortion (layers, levels) ── solvers.dynamic ──> layers=["LAYER=0.8"]

Xu et al. 2023 (arXiv:2308.10438): what pruning several layers does to the output is close to the sum of what pruning each does,
so the allocation is a knapsack. Any sparsity pass replays the rules; the distortion is that of magnitude pruning, as in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..ir.batch import over_samples
from ..ir.data import Calibration, Sample
from ..ir.errors import OptionError, PassError
from ..ir.program import Program, origin_of
from ..passes.fold.layer import Layer as Weighted
from ..passes.sparsify.base import Level, sparse_layers
from ..passes.sparsify.magnitude import pruned
from .problem import Limit, Problem, Solution
from .sensitivity.base import Layer
from .sensitivity.loss import relative_error
from .sensitivity.network import Network
from .solvers import solve

#: Sparsities that a layer may have.
LEVELS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Distortion:
    """layers: origins. weights: how many each has. loss (layers, levels): E ||y' - y||^2 / ||y||^2 of the outputs y."""

    layers: tuple[str, ...]
    weights: tuple[int, ...]
    levels: tuple[float, ...]
    loss: np.ndarray

    def problem(self, sparsity: float) -> Problem:
        """Which level each layer takes, for at least `sparsity` of all weights."""
        kept = tuple(np.array([count - Level(level).removed(count) for level in self.levels], float) for count in self.weights)
        limit = Limit("weights", kept, (1 - sparsity) * sum(self.weights))
        names = tuple(f"{level:g}" for level in self.levels)
        return Problem(self.layers, (names,) * len(self.layers), tuple(self.loss), (limit,))

    def rules(self, solution: Solution) -> tuple[str, ...]:
        """The plan as the option `layers` of the sparsity passes."""
        return tuple(f"{layer}={self.levels[choice]:g}" for layer, choice in zip(self.layers, solution.chosen, strict=True))


def measure(
    program: Program, samples: Sequence[Sample], levels: Sequence[float] = LEVELS, progress: Progress | None = None
) -> Distortion:
    """The distortion of every layer at every level, each layer pruned alone by magnitude.

    Args:
        program: canonical or compressed; never written to.

    Raises:
        OptionError: a level outside [0, 1). PassError: no layer, or two of one origin, which no plan could tell apart.
    """
    for level in levels:
        Level.parse(f"{level:g}", "level of an allocation")
    found = sparse_layers(program)
    origins = [origin_of(layer.node) for layer in found]
    if not found or len(set(origins)) < len(origins):
        raise PassError(
            f"'{program.name}' has no layers to allocate zeros to, or two of one origin: {', '.join(origins) or '(none)'}"
        )
    network = Network(program, [Layer(o, layer.node, layer.weight.detach(), {}) for o, layer in zip(origins, found, strict=True)])
    inputs = tuple(torch.stack(column) for column in zip(*samples, strict=True))
    loss = np.zeros((len(found), len(levels)))
    with torch.no_grad():
        for index, (origin, layer) in enumerate(zip(origins, found, strict=True)):
            loss[index] = over_samples(_errors(program, network, origin, layer, levels), inputs).double().mean(0).numpy()
            if progress is not None:
                progress(index + 1, len(found), "output distortion")
    return Distortion(tuple(origins), tuple(layer.weight.numel() for layer in found), tuple(levels), loss)


def _errors(
    program: Program, network: Network, origin: str, layer: Weighted, levels: Sequence[float]
) -> Callable[..., torch.Tensor]:
    weights = [pruned(layer, Level(level)) for level in levels]

    def one(inputs: Sample) -> torch.Tensor:
        exact = network.values(inputs)
        errors = []
        for weight in weights:
            values = network.replay(exact, {origin: weight})
            errors.append(torch.stack([relative_error(values[node], exact[node]) for node in program.outputs]).mean())
        return torch.stack(errors)

    return one


def allocate(
    program: Program, calibration: Calibration, sparsity: float, samples: int = 32, progress: Progress | None = None
) -> tuple[str, ...]:
    """Rules `LAYER=SPARSITY` of least summed distortion for `sparsity` of all weights.

    Raises:
        OptionError: a sparsity that no plan of `LEVELS` reaches.
    """
    if not 0 <= sparsity < LEVELS[-1]:
        raise OptionError(f"sparsity must lie in [0, {LEVELS[-1]:g}), the most that a layer may have, not {sparsity:g}")
    found = measure(program, calibration.samples[:samples], LEVELS, progress)
    return found.rules(solve(found.problem(sparsity), "dynamic"))
