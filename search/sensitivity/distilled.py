"""Distilled data: calibration inputs made from the statistics that a network's batch norms remember.

A data source and no scorer: what it returns is a Calibration, with which every scorer that needs no labels runs without data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.batch import over_samples
from ...ir.data import Calibration
from ...ir.errors import DataError, OptionError
from ...ir.program import Program
from .network import Network

BATCH_NORM = torch.ops.aten.batch_norm.default
#: Adam's step on inputs of unit variance (ZeroQ, section 4.1, uses 0.5 on normalized images; 0.1 is steadier on small networks).
STEP = 0.1
#: Samples that share their statistics, and are in memory together with their derivatives (ZeroQ: 32 to 64).
BATCH = 32


@dataclass(frozen=True)
class Distillation:
    """What `distil` reached: the samples and the mismatch of their statistics at the start (random inputs) and at the end."""

    calibration: Calibration
    before: float
    after: float


def distil(
    program: Program,
    count: int = 32,
    steps: int = 200,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Distillation:
    """Inputs whose activations have the means and deviations that the program's batch norms remember from training.

    Cai et al. 2020, ZeroQ (arXiv:2001.00281, equation 4): Adam on random normal inputs x minimizes, summed over batch norms,

        mean over channels of (mean(a) - mu)^2 + (std(a) - sigma)^2     divided by sigma^2,

    with a the input of the batch norm over all positions of 32 samples at a time. The division keeps layers of large
    activations from counting alone.

    Args:
        program: as captured: a canonical program has its batch norms folded away.
        count: samples, each of the program's batch (1 where it is symbolic).

    Raises:
        DataError: no batch norm with statistics is left in the program, or an input is not float.
        OptionError: a count or a number of steps below 1.
    """
    if count < 1 or steps < 1:
        raise OptionError(f"distilled data needs at least 1 sample and 1 step, not {count} and {steps}")
    norms = [node for node in program.nodes if node.target is BATCH_NORM and _statistics(program, node) is not None]
    if not norms:
        raise DataError(
            f"'{program.name}' ({program.stage.label}) has no batch norm, so nothing remembers what inputs looked like; distil "
            "from the program as captured, before batch norms are folded, or give calibration samples (--calibration FILE.npz)"
        )
    for spec in program.input_specs:
        if not spec.dtype.is_floating_point:
            raise DataError(f"input '{spec}' of '{program.name}' is not float: no gradient reaches it; give calibration samples")
    network = Network(program, ())
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(BATCH, count - first) for first in range(0, count, BATCH)]
    batches, ends = [], []
    for index, size in enumerate(sizes):
        shapes = [(size, *(1 if d is None else d for d in spec.shape)) for spec in program.input_specs]
        inputs = tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
        done = index * steps
        ends.append(_descend(network, norms, inputs, steps, lambda n, d=done: progress(d + n, len(sizes) * steps, "distil data")))
        batches += list(zip(*(value.detach() for value in inputs), strict=True))
    before, after = (sum(e[i] * size for e, size in zip(ends, sizes, strict=True)) / count for i in (0, 1))
    return Distillation(Calibration.for_program(program, batches), before, after)


def _descend(
    network: Network, norms: list[fx.Node], inputs: tuple[torch.Tensor, ...], steps: int, progress: Callable[[int], None]
) -> tuple[float, float]:
    """Moves `inputs` in place; returns the mismatch at the start and at the end."""
    optimizer = torch.optim.Adam(inputs, lr=STEP)
    start = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        loss = mismatch(network, norms, inputs)
        start = start if step else float(loss.detach())
        loss.backward()
        optimizer.step()
        progress(step + 1)
    with torch.no_grad():
        return start, float(mismatch(network, norms, inputs))


def mismatch(network: Network, norms: list[fx.Node], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Relative squared distance of the statistics of all batch norms' inputs from the remembered ones, () (see `distil`)."""

    def one(sample: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        values = network.values(sample)
        return [_by_channel(values[node.args[0]]) for node in norms]  # type: ignore[index]

    total = torch.zeros(())
    for node, activations in zip(norms, over_samples(one, inputs), strict=True):
        rows = activations.flatten(0, 1)
        statistics = _statistics(network.program, node)
        assert statistics is not None
        mean, variance = statistics
        variance = variance + 1e-5 * variance.mean() + 1e-12
        deviation = rows.var(0, unbiased=False).clamp_min(1e-12).sqrt()
        distance = (rows.mean(0) - mean).square() + (deviation - variance.sqrt()).square()
        total = total + (distance / variance).mean()
    return total


def _by_channel(value: torch.Tensor) -> torch.Tensor:
    """(batch, C, ...) to (rows, C)."""
    return value.movedim(1, -1).flatten(0, -2)


def _statistics(program: Program, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Remembered mean and variance (C,) of a batch norm; None where it has none."""
    mean, variance = (program.parameter(arg) for arg in node.args[3:5])
    return None if mean is None or variance is None else (mean.detach(), variance.detach())
