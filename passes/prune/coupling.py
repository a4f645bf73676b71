"""Coupling analysis: which channels of which parameters must go together.

One walk over the graph gives every index of every dimension an atom (`atoms`, `axes`); the rules of the operators join them.
Parameters are where atoms begin: each of their dimensions has fresh ones, and whatever meets is joined. At the end, atoms that
stand in the same dimensions of the same values, equally often, form a group.

After Fang et al. 2023 (DepGraph, arXiv:2301.12900), which couples whole dimensions of modules; here single indices of tensors are
coupled, so heads, packed projections, interleaved channels and concatenations need no special case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from ...ir.errors import PassError
from ...ir.program import Program, Stage, origin_of
from . import rules_layers, rules_shapes  # noqa: F401 (they register their rules)
from .axes import Axis, Coupling
from .group import Group, Member
from .rules_values import transfer


@dataclass(frozen=True)
class Place:
    """A labelled dimension of a parameter (`node` is then its name) or of a node's value; `item` of several outputs."""

    node: str
    dim: int
    is_parameter: bool
    item: int | None = None


@dataclass
class Analysis:
    """What the walk found.

    Attributes:
        places: every dimension with labels -> a key that dimensions of equal labels share.
        free: key -> the free atoms behind each index of these dimensions.
        groups: name -> the group, and the free atom behind each of its atoms, in order.
    """

    coupling: Coupling
    places: dict[Place, bytes]
    free: dict[bytes, list[tuple[int, ...]]]
    groups: dict[str, tuple[Group, tuple[int, ...]]]

    def stays(self, key: bytes, gone: set[int]) -> np.ndarray:
        """Which indices stay when these free atoms go."""
        return np.array([gone.isdisjoint(atoms) for atoms in self.free[key]])


def coupled_groups(program: Program) -> tuple[Group, ...]:
    """Every group of channels of a canonical or compressed program, in graph order; those that cannot be cut say what pins them.

    Dimensions that no layer writes (positions, windows, masks, the network's own input channels) are listed only where they can
    be cut.

    Raises:
        PassError: the program is of another stage.
    """
    return tuple(group for group, _ in analyze(program).groups.values())


def analyze(program: Program) -> Analysis:
    """The walk, and the groups with the atoms behind them; `cut` works on these."""
    if program.stage not in (Stage.CANONICAL, Stage.COMPRESSED):
        raise PassError(
            f"channels are cut from canonical or compressed programs, but '{program.name}' is {program.stage.label}"
            + ("; run canonicalize first" if program.stage is Stage.CAPTURED else "; prune before quantizing")
        )
    coupling = Coupling(program)
    for node in program.nodes:
        if node.op == "placeholder":
            coupling.axes[node] = (Axis(),) * node.meta["val"].dim()
        elif node.op == "get_attr":
            coupling.axes[node] = coupling.parameter(node)
        elif node.op == "call_function":
            coupling.axes[node] = transfer(coupling, node)
    names = [spec.name for spec in program.output_specs]
    for node, name in zip(program.outputs, names, strict=True):
        coupling.pin_all(coupling.of(node), f"it reaches the network's output '{name}'")
    places, free = _places(coupling)
    return Analysis(coupling, places, free, _groups(coupling, places, free))


def _labelled(coupling: Coupling) -> Iterator[tuple[Place, np.ndarray]]:
    for name, dims in coupling.parameters.items():
        for k, axis in enumerate(dims):
            if axis.labels is not None:
                yield Place(name, k, True), axis.labels
    for node, value in coupling.axes.items():
        if node.op != "call_function":
            continue
        for item, dims in enumerate(value) if isinstance(value, list) else [(None, value)]:
            for k, axis in enumerate(dims):
                if axis.labels is not None:
                    yield Place(node.name, k, False, item), axis.labels


def _places(coupling: Coupling) -> tuple[dict[Place, bytes], dict[bytes, list[tuple[int, ...]]]]:
    """Every labelled dimension with the key of its labels, and the free atoms behind each of them."""
    places: dict[Place, bytes] = {}
    free: dict[bytes, list[tuple[int, ...]]] = {}
    resolved: dict[int, tuple[int, ...]] = {}
    for place, labels in _labelled(coupling):
        key = np.ascontiguousarray(labels).tobytes()
        if key not in free:
            for atom in labels.tolist():
                if atom not in resolved:
                    resolved[atom] = coupling.atoms.resolve(atom)
            free[key] = [resolved[atom] for atom in labels.tolist()]
        places[place] = key
    return places, free


