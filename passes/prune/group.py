"""What can be cut from a program, as plain data: groups of atoms, and the parameter slices that go with each atom."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """Slices of one parameter along one dimension: `indices[a]` go when atom `a` of the group goes.

    A parameter that two factors index (heads and head width) is a member of two groups, and of one group twice where two of its
    dimensions are coupled.

    Attributes:
        parameter: the parameter's name in the program (`Program.parameters()`).
        dim: the dimension of the parameter, counted from the front.
        indices: (atoms, width) positions along `dim`, ascending in each row; rows do not overlap.
        role: "out" where a layer writes these channels (output channels of a convolution or linear, features of an embedding),
            "in" where a layer sums over them (its input channels), "along" for everything that has one value a channel
            (biases, scales, positions).
        layers: names of the nodes that read the parameter in this role, in graph order.
    """

    parameter: str
    dim: int
    indices: tuple[tuple[int, ...], ...]
    role: str
    layers: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many indices one atom takes."""
        return len(self.indices[0])

    def __str__(self) -> str:
        each = "" if self.width == 1 else f", {self.width} an atom"
        return f"{self.role:5} {self.parameter} dim {self.dim}{each}"


@dataclass(frozen=True)
class Group:
    """Channels that are coupled through the graph, as `size` atoms: an atom is the least that can be cut.

    All atoms of a group stand in the same dimensions of the same values and parameters, each the same number of times, so any of
    them can go as long as one stays.

    Attributes:
        name: the origin of the first layer that writes these channels; `:k` where that layer's channels are a product of factors
            (`attn.qkv:1`: heads of a view as (3, heads, width)), `#n` where one layer writes several groups.
        size: number of atoms.
        members: the parameters that shrink, layers' weights first written first.
        values: the computed values that carry these channels, as (node name, dimension, (atoms, width) indices); not listed for a
            pinned group.
        pinned: why nothing of it can be cut ("layer_norm at 'blocks.0.norm1' ..."); empty where it can.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    values: tuple[tuple[str, int, tuple[tuple[int, ...], ...]], ...]
    pinned: str = ""

    def roles(self, role: str) -> tuple[Member, ...]:
        """The members of one role."""
        return tuple(m for m in self.members if m.role == role)

    def __str__(self) -> str:
        head = f"{self.name}: {self.size} atoms" + (f", pinned: {self.pinned}" if self.pinned else "")
        return "\n".join([head, *(f"    {member}" for member in self.members)])
