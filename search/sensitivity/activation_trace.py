"""activation-trace: the average curvature of the loss along a layer's activations, times what rounding moves them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from ...ir.batch import over_samples
from ...ir.errors import OptionError
from ...ir.program import shape_of
from ...passes.quantize.encoding import Encoding, for_range
from ...passes.quantize.formats import IntegerFormat, parse_format
from ...passes.quantize.histogram import Histogram
from ...passes.quantize.observers import Grid, activation_observer
from .base import Scorer, Scores, Task, register
from .curvature import Curvature
from .groups import Group, collect, groups_of, layers_key
from .layers import activation_of
from .loss import LossName, choose
from .network import Network, differentiable
from .statistics import sampled


@register
@dataclass(frozen=True)
class ActivationTrace(Scorer):
    """loss = 1/2 E[tr(H_a)/n_a ||Q(a) - a||^2] over samples, a being what a layer hands on, after a fused relu or clamp.

    Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852, section 3.4): the Hessian over the activations of one sample has no terms between
    samples, so its trace is estimated sample by sample and multiplied with that sample's own error. Traces are those of
    `hessian-trace`, over activations: one backward pass for all layers.

    A choice is here the format of the activation: `int4` and `uint4` are 4-bit codes of one scale for the whole tensor,
    asymmetric, with the range that the `mse` observer of the `quantize` pass chooses on the samples.

    Options:
        loss: what H is the Hessian of: `self`, `squared` or `auto`, see `loss`.
        probes: random vectors a sample.
    """

    name: ClassVar[str] = "activation-trace"
    of: ClassVar[str] = "activations"

    loss: LossName = "auto"
    probes: int = 1

    def score(self, task: Task) -> Scores:
        """Raises OptionError for a choice that no activation can have, or a loss with labels."""
        start = time.perf_counter()
        loss = choose(self.loss, task.program)
        if self.probes < 1 or loss.needs_labels:
            raise OptionError(f"{self.name} takes at least 1 probe and loss self, squared or auto, not {self}")
        self.require(task)
        network = Network(task.program, task.layers)
        nodes = [activation_of(layer) for layer in task.layers]
        groups = groups_of(task)
        encodings = _encodings(task, network, nodes, groups)

        def compute(group: Group) -> np.ndarray:
            with differentiable(task.program, self.name):
                curvature = Curvature(network, loss, group)
                generator = group.generator(task.seed)
                traces = torch.stack([curvature.activation_traces(nodes, generator) for _ in range(self.probes)]).mean(0)
            with torch.no_grad():
                errors = over_samples(lambda inputs: _errors(network, nodes, encodings, inputs), group.inputs)
            sizes = torch.tensor([math.prod(shape_of(node)) for node in nodes])
            return (0.5 * (traces / sizes)[:, :, None].double() * errors.double()).mean(0).numpy()

        # The encodings depend on all samples.
        data = tuple(group.inputs for group in groups)
        values, sizes = collect(task, self, groups, compute, (layers_key(task), task.choices, data))
        return sampled(self.name, task, values, sizes, time.perf_counter() - start)


def _encodings(task: Task, network: Network, nodes: list[fx.Node], groups: tuple[Group, ...]) -> list[list[Encoding]]:
    """The activation encoding of each node in each choice."""
    bits = []
    for choice in task.choices:
        form = parse_format(choice)
        if not isinstance(form, IntegerFormat):
            raise OptionError(f"choice '{choice}' is no format of an activation; activations have int2 to int8")
        bits.append(form.bits)
    histograms = [Histogram(f"'{node.name}'") for node in nodes]
    with torch.no_grad():
        for group in groups:
            found = over_samples(lambda inputs: [network.values(inputs)[node] for node in nodes], group.inputs)
            for histogram, value in zip(histograms, found, strict=True):
                histogram.observe(value)
    observer = activation_observer("mse")
    return [[for_range(*observer(histogram, Grid(b)), b) for b in bits] for histogram in histograms]


def _errors(
    network: Network, nodes: list[fx.Node], encodings: list[list[Encoding]], inputs: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """||Q(a) - a||^2 of one sample, (layers, choices)."""
    values = network.values(inputs)
    rows = []
    for node, choices in zip(nodes, encodings, strict=True):
        a = values[node]
        rows.append(torch.stack([(e.dequantize(e.quantize(a)) - a).square().sum() for e in choices]))
    return torch.stack(rows)
