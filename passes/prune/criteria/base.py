"""The criterion contract.

A criterion is a frozen dataclass whose fields are its options and whose kebab-case `name` is its name in text, written like a
pass: `taylor{samples=64}`. It gives every atom of every group a number: the atoms with the smallest ones go first. Numbers of one
group are comparable; those of two groups only as far as the criterion's docstring says.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch

from ....ir.errors import OptionError, PassError
from ....ir.program import Program
from ....ir.registry import Registry
from ...base import PassContext
from ..group import Group, Member

#: Group name -> (atoms,) float64.
Importance = dict[str, torch.Tensor]


class Criterion(abc.ABC):
    """Base of all criteria; see the module text."""

    name: ClassVar[str]
    #: Whether it refuses to run without calibration samples.
    needs_calibration: ClassVar[bool] = False

    @abc.abstractmethod
    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        """What each atom is worth, none negative. Random choices come from `context.seed`."""

    def require_positive(self, *options: str) -> None:
        """Raises OptionError where one of the options is below 1."""
        for option in options:
            if getattr(self, option) < 1:
                raise OptionError(f"option '{option}' of {self.name} must be at least 1, not {getattr(self, option)}")


def rows_along(parameter: torch.Tensor, member: Member) -> torch.Tensor:
    """What each atom takes of a parameter, or of a tensor of its shape: (atoms, values) float64."""
    moved = parameter.to(torch.float64).movedim(member.dim, 0)
    return moved.reshape(len(moved), -1)[torch.tensor(member.indices)].flatten(1)


def filters(program: Program, group: Group) -> list[torch.Tensor]:
    """The weights that write a group's channels, each as (atoms, values of the atom's filters) float64.

    Raises:
        PassError: no layer writes the group.
    """
    written = group.roles("out")
    if not written:
        raise PassError(f"no layer with a weight writes the channels of '{group.name}', so its filters have no norm; ignore it")
    parameters = program.parameters()
    return [rows_along(parameters[member.parameter].detach(), member) for member in written]


_CRITERIA: Registry[Criterion] = Registry("criterion", __package__ or "")
register, registry, find = _CRITERIA.register, _CRITERIA.all, _CRITERIA.find
