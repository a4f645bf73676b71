"""hessian-eigenvalue: the largest curvature of the loss over a layer's weights, times what rounding moves them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ...ir.content import content_key
from ...ir.errors import OptionError
from .base import Layer, Scorer, Scores, Task, register
from .curvature import Curvature
from .groups import Group, groups_of
from .loss import LossName, choose
from .network import Network, differentiable
from .statistics import sampled


@register
@dataclass(frozen=True)
class HessianEigenvalue(Scorer):
    """loss = 1/2 lambda_l ||Q(w_l) - w_l||^2 with lambda_l the largest eigenvalue of the layer's block of the Hessian.

    Dong et al. 2019, HAWQ (arXiv:1905.03696, section 3.2): power iteration with Hessian products. As a score it is the loss of a
    rounding error that lies along the worst direction, an upper bound of the second-order loss; HAWQ ranks layers by lambda_l
    over their number of weights. The interval is that of the Rayleigh quotients v^T H_g v of groups of samples, v being the
    eigenvector found on all of them.

    Options:
        loss: what H is the Hessian of, see `loss`.
        samples: samples used at most: every iteration of every layer runs all of them.
        iterations: at most; the iteration ends where the eigenvalue changes by less than `tolerance`, relative.
        tolerance: see `iterations`.
    """

    name: ClassVar[str] = "hessian-eigenvalue"

    loss: LossName = "auto"
    samples: int = 64
    iterations: int = 20
    tolerance: float = 0.01

    @property
    def wants_labels(self) -> bool:
        return self.loss == "labels"

    def score(self, task: Task) -> Scores:
        start = time.perf_counter()
        eigenvalues, sizes = self.eigenvalues(task)
        losses = np.zeros((*eigenvalues.shape, len(task.choices)))
        for i, layer in enumerate(task.layers):
            for j, choice in enumerate(task.choices):
                error = float((layer.rounded(choice) - layer.weight).double().square().sum())
                losses[:, i, j] = 0.5 * eigenvalues[:, i] * error
        return sampled(self.name, task, losses, sizes, time.perf_counter() - start)

    def eigenvalues(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Rayleigh quotients of the dominant eigenvector, (groups, layers), whose mean is the eigenvalue, and the groups' sizes.

        Each layer is stored when it is done.

        Raises:
            OptionError: no iteration, or no sample.
            NotDifferentiableError: an op without the derivatives this needs.
        """
        if self.iterations < 1 or self.samples < 1:
            raise OptionError(f"options 'iterations' and 'samples' of {self.name} must be at least 1")
        loss = choose(self.loss, task.program)
        self.require(task)
        groups = groups_of(task, self.samples)
        network = Network(task.program, task.layers)
        with differentiable(task.program, self.name):
            curvatures = [Curvature(network, loss, group) for group in groups]
            data = [(group.inputs, group.labels) for group in groups]
            common = content_key(task.program, data, repr(self), task.seed)
            columns = []
            for done, layer in enumerate(task.layers, 1):
                key = content_key(common, layer.origin)
                columns.append(task.store.remember(self.name, key, lambda x=layer: self._iterate(curvatures, x, task.seed)))
                task.progress(done, len(task.layers), f"score: {self.name}")
        return np.array(columns, dtype=np.float64).T, np.array([len(group) for group in groups])

    def _iterate(self, curvatures: list[Curvature], layer: Layer, seed: int) -> list[float]:
        """The Rayleigh quotient of every group at the end of the power iteration."""
        generator = Group(0, ()).generator(seed)
        weights = np.array([len(c.group) for c in curvatures], dtype=np.float64)
        weights /= weights.sum()
        v = torch.randn(layer.weight.shape, generator=generator)
        previous = 0.0
        quotients: list[float] = []
        for _ in range(self.iterations):
            v = v / v.norm()
            products = [c.product({layer.origin: v})[layer.origin] for c in curvatures]
            quotients = [float((v * p).sum()) for p in products]
            value = float(np.dot(weights, quotients))
            v = torch.stack([w * p for w, p in zip(weights.tolist(), products, strict=True)]).sum(0)
            if abs(value - previous) <= self.tolerance * abs(value) or not bool(v.any()):
                break
            previous = value
        return quotients
