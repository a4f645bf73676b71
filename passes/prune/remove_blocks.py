"""remove-blocks: residual blocks that change little are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage
from ..base import LOSSY, Pass, PassContext, PassResult, register
from . import block_scores
from .blocks import Block, Unit, find_blocks

Criterion = Literal["block-influence", "angular-distance", "output-distortion", "random"]


def without(program: Program, names: Sequence[str]) -> Program:
    """`program` itself, edited: the readers of each named block's result read its entry. Exact where f(entry) is zero."""
    # From the last block on, so that the entry of a block is never a value that has gone already.
    for block in reversed(find_blocks(program).named(names)):
        block.exit.replace_all_uses_with(block.entry)
    program.sweep()
    return program


@register
@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Leaves residual blocks out; `graphwright inspect MODEL --blocks` lists them.

        %y = aten.add.Tensor(%x, f(%x));  g(%y)   ->   g(%x)

    Criteria, each over the calibration samples; the blocks that score least go:

        block-influence    1 - mean cosine of entry and exit (Men et al. 2024, ShortGPT, arXiv:2403.03853)
        angular-distance   arccos of that cosine, of `count` consecutive blocks at once (Gromov et al. 2024, arXiv:2403.17887)
        output-distortion  squared error of the network's outputs without the block; one block at a time, scored anew each time
        random             a control, by the run's seed

    Args:
        blocks: names of what goes; layers or branches. Either this or `count`.
        count: how many go.
        criterion: which ones, where `count` says how many.
        unit: `layer` counts whole layers (attention with its MLP), `branch` every residual branch alone.
        samples: calibration samples that are scored.

    Raises:
        OptionError: neither or both of `blocks` and `count`; PassError: fewer blocks than `count`.
    """

    blocks: tuple[str, ...] = ()
    count: int = 0
    criterion: Criterion = "block-influence"
    unit: Unit = "layer"
    samples: int = 64

    name = "remove-blocks"
    effect = LOSSY
    accepts = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves = Stage.COMPRESSED

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if bool(self.blocks) == bool(self.count) or self.count < 0:
            raise OptionError("remove-blocks: name the blocks (blocks=[blocks.3]) or say how many go (count=2), one of the two")
        if self.samples < 1:
            raise OptionError("remove-blocks: samples must be at least 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        chosen = self.blocks or tuple(self._choose(program, context))
        nodes, parameters = len(program.graph.nodes), sum(p.numel() for p in program.parameters().values())
        without(program, chosen)
        left = sum(p.numel() for p in program.parameters().values())
        stats = {"removed": ", ".join(chosen), "nodes": nodes - len(program.graph.nodes), "parameters": parameters - left}
        return PassResult(program, True, stats)

    def _choose(self, program: Program, context: PassContext) -> list[str]:
        """Names of `count` blocks, in graph order."""
        known = find_blocks(program).of(self.unit)
        if len(known) < self.count:
            raise PassError(
                f"{self.count} blocks are to go, but '{program.name}' has {len(known)} ({self.unit}: inspect --blocks)"
            )
        if self.criterion == "random":
            draw = torch.randperm(len(known), generator=torch.Generator().manual_seed(context.seed))
            return [known[i].name for i in sorted(draw[: self.count].tolist())]
        samples = context.require_calibration(self.name).samples[: self.samples]
        if self.criterion == "angular-distance":
            runs = consecutive(known, self.count)
            if not runs:
                raise PassError(f"'{program.name}' has no {self.count} consecutive blocks ({self.unit}); use block-influence")
            scores = block_scores.angular_distance(program, runs, samples, context)
            return [block.name for block in runs[min(range(len(runs)), key=scores.__getitem__)]]
        if self.criterion == "output-distortion":
            return self._least_distorting(program, known, samples, context)
        scores = block_scores.block_influence(program, known, samples, context)
        order = sorted(range(len(known)), key=scores.__getitem__)
        return [known[i].name for i in sorted(order[: self.count])]

    def _least_distorting(self, program: Program, known: Sequence[Block], samples, context: PassContext) -> list[str]:
        names, gone = [block.name for block in known], []
        for _ in range(self.count):
            rest = [name for name in names if name not in gone]
            variants = [without(program.clone(), (*gone, name)) for name in rest]
            scores = block_scores.output_distortion(program, variants, samples, context)
            gone.append(rest[min(range(len(rest)), key=scores.__getitem__)])
        return [name for name in names if name in gone]


def consecutive(blocks: Sequence[Block], count: int) -> list[Sequence[Block]]:
    """Every run of `count` blocks each of which reads the result of the one before."""
    runs = [blocks[i : i + count] for i in range(len(blocks) - count + 1)]
    return [run for run in runs if all(a.exit is b.entry for a, b in pairwise(run))]
