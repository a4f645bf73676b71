"""Derivatives of the loss at the float point, over groups of samples: gradients of each sample and Hessian products.

H = G + R      G = J^T F J (Gauss-Newton; F is the loss's Hessian with respect to the outputs, J the outputs' Jacobian)
               R = sum over outputs k of dloss/dy_k * Hessian of y_k;  0 where the loss is at its minimum (self, squared)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.func import grad, jvp

from ...ir.batch import over_samples
from ...ir.program import shape_of
from .groups import Group
from .loss import Loss
from .network import Network, Values

Vectors = dict[str, torch.Tensor]


class Curvature:
    """The Hessian of the mean loss over one group of samples, as a linear map."""

    def __init__(self, network: Network, loss: Loss, group: Group) -> None:
        self.network, self.loss, self.group = network, loss, group
        with torch.no_grad():
            self.targets = over_samples(self._target, group.inputs, group.labels if loss.needs_labels else None)

    def _target(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return self.loss.target(self.network.values(inputs), labels)

    def mean_loss(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss over the group with other weights, ()."""

        def one(inputs: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return self.loss.value(self.network.values(inputs, weights), target)

        return over_samples(one, self.group.inputs, self.targets).mean()

    def product(self, vectors: Vectors) -> Vectors:
        """(H v) over the weights named in `vectors`; the other weights are constants."""
        weights = {origin: self.network.weights[origin] for origin in vectors}
        return jvp(grad(self.mean_loss), (weights,), (vectors,))[1]

    def residual_product(self, vectors: Vectors) -> Vectors:
        """(R v) over the weights named in `vectors`."""

        def one(
            inputs: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...], weights: Mapping[str, torch.Tensor]
        ) -> torch.Tensor:
            values = self.network.values(inputs, weights)
            outputs = tuple(values[node] for node in self.loss.nodes)
            slopes = grad(lambda y: self.loss.value(dict(zip(self.loss.nodes, y, strict=True)), target))(outputs)
            return dot(tuple(slope.detach() for slope in slopes), outputs)

        weights = {origin: self.network.weights[origin] for origin in vectors}
        mean = grad(lambda w: over_samples(lambda x, t: one(x, t, w), self.group.inputs, self.targets).mean())
        return jvp(mean, (weights,), (vectors,))[1]

    def gradients(self) -> Vectors:
        """Gradient of every sample's loss over all weights, each (samples, *weight shape)."""

        def one(inputs: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...]) -> Vectors:
            return grad(lambda w: self.loss.value(self.network.values(inputs, w), target))(self.network.weights)

        return over_samples(one, self.group.inputs, self.targets)

    def gauss_newton_probes(self, generator: torch.Generator) -> Vectors:
        """J_i^T B_i r_i of every sample i over all weights, each (samples, *weight shape), with B B^T = F and random signs r.

        The mean of its square is the diagonal of G: Hutchinson's estimator of tr(B^T J J^T B) = tr(G), with probes in the small
        space of outputs instead of that of weights.
        """
        signs = self._signs(generator)

        def one(inputs: tuple[torch.Tensor, ...], r: tuple[torch.Tensor, ...]) -> Vectors:
            return grad(lambda w: self._projected(self.network.values(inputs, w), r))(self.network.weights)

        return over_samples(one, self.group.inputs, signs)

    def activation_traces(self, nodes: list[fx.Node], generator: torch.Generator) -> torch.Tensor:
        """One Hutchinson estimate of the trace of G_i over the value of each node, for every sample i: (samples, nodes)."""
        signs = self._signs(generator)

        def one(inputs: tuple[torch.Tensor, ...], r: tuple[torch.Tensor, ...]) -> torch.Tensor:
            def projected(offsets: dict[str, torch.Tensor]) -> torch.Tensor:
                return self._projected(self.network.values(inputs, offsets={node: offsets[node.name] for node in nodes}), r)

            slopes = grad(projected)({node.name: torch.zeros(shape_of(node)) for node in nodes})
            return torch.stack([slopes[node.name].square().sum() for node in nodes])

        return over_samples(one, self.group.inputs, signs)

    def _signs(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        return tuple(rademacher((len(self.group), *shape_of(node)), generator) for node in self.loss.nodes)

    def _projected(self, values: Values, signs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(B r) . y, with B r a constant."""
        root = self.loss.root(values, signs)
        return dot(tuple(z.detach() for z in root), tuple(values[node] for node in self.loss.nodes))


def dot(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(left, right, strict=True)]).sum()


def rademacher(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """-1 or 1, each with probability one half."""
    return torch.randint(0, 2, tuple(shape), generator=generator).mul_(2).sub_(1).to(torch.float32)
