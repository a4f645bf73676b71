"""What a block does to the values that pass through it: scores by which blocks are removed or shared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.data import Sample
from ...ir.program import Program
from ..base import PassContext
from .blocks import Block

Values = dict[fx.Node, torch.Tensor]


class _Keep(fx.Interpreter):
    """Runs a program and keeps the values asked for."""

    def __init__(self, program: Program, wanted: set[fx.Node]) -> None:
        super().__init__(program.graph_module)
        self.wanted, self.kept = wanted, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value
        return value


def keep_values(program: Program, wanted: set[fx.Node], samples: Sequence[Sample]) -> Iterator[Values]:
    """The values of `wanted`, sample by sample."""
    program.graph_module.recompile()
    for sample in samples:
        runner = _Keep(program, wanted)
        with torch.no_grad():
            runner.run(*sample)
        yield runner.kept


def cosines(
    program: Program,
    pairs: Sequence[tuple[fx.Node, fx.Node]],
    samples: Sequence[Sample],
    context: PassContext,
    measure: Callable[[torch.Tensor], torch.Tensor],
) -> list[float]:
    """For each pair of values the mean of `measure` (of a cosine) over samples and positions, float64.

    A position's vector runs over the channels: axis 1 of an image (N, C, H, W), the last axis of tokens (N, T, C).
    """  # fmt: skip
    totals = [0.0] * len(pairs)
    for done, kept in enumerate(keep_values(program, {node for pair in pairs for node in pair}, samples), 1):
        for index, (before, after) in enumerate(pairs):
            totals[index] += float(measure(_cosine(kept[before], kept[after])).mean())
        context.progress(done, len(samples), "compare blocks' inputs and outputs")
    return [total / len(samples) for total in totals]


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    axis = 1 if a.dim() >= 4 else -1
    return torch.cosine_similarity(a.double(), b.double(), dim=axis).clamp(-1.0, 1.0)


def block_influence(program: Program, blocks: Sequence[Block], samples: Sequence[Sample], context: PassContext) -> list[float]:
    """1 - E[cos(entry, exit)] of each block (Men et al. 2024, arXiv:2403.03853, equation 1). In [0, 2]; small: does little."""
    return cosines(program, [(b.entry, b.exit) for b in blocks], samples, context, lambda cosine: 1.0 - cosine)


def angular_distance(
    program: Program, runs: Sequence[Sequence[Block]], samples: Sequence[Sample], context: PassContext
) -> list[float]:
    """E[arccos(cos(entry, exit)) / pi] of runs of consecutive blocks (Gromov et al. 2024, arXiv:2403.17887, equation 7).

    The paper takes a language model's last token alone; here every position counts, which also serves images.
    """
    pairs = [(run[0].entry, run[-1].exit) for run in runs]
    return cosines(program, pairs, samples, context, lambda cosine: torch.arccos(cosine) / math.pi)


def output_distortion(
    program: Program, variants: Sequence[Program], samples: Sequence[Sample], context: PassContext
) -> list[float]:
    """||y' - y||^2 / ||y||^2 over all samples of each variant's outputs y' and the program's y, summed over outputs."""
    wrong = torch.zeros(len(variants), len(program.outputs), dtype=torch.float64)
    right = torch.zeros(len(program.outputs), dtype=torch.float64)
    for done, sample in enumerate(samples, 1):
        expected = [y.double() for y in program(*sample)]
        right += torch.stack([y.square().sum() for y in expected])
        for row, variant in zip(wrong, variants, strict=True):
            row += torch.stack([(a - e).square().sum() for a, e in zip(variant(*sample), expected, strict=True)])
        context.progress(done, len(samples), "outputs without a block")
    return (wrong / right.clamp_min(1e-30)).sum(1).tolist()
