"""remove-heads: attention heads leave the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..rules import values_by_name
from .coupling import coupled_groups
from .group import Group
from .prune_channels import PruneChannels
from .token_axis import find_attentions


@register
@dataclass(frozen=True)
class RemoveHeads(Pass):
    """Cuts attention heads: `prune-channels` for the groups of channels that are heads, by the names of their attentions.

        %qkv = linear(%x, W[3 * 12 * 64, C]), 12 heads   ->   %qkv = linear(%x, W'[3 * 8 * 64, C]), 8 heads

    Source: Michel et al. 2019, Are Sixteen Heads Really Better than One? (arXiv:1905.10650); importance as `criterion` says.

    Args:
        keep: `ATTENTION=COUNT` items, such as blocks.0.attention=8, or globs; the others keep all heads. This or `count`.
        count: heads that go in every attention.
        criterion, reconstruct, samples: see `prune-channels`.

    Raises:
        OptionError: neither or both of `keep` and `count`. UnknownNameError: no such attention. PassError: heads that cannot be
            cut, with the reason, or fewer than `count` to cut.
    """

    keep: tuple[str, ...] = ()
    count: int = 0
    criterion: str = "thinet"
    reconstruct: bool = True
    samples: int = 1024

    name = "remove-heads"
    effect = LOSSY
    float32_only = True
    accepts = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves = Stage.COMPRESSED

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if bool(self.keep) == bool(self.count) or self.count < 0:
            raise OptionError(
                'remove-heads: say what stays (keep=["blocks.0.attention=2"]) or how many go (count=1), one of the two'
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        heads = head_groups(program)
        items = tuple(f"{heads[name].name}={stay}" for name, stay in self._counts(heads).items())
        prune = PruneChannels(keep=items, criterion=self.criterion, reconstruct=self.reconstruct, samples=self.samples)
        prune.requires(program, context)
        return prune.run(program, context)

    def _counts(self, heads: Mapping[str, Group]) -> dict[str, int]:
        """Attention -> heads that stay."""
        if self.count:
            few = [name for name, group in heads.items() if group.size <= self.count]
            if few:
                raise PassError(
                    f"'{few[0]}' has {heads[few[0]].size} heads, so {self.count} cannot go; name counts by keep=[...]"
                )
            return {name: group.size - self.count for name, group in heads.items()}
        return values_by_name(self.keep, heads, f"'keep' of {self.name}", "ATTENTION=COUNT, such as blocks.0.attention=2", int)


def head_groups(program: Program) -> dict[str, Group]:
    """Attention -> the group of channels that are its heads.

    Raises:
        PassError: no attention, or one whose heads the coupling analysis does not see as a group.
    """
    groups = {(node, dim): group for group in coupled_groups(program) for node, dim, _ in group.values}
    found = {}
    for attention in find_attentions(program):
        group = groups.get((attention.softmax.name, 1))
        if group is None:
            raise PassError(
                f"the heads of '{attention.name}' cannot be cut: they are pinned (graphwright inspect --groups says by what)"
            )
        found[attention.name] = group
    return found
