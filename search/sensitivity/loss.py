"""What the network loses: the function whose curvature, gradient or value a scorer takes at the float point.

    self     KL(p_float || p) of class probabilities in nats, no labels. Its Hessian at the float point is the Gauss-Newton matrix
             J^T (diag p - p p^T) J, also the Fisher matrix of the model's own distribution (Martens 2020, arXiv:1412.1193).
    labels   cross entropy with true labels, in nats. Its Hessian has a second term, which vanishes where the model is right.
    squared  sum over outputs of ||y - y_float||^2 / ||y_float||^2, for outputs that are no class scores.
    auto     `self` where the one output is made by a linear layer of two or more outputs (a softmax or moves behind it count as
             part of it), `squared` otherwise. A regression with a linear head must ask for `squared`.

Values are means over everything but classes, per sample.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx

from ...ir.errors import OptionError
from ...ir.program import Program, shape_of
from ...passes.outputs import class_scores, is_classifier
from .network import Values

LossName = Literal["auto", "self", "labels", "squared"]


@dataclass(frozen=True)
class Loss(abc.ABC):
    """A function of one sample's values and its target. `nodes` are the values it reads."""

    name: str
    nodes: tuple[fx.Node, ...]

    @property
    def needs_labels(self) -> bool:
        return False

    @abc.abstractmethod
    def target(self, values: Values, labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What `value` compares with, from the float model's values and the sample's labels (batch, ...)."""

    @abc.abstractmethod
    def value(self, values: Values, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss of one sample, ()."""

    @abc.abstractmethod
    def root(self, values: Values, signs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """B r, where B B^T is the Hessian of the loss over the float model's `nodes`; r are `signs`, of the same shapes."""


class _ClassLoss(Loss):
    def root(self, values: Values, signs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # diag(p) - p p^T = B B^T with B = diag(q) (I - q q^T) and q = sqrt(p); positions are averaged.
        scores = values[self.nodes[0]]
        q = scores.softmax(-1).sqrt()
        projected = signs[0] - q * (q * signs[0]).sum(-1, keepdim=True)
        return (q * projected / (scores.numel() / scores.shape[-1]) ** 0.5,)


class SelfLoss(_ClassLoss):
    """KL divergence from the float model's class probabilities, in nats."""

    def target(self, values: Values, labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return (values[self.nodes[0]].log_softmax(-1),)

    def value(self, values: Values, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        expected = target[0]
        return (expected.exp() * (expected - values[self.nodes[0]].log_softmax(-1))).sum(-1).mean()


class LabelLoss(_ClassLoss):
    """Cross entropy with true labels, in nats."""

    @property
    def needs_labels(self) -> bool:
        return True

    def target(self, values: Values, labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        assert labels is not None
        return (labels,)

    def value(self, values: Values, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        scores = values[self.nodes[0]]
        return F.cross_entropy(scores.flatten(0, -2), target[0].flatten())


class SquaredLoss(Loss):
    """Squared distance to the float outputs, relative to their squared length, summed over outputs."""

    def target(self, values: Values, labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return tuple(values[node] for node in self.nodes)

    def value(self, values: Values, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.stack([relative_error(values[n], y) for n, y in zip(self.nodes, target, strict=True)]).sum()

    def root(self, values: Values, signs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple((2.0 / _signal(values[n])).sqrt() * r for n, r in zip(self.nodes, signs, strict=True))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """||actual - expected||^2 / ||expected||^2, (); the plain squared error where the expected value is all zeros."""
    return (actual - expected).square().sum() / _signal(expected)


def _signal(expected: torch.Tensor) -> torch.Tensor:
    signal = expected.square().sum()
    return torch.where(signal > 0, signal, torch.ones_like(signal))


def choose(name: LossName, program: Program) -> Loss:
    """The loss called `name` for this program.

    Raises:
        OptionError: class scores asked for where the program has several outputs or no class axis.
    """
    if name == "auto":
        name = "self" if is_classifier(program) else "squared"
    if name == "squared":
        return SquaredLoss(name, tuple(program.outputs))
    outputs = program.outputs
    if len(outputs) != 1 or len(shape_of(outputs[0])) < 2 or shape_of(outputs[0])[-1] == 1:
        found = ", ".join(str(tuple(shape_of(o))) for o in outputs)
        raise OptionError(
            f"loss '{name}' takes one output of class scores (..., classes); '{program.name}' has {found}: use squared"
        )
    return (SelfLoss if name == "self" else LabelLoss)(name, (class_scores(outputs[0]),))