def _groups(
    coupling: Coupling, places: dict[Place, bytes], free: dict[bytes, list[tuple[int, ...]]]
) -> dict[str, tuple[Group, tuple[int, ...]]]:
    by_key = {key: _positions(labels) for key, labels in free.items()}
    positions = {place: by_key[key] for place, key in places.items()}
    pins = coupling.atoms.pins()
    holders: dict[int, list[Place]] = {}
    for place, key in places.items():
        for atom, (_, indices) in positions[place].items():
            holders.setdefault(atom, []).append(place)
            if len(indices) == len(free[key]):
                pins.setdefault(atom, f"it is the whole of dimension {place.dim} of '{place.node}'")
    # Atoms that stand in the same places, at the same factor and equally often, are alike; pinned ones, in the same parameters.
    classes: dict[tuple[frozenset, bool], list[int]] = {}
    for atom, held in holders.items():
        held = holders[atom] = [place for place in held if place.is_parameter or atom not in pins]
        kind = frozenset((place, positions[place][atom][0], len(positions[place][atom][1])) for place in held)
        classes.setdefault((kind, atom in pins), []).append(atom)
    names = _Names(coupling)
    found = []
    for atoms in classes.values():
        first, pinned = atoms[0], pins.get(atoms[0], "")
        rows = {place: tuple(tuple(positions[place][atom][1]) for atom in atoms) for place in holders[first]}
        # Where the labels are products, which factor of them the group is.
        factors = {place: positions[place][first][0] for place in rows if len(free[places[place]][rows[place][0][0]]) > 1}
        group = names.group(rows, factors, pinned)
        if group is not None:
            found.append((*group, tuple(atoms)))
    return _numbered(found)


def _positions(labels: list[tuple[int, ...]]) -> dict[int, tuple[int, list[int]]]:
    """Free atom -> the factor that it is of its first index, and all indices that it takes."""
    found: dict[int, tuple[int, list[int]]] = {}
    for index, atoms in enumerate(labels):
        for factor, atom in enumerate(atoms):
            found.setdefault(atom, (factor, []))[1].append(index)
    return found


def _numbered(found: list[tuple[tuple, Group, tuple[int, ...]]]) -> dict[str, tuple[Group, tuple[int, ...]]]:
    """Groups by name in graph order; the second and later of one name get its number."""
    result: dict[str, tuple[Group, tuple[int, ...]]] = {}
    seen: Counter[str] = Counter()
    for _, group, atoms in sorted(found, key=lambda entry: entry[0]):
        seen[group.name] += 1
        name = group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}"
        result[name] = replace(group, name=name), atoms
    return result


class _Names:
    """Roles, order and names of members, from the nodes that read them."""

    def __init__(self, coupling: Coupling) -> None:
        self.roles = coupling.roles
        self.position = {node: k for k, node in enumerate(coupling.program.nodes)}
        self.readers: dict[str, list[fx.Node]] = {}
        for node in coupling.program.nodes:
            if node.op == "get_attr":
                self.readers.setdefault(str(node.target), []).extend(node.users)

    def group(
        self, rows: dict[Place, tuple[tuple[int, ...], ...]], factors: dict[Place, int], pinned: str
    ) -> tuple[tuple, Group] | None:
        """Sort key and description of a class of atoms; None where nobody could want to cut it.

        The name is that of the first layer that writes it, or else of its first reader.
        """
        members = [self.member(place, indices) for place, indices in rows.items() if place.is_parameter]
        size = len(next(iter(rows.values()), ()))
        if not members or not (any(m.role == "out" for m in members) or (not pinned and size > 1)):
            return None
        if size == 1 and not pinned:
            pinned = "it is a single atom, and one must stay"
        first = min(members, key=lambda m: (m.role != "out", *self.order(m)))
        factor = factors.get(Place(first.parameter, first.dim, True))
        node = self.first_reader(first)
        name = origin_of(node) + ("" if factor is None else f":{factor}")
        values = tuple((p.node, p.dim, indices) for p, indices in rows.items() if not p.is_parameter and p.item is None)
        rank = self.position[node], factor or 0, first.indices[0]
        return rank, Group(name, size, tuple(sorted(members, key=self.order)), values, pinned)

    def member(self, place: Place, indices: tuple[tuple[int, ...], ...]) -> Member:
        by_role = self.roles.get((place.node, place.dim), {})
        role = next((r for r in ("out", "in") if r in by_role), "along")
        readers = by_role.get(role) or self.readers[place.node]
        return Member(place.node, place.dim, indices, role, tuple(n.name for n in sorted(readers, key=self.position.__getitem__)))

    def first_reader(self, member: Member) -> fx.Node:
        by_role = self.roles.get((member.parameter, member.dim), {})
        return min(by_role.get(member.role) or self.readers[member.parameter], key=self.position.__getitem__)

    def order(self, member: Member) -> tuple:
        return self.position[self.first_reader(member)], member.role != "out", member.parameter, member.dim
