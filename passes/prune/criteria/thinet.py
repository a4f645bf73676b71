"""thinet: what the layers that read an atom lose when it goes, with or without making up for it from the atoms that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....ir.errors import PassError
from ....ir.program import Program
from ...base import PassContext
from ...layerwise import LayerRows, Layerwise, signal_of
from ..group import Group, Member
from .base import Criterion, Importance, register

#: Share of the mean diagonal that is added to X^T X, so that it has an inverse.
DAMPING = 1e-3


@register
@dataclass(frozen=True)
class Thinet(Criterion):
    """importance = growth of the readers' output error when an atom goes, in the order of a greedy elimination.

    Luo et al. 2017, ThiNet (arXiv:1707.06342, equation 6), picks the channels whose loss changes the next layer's outputs least,
    by a greedy search. `refit=true` lets the channels that stay make up for each loss before the next one is chosen: with H the
    centred X^T X of a reader's inputs and W its least-squares weight, removing the columns S costs

        W_S^T ((H^-1)_SS)^-1 W_S        and        W -= (H^-1)_:S ((H^-1)_SS)^-1 W_S

    (Hassibi & Stork 1993, Optimal Brain Surgeon, for whole blocks of columns as in Kurtic et al. 2023, ZipLM,
    arXiv:2302.04089). That is the error which `prune-channels{reconstruct=true}` then leaves. Errors of several readers are each
    relative to the reader's output variance, and add up. The atom that goes first has the least importance, and the sum over the
    atoms removed is the group's relative error, so that groups are comparable as far as their readers are equally sensitive.

    Options:
        refit: see above; false is the paper's choice, which keeps the readers' weights.
        samples: calibration samples used at most.
        rows: output positions of a reader used at most.
    """

    name: ClassVar[str] = "thinet"
    needs_calibration: ClassVar[bool] = True

    refit: bool = True
    samples: int = 1024
    rows: int = 16384

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        self.require_positive("samples", "rows")
        samples = context.require_calibration(f"criterion {self.name}").samples[: self.samples]
        reads: dict[str, list[tuple[str, Member]]] = {}
        for group in groups:
            for member in group.roles("in"):
                for layer in member.layers:
                    reads.setdefault(layer, []).append((group.name, member))
        readers: dict[str, list[Reader]] = {group.name: [] for group in groups}
        walk = Layerwise(program, samples, context.progress, f"criterion {self.name}")
        generator = torch.Generator().manual_seed(context.seed)
        for layer in walk.layers():
            found = reads.get(layer.node.name, [])
            if found:
                rows = walk.rows(layer, self.rows, generator)
                for name, member in found:
                    readers[name].append(Reader.of(rows, member, layer.weight[0, 0].numel()))
        for name, those in readers.items():
            if not those:
                raise PassError(
                    f"no convolution or linear layer reads the channels of '{name}', so {self.name} has no outputs to keep; "
                    "ignore the group, or take another criterion (l2, taylor)"
                )
        order = eliminate if self.refit else eliminate_fixed
        return {group.name: order(readers[group.name], group.size) for group in groups}


@dataclass(frozen=True)
class Reader:
    """One layer that reads a group. G groups of the layer, K columns, O outputs; all float64.

    Attributes:
        gram: centred X^T X with damping, (G, K, K).
        weight: (G, K, O).
        columns: (atoms, columns of one atom).
        signal: squared deviation of the outputs from their mean.
    """

    gram: torch.Tensor
    weight: torch.Tensor
    columns: torch.Tensor
    signal: float

    @classmethod
    def of(cls, rows: LayerRows, member: Member, taps: int) -> Reader:
        centred = (rows.inputs - rows.inputs.mean(1, keepdim=True)).to(torch.float32)
        gram = (centred.transpose(1, 2) @ centred).to(torch.float64)
        mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        gram = gram + torch.diag_embed((DAMPING * mean)[:, None].expand(gram.shape[:2]))
        columns = torch.tensor(member.indices)[:, :, None] * taps + torch.arange(taps)
        signal = max(signal_of(rows.targets), 1e-30)
        return cls(gram, rows.weight.transpose(1, 2).to(torch.float64), columns.flatten(1), signal)


def eliminate(readers: Sequence[Reader], atoms: int) -> torch.Tensor:
    """Importance of each atom, (atoms,), where the readers are refitted after each one that goes."""
    inverses = [torch.linalg.inv(reader.gram) for reader in readers]
    weights = [reader.weight.clone() for reader in readers]

    def losses(alive: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(alive), dtype=torch.float64)
        for reader, inverse, weight in zip(readers, inverses, weights, strict=True):
            columns = reader.columns[alive]
            block = inverse[:, columns[:, :, None], columns[:, None, :]]
            own = weight[:, columns]
            total += (own * torch.linalg.solve(block, own)).sum((0, 2, 3)) / reader.signal
        return total

    def remove(atom: int) -> None:
        for index, reader in enumerate(readers):
            columns, inverse, weight = reader.columns[atom], inverses[index], weights[index]
            factor = torch.linalg.solve(inverse[:, columns][:, :, columns], inverse[:, columns], left=True)
            weights[index] = weight - factor.transpose(1, 2) @ weight[:, columns]
            inverses[index] = inverse - inverse[:, :, columns] @ factor

    return _greedy(losses, remove, atoms)


def eliminate_fixed(readers: Sequence[Reader], atoms: int) -> torch.Tensor:
    """Importance of each atom, (atoms,), where the readers keep their weights: ThiNet's own search."""
    # Squared output error where the atoms with mask 1 go: mask^T products mask.
    products = torch.zeros(atoms, atoms, dtype=torch.float64)
    for reader in readers:
        for group in range(len(reader.gram)):
            cross = reader.gram[group] * (reader.weight[group] @ reader.weight[group].T)
            products += cross[reader.columns[:, None, :, None], reader.columns[None, :, None, :]].sum((2, 3)) / reader.signal
    gone = torch.zeros(atoms, dtype=torch.float64)

    def losses(alive: torch.Tensor) -> torch.Tensor:
        return products.diagonal()[alive] + 2 * (products @ gone)[alive]

    def remove(atom: int) -> None:
        gone[atom] = 1.0

    return _greedy(losses, remove, atoms)


def _greedy(losses: Callable[[torch.Tensor], torch.Tensor], remove: Callable[[int], None], atoms: int) -> torch.Tensor:
    """Takes the atom of least loss until none is left; importance never falls along that order."""
    importance = torch.zeros(atoms, dtype=torch.float64)
    alive = torch.arange(atoms)
    last = 0.0
    for _ in range(atoms):
        loss = losses(alive)
        at = int(loss.argmin())
        # A tie would leave the order open; the least step up keeps it.
        last = max(float(loss[at]), last * (1 + 1e-12), 1e-300)
        importance[alive[at]] = last
        remove(int(alive[at]))
        alive = torch.cat([alive[:at], alive[at + 1 :]])
    return importance
