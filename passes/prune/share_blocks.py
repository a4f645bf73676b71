"""share-blocks: neighbouring blocks of one structure compute with one set of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage
from ..base import LOSSY, Pass, PassContext, PassResult, register
from . import block_scores
from .blocks import Block, find_blocks
from .remove_blocks import consecutive


@register
@dataclass(frozen=True)
class ShareBlocks(Pass):
    """Every block of a group reads the parameters of the group's first block; artifacts store equal constants once.

        %y = f(%x, W1);  %z = f(%y, W2)   ->   %y = f(%x, W1);  %z = f(%y, W1)

    Source: FoldGPT (Liu et al. 2024, arXiv:2407.00928), its sharing of blocks without the fine-tuning. With `count`, layers whose
    neighbour before has the same structure give up their weights: those of the least block influence, or, one after the other,
    the one whose sharing moves the network's outputs least (output-distortion, see remove-blocks).

    Args:
        groups: `FIRST+SECOND[+THIRD]` names of consecutive layers or branches of one structure. Either this or `count`.
        count: how many layers give up their weights.
        criterion: which ones, where `count` says how many.
        samples: calibration samples that are scored where `count` is given.

    Raises:
        OptionError: neither or both of `groups` and `count`. PassError: blocks that cannot share, with the reason.
    """

    groups: tuple[str, ...] = ()
    count: int = 0
    criterion: Literal["block-influence", "output-distortion"] = "output-distortion"
    samples: int = 64

    name = "share-blocks"
    effect = LOSSY
    accepts = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves = Stage.COMPRESSED

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if bool(self.groups) == bool(self.count) or self.count < 0 or self.samples < 1:
            raise OptionError(
                "share-blocks: name the groups (groups=[blocks.2+blocks.3]) or say how many blocks give theirs up (count=2)"
            )
        if any("+" not in group for group in self.groups):
            raise OptionError(f"share-blocks: a group is two names or more joined by +, not {', '.join(self.groups)}")

    def run(self, program: Program, context: PassContext) -> PassResult:
        groups = self.groups or tuple(self._choose(program, context))
        before = sum(p.numel() for p in program.parameters().values())
        sharing(program, groups)
        after = sum(p.numel() for p in program.parameters().values())
        modified = after < before or program.stage is not self.leaves
        return PassResult(program, modified, {"groups": ", ".join(groups), "parameters": before - after})

    def _choose(self, program: Program, context: PassContext) -> list[str]:
        """Groups in which `count` layers give up their weights."""
        layers = find_blocks(program).layers
        able = [i + 1 for i, (a, b) in enumerate(pairwise(layers)) if _may_share(a, b)]
        if len(able) < self.count:
            raise PassError(f"{self.count} layers are to share weights, but '{program.name}' has {len(able)} that can")
        samples = context.require_calibration(self.name).samples[: self.samples]
        if self.criterion == "block-influence":
            scores = block_scores.block_influence(program, [layers[i] for i in able], samples, context)
            order = sorted(range(len(able)), key=scores.__getitem__)
            return _groups(layers, {able[i] for i in order[: self.count]})
        chosen: set[int] = set()
        for _ in range(self.count):
            rest = [i for i in able if i not in chosen]
            variants = [sharing(program.clone(), _groups(layers, {*chosen, i})) for i in rest]
            scores = block_scores.output_distortion(program, variants, samples, context)
            chosen.add(rest[min(range(len(rest)), key=scores.__getitem__)])
        return _groups(layers, chosen)


def _may_share(first: Block, second: Block) -> bool:
    """Whether the second may take the weights of the first, which it follows, and has others now."""
    if first.exit is not second.entry or first.structure != second.structure:
        return False
    return any(own is not shared for own, shared in zip(second.parameters(), first.parameters(), strict=True))


def _groups(layers: Sequence[Block], chosen: set[int]) -> list[str]:
    """The groups in which the layers of these indices take the weights of the layer before."""
    groups: list[list[str]] = []
    for index in sorted(chosen):
        if index - 1 not in chosen:
            groups.append([layers[index - 1].name])
        groups[-1].append(layers[index].name)
    return ["+".join(group) for group in groups]


def sharing(program: Program, groups: Sequence[str]) -> Program:
    """`program` itself, edited: the blocks of each group read the parameters of the first."""
    for group in groups:
        _share(program, find_blocks(program).named(group.split("+")), group)
    program.sweep()
    return program


def _share(program: Program, blocks: list[Block], group: str) -> None:
    if len(blocks) < 2 or blocks not in [list(run) for run in consecutive(blocks, len(blocks))]:
        raise PassError(f"the blocks of group '{group}' do not follow each other: each must read the result of the one before")
    first = blocks[0]
    for block in blocks[1:]:
        if block.structure != first.structure:
            raise PassError(f"'{block.name}' and '{first.name}' of group '{group}' differ in structure and cannot share weights")
        for own, shared in zip(block.parameters(), first.parameters(), strict=True):
            inside = set(block.nodes)
            own.replace_all_uses_with(shared, delete_user_cb=lambda user, inside=inside: user in inside)
