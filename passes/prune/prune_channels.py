"""prune-channels: whole channels leave the graph, and the layers that read them learn to do without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...ir.errors import GraphwrightError, OptionError, PassError, UnknownNameError
from ...ir.program import Program, Stage, origin_of, shape_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..fold.match import is_tensor
from ..rules import matching, values_by_name
from .coupling import coupled_groups
from .criteria import Criterion, parse_criterion
from .criteria.base import Importance
from .cut import cut
from .group import Group
from .reconstruct import Kept, Settings, reconstruct

#: Share of the atoms that go where neither `ratio` nor `keep` says so.
RATIO = 0.5


@register
@dataclass(frozen=True)
class PruneChannels(Pass):
    """Cuts the least important atoms of each group of coupled channels, then fits the remaining weights to the original outputs.

        %y = conv(relu(conv(%x, W1[64,32,3,3])), W2[64,64,3,3])
     -> %y = conv(relu(conv(%x, W1'[40,32,3,3])), W2'[64,40,3,3])

    Groups and atoms are those of `coupled_groups` (`graphwright inspect --groups` lists them). Atoms are ranked by `criterion` on
    the program as it comes; `reconstruct` (least squares on calibration data, no labels, no gradients; see the module of that
    name) then gives every layer from the first cut to the outputs new weights of the smaller shape.

    Options:
        ratio: share of each group's atoms that goes, rounded down. none: 0.5 without `keep`, 0 for the groups that `keep` leaves
            out.
        criterion: what ranks atoms, with its options in quotes: `taylor`, "thinet{samples=64}".
        keep: `GROUP=COUNT` items: so many atoms of a group stay, whatever `ratio` is; a group may be a glob and the last match
            counts. A plan is written out this way.
        scope: `group` takes the same share of every group; `global` ranks the atoms of all groups together, each by its share of
            the group's mean importance, and takes `ratio` of them all. One atom of a group always stays.
        round_to: counts that stay are rounded to multiples of this, up.
        reconstruct: see above; false leaves the sliced weights, and then needs no calibration unless the criterion does.
        ignore: groups (or globs) that stay whole.
        samples: calibration samples for the reconstruction at most.
        rows: output positions of a layer used at most.
        damping: how strongly weights are held at what they were, relative to the mean square of their inputs.
    """

    name: ClassVar[str] = "prune-channels"
    effect: ClassVar = LOSSY
    float32_only: ClassVar = True
    accepts: ClassVar = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves: ClassVar = Stage.COMPRESSED

    ratio: float | None = None
    criterion: str = "thinet"
    keep: tuple[str, ...] = ()
    scope: Literal["group", "global"] = "group"
    round_to: int = 1
    reconstruct: bool = True
    ignore: tuple[str, ...] = ()
    samples: int = 1024
    rows: int = 16384
    damping: float = 1e-3

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise OptionError(
                f"option 'ratio' of {self.name} is the share of channels that goes, 0 <= ratio < 1, not {self.ratio}: at 1 every "
                "group would be empty"
            )
        for option in ("round_to", "samples", "rows"):
            if getattr(self, option) < 1:
                raise OptionError(f"option '{option}' of {self.name} must be at least 1, not {getattr(self, option)}")
        if self.damping <= 0:
            raise OptionError(f"option 'damping' of {self.name} must be above 0, not {self.damping}")
        if self.reconstruct or self._criterion.needs_calibration:
            context.require_calibration(self.name if self.reconstruct else f"criterion {self._criterion.name}")

    @property
    def _criterion(self) -> Criterion:
        return parse_criterion(self.criterion)

    def run(self, program: Program, context: PassContext) -> PassResult:
        groups = {group.name: group for group in coupled_groups(program)}
        try:
            named = counts_of(self.keep, groups)
            ignored = set(matching(self.ignore, groups, f"'ignore' of {self.name}"))
        except UnknownNameError as error:
            raise _of_a_layer(error, program, groups.values()) from error
        share = self.ratio if self.ratio is not None else 0.0 if named else RATIO
        both = sorted(ignored & set(named))
        if both:
            raise OptionError(f"group '{both[0]}' stands in 'keep' and in 'ignore' of {self.name}; leave it out of one")
        if share and all(group.pinned for group in groups.values()):
            reasons = [f"'{group.name}': {group.pinned}" for group in groups.values()][:3] or ["there is none"]
            raise PassError(f"no channels of '{program.name}' can be cut ({'; '.join(reasons)}); inspect --groups shows all")
        free = [g for g in groups.values() if not g.pinned and g.name not in named and g.name not in ignored] if share else []
        ranked = [*free, *(groups[name] for name, count in named.items() if count < groups[name].size)]
        importance = self._criterion.importance(program, ranked, context) if ranked else {}
        wanted = self._global_counts(free, importance, share) if self.scope == "global" else uniform_counts(free, share)
        wanted = {name: rounded(count, self.round_to, groups[name].size) for name, count in wanted.items()} | named
        removed = {name: lowest(importance[name], groups[name].size - n) for name, n in wanted.items() if n < groups[name].size}
        stats: dict[str, Any] = {
            "groups": {name: [groups[name].size, wanted[name]] for name in removed},
            "pinned": sum(bool(group.pinned) for group in groups.values()),
        }
        if not removed:
            return PassResult(program, program.stage != Stage.COMPRESSED, stats)
        smaller = cut(program, removed)
        if self.reconstruct:
            samples = context.require_calibration(self.name).samples[: self.samples]
            settings = Settings(self.rows, self.damping, context.seed)
            kept = kept_positions(program, groups.values(), removed)
            stats["errors"] = reconstruct(program, smaller, kept, samples, settings, context.progress)
        return PassResult(smaller, True, stats)

    def _global_counts(self, groups: Sequence[Group], importance: Importance, share: float) -> dict[str, int]:
        """How many atoms of each group stay when `share` of all of them goes; one of each group at least."""
        if not groups:
            return {}
        values = {g.name: importance[g.name] / importance[g.name].mean().clamp_min(1e-300) for g in groups}
        # The best atom of a group is never ranked.
        others = torch.cat([value.sort().values[:-1] for value in values.values()])
        gone = math.floor(share * sum(g.size for g in groups))
        if gone > len(others):
            raise PassError(f"ratio {share} would leave groups empty: at most {len(others)} of all atoms can go; lower the ratio")
        limit = others.sort().values[gone - 1] if gone else -math.inf
        return {name: max(1, int((value > limit).sum())) for name, value in values.items()}


def uniform_counts(groups: Sequence[Group], share: float) -> dict[str, int]:
    """How many atoms of each group stay."""
    return {g.name: g.size - math.floor(g.size * share + 1e-9) for g in groups}


def rounded(count: int, multiple: int, size: int) -> int:
    """`count` rounded up to a multiple, but never above the size."""
    return min(size, -(-count // multiple) * multiple)


def lowest(importance: torch.Tensor, count: int) -> list[int]:
    """The `count` atoms of least importance."""
    return sorted(importance.argsort(stable=True)[:count].tolist())


def counts_of(items: Sequence[str], groups: Mapping[str, Group]) -> dict[str, int]:
    """`GROUP=COUNT` items as a mapping.

    Raises:
        OptionError: no such form, or a count that is not 1 .. size. UnknownNameError: no such group.
        PassError: a group that is pinned.
    """
    found = values_by_name(items, groups, f"'keep' of {PruneChannels.name}", "GROUP=COUNT, such as layer1.conv=24", int)
    for name, count in found.items():
        group = groups[name]
        if not 1 <= count <= group.size:
            raise OptionError(f"group '{name}' has {group.size} atoms, so 1 to {group.size} can stay, not {count}")
        if group.pinned and count < group.size:
            raise PassError(f"group '{name}' cannot be cut: {group.pinned}")
    return found


def _of_a_layer(error: UnknownNameError, program: Program, groups: Iterable[Group]) -> GraphwrightError:
    """The error for a name that is no group; one that says which group it is, where a layer has this name."""
    layers = {node.name for node in program.nodes if origin_of(node) == error.name}
    held = [group.name for group in groups if any(layers & set(member.layers) for member in group.roles("out"))]
    if not held:
        return error
    named = ", ".join(f"'{name}'" for name in held)
    return OptionError(f"'{error.name}' is no group of channels: what this layer writes goes with {named}; name that instead")


def kept_positions(program: Program, groups: Iterable[Group], removed: Mapping[str, Sequence[int]]) -> Kept:
    """What stays along each cut dimension of each value: node name -> [(dimension, positions), ...]."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        for node, dim, indices in group.values if group.name in removed else ():
            gone.setdefault((node, dim), set()).update(i for atom in removed[group.name] for i in indices[atom])
    shapes = {node.name: shape_of(node) for node in program.nodes if node.op == "call_function" and is_tensor(node)}
    kept: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for (node, dim), positions in gone.items():
        stay = [i for i in range(shapes[node][dim]) if i not in positions]
        kept.setdefault(node, []).append((dim, torch.tensor(stay)))
    return kept
