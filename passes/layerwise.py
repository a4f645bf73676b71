"""Work on a network layer by layer, on data: what calibrated rewrites of weights share (rounding, sparsity, low rank, pruning).

A layer is seen as a matrix product at a sample of its output positions (`LayerRows`), so convolutions of any geometry and linear
layers are one case and the work does not grow with the resolution. Each layer is shown what it reads after the layers before it
were rewritten, beside what it reads in the original network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..ir.data import Sample
from ..ir.program import Program
from .fold.layer import Layer, layer_of

#: Rows whose squared deviation is a smaller share of their squares do not vary: what is left is rounding of float32.
NO_VARIANCE = 1e-10

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerRows:
    """A layer as one product a group of channels, at M output positions: (G, M, K) by (G, K, O) and bias (G, 1, O).

    G groups of O output channels, K inputs an output (channels a group times taps, channels outside); a linear layer has one
    group. Float32. The rows of a sample lie in random order; the last quarter of the samples comes last.

    Attributes:
        inputs: what the layer reads now, after the rewrites before it, (G, M, K).
        exact_inputs: what it reads in the original network, (G, M, K).
        targets: outputs in the original network, (G, M, O).
        weight: the original weight, (G, O, K).
        bias: the original bias, (G, 1, O), zeros where there is none.
        fitted: so many rows are of the first three quarters of the samples; what was fitted to them can be checked on the others.
    """

    inputs: torch.Tensor
    exact_inputs: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    fitted: int

    def outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """(G, M, O) with another weight."""
        return torch.baddbmm(self.bias, self.inputs, weight.transpose(1, 2))

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
        """Squared error of the outputs, relative to the squared deviation of the original outputs from their mean."""
        outputs = self.outputs(weight) + (0.0 if bias is None else bias - self.bias)
        return relative_error(float((outputs - self.targets).square().sum(dtype=torch.float64)), signal_of(self.targets))


def signal_of(wanted: torch.Tensor) -> float:
    """What squared errors of outputs (G, rows, O) are relative to: their squared deviation from their means over the rows.

    Rows that do not vary (few of them, or behind a clamp that is always met) have next to none, and any error would look huge
    beside it; there it is their sum of squares.
    """
    wanted = wanted.to(torch.float64)
    whole = float(wanted.square().sum())
    varied = float((wanted - wanted.mean(1, keepdim=True)).square().sum())
    return varied if varied > NO_VARIANCE * whole else whole


def relative_error(error: float, signal: float) -> float:
    """A squared error over `signal`; the error itself where all that is wanted is zero."""
    return error / signal if signal > 0 else error


@dataclass
class TwoRuns:
    """Runs a program twice at once over all samples: `values`, and `exact`, the original network. Subclasses say how they differ.

    Values go by node and sample; each is dropped after its last reader, so that a few activations are in memory.
    """

    program: Program
    samples: Sequence[Sample]
    progress: Callable[[int, int, str], None]
    what: str
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    exact: dict[fx.Node, list[Any]] = field(default_factory=dict)

    def value_of(self, node: fx.Node) -> list[Any]:
        """The values of `node`, given those of its inputs in `values`."""
        return self.evaluate(node, self.values)

    def exact_of(self, node: fx.Node) -> list[Any]:
        """The original values of `node`, given those of its inputs in `exact`."""
        return self.evaluate(node, self.exact)

    def nodes(self) -> Iterator[fx.Node]:
        """Every node once its values are there, with those of its inputs.

        The caller may replace a node's values, or rewrite what it reads and ask for them again, before it goes on.
        """
        last_reader = {a: n for n in self.program.nodes for a in n.all_input_nodes}
        nodes = [n for n in self.program.nodes if n.op != "output"]
        for index, node in enumerate(nodes):
            with torch.no_grad():
                self.exact[node] = self.exact_of(node)
                self.values[node] = self.value_of(node)
            yield node
            for read in (node, *node.all_input_nodes):
                if last_reader.get(read, node) is node:
                    self.exact.pop(read, None)
                    self.values.pop(read, None)
            self.progress(index + 1, len(nodes), self.what)

    def evaluate(self, node: fx.Node, known: dict[fx.Node, list[Any]]) -> list[Any]:
        """The node's values on every sample, given those of its inputs."""
        count = len(self.samples)
        if node.op == "placeholder":
            position = self.program.inputs.index(node)
            return [sample[position] for sample in self.samples]
        if node.op == "get_attr":
            return [self.program.parameter(node)] * count
        constant = all(n.op == "get_attr" for n in node.all_input_nodes)
        results = []
        for index in range(1 if constant else count):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, i=index: known[n][i])  # type: ignore[misc]
            results.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return results * count if constant else results


@dataclass
class Layerwise(TwoRuns):
    """Shows the layers of a float program in order; `rewrite` gives a layer the weight that the layers after it shall see.

        walk = Layerwise(program, samples, context.progress, self.name)
        for layer in walk.layers():
            rows = walk.rows(layer, count, generator)
            walk.rewrite(layer, weight)                 # the dense weight that the rewritten layer is equal to

    The walk leaves the program as it is: a pass edits it afterwards, by its `Layer`s, so that a layer may become several.
    """

    rewritten: dict[fx.Node, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def layers(self) -> Iterator[Layer]:
        """The convolutions (not transposed) and linear layers with constant parameters, once their inputs' values are there."""
        for node in self.nodes():
            layer = layer_of(self.program, node)
            if layer is not None and not layer.transposed:
                yield layer

    def rows(self, layer: Layer, count: int, generator: torch.Generator) -> LayerRows:
        """The layer at up to `count` output positions, drawn evenly from all samples."""
        source, node = layer.input, layer.node
        return gather_rows(
            node, layer.weight, layer.bias, self.values[source], self.exact[source], self.exact[node], count, generator
        )  # fmt: skip

    def rewrite(self, layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """From here on the layer computes with `weight`, shaped as its own, or (G, O, K); `bias` None keeps its own."""
        bias = layer.bias if bias is None else bias.reshape(-1).to(layer.weight.dtype)
        self.rewritten[layer.node] = weight.reshape(layer.weight.shape).to(layer.weight.dtype), bias
        with torch.no_grad():
            self.values[layer.node] = self.value_of(layer.node)

    def value_of(self, node: fx.Node) -> list[Any]:
        if node not in self.rewritten:
            return super().value_of(node)
        weight, bias = self.rewritten[node]
        call: Callable[..., torch.Tensor] = node.target  # type: ignore[assignment]
        return [call(x, weight, bias, *node.args[3:]) for x in self.values[node.args[0]]]  # type: ignore[index]


def gather_rows(
    node: fx.Node,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    values: Sequence[torch.Tensor],
    exact_values: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    count: int,
    generator: torch.Generator,
) -> LayerRows:
    """The rows of a layer at up to `count` output positions, drawn evenly from all samples, in random order a part.

    values, exact_values: what the layer reads, a tensor a sample; targets: what it returned in the original network.
    """
    convolution = node.target is aten.convolution.default
    groups = int(node.args[8]) if convolution else 1  # type: ignore[arg-type]
    weight = weight.detach()
    per_sample = max(1, count // len(values))
    inputs, exact_inputs, outputs = [], [], []
    for value, exact, target in zip(values, exact_values, targets, strict=True):
        target = target.movedim(1, -1) if convolution else target
        places = math.prod(target.shape[:-1])
        chosen = torch.randperm(places, generator=generator)[:per_sample]
        outputs.append(target.reshape(places, -1)[chosen])
        for found, given in ((inputs, value), (exact_inputs, exact)):
            found.append(_patches(node, given, chosen, target.shape[:-1], weight.shape[2:]))
    total = sum(len(t) for t in outputs)
    fitted = sum(len(t) for t in outputs[: len(outputs) * 3 // 4]) or max(1, total * 3 // 4)
    order = torch.cat([torch.randperm(n, generator=generator) + at for n, at in ((fitted, 0), (total - fitted, fitted))])

    def grouped(parts: list[torch.Tensor]) -> torch.Tensor:
        """(M, G * n) parts as (G, M, n)."""
        joined = torch.cat(parts)[order]
        return joined.reshape(len(order), groups, -1).transpose(0, 1).contiguous()

    flat_bias = torch.zeros(len(weight)) if bias is None else bias.detach()
    return LayerRows(
        grouped(inputs),
        grouped(exact_inputs),
        grouped(outputs),
        weight.reshape(groups, len(weight) // groups, -1),
        flat_bias.reshape(groups, 1, -1),
        fitted,
    )


def _patches(node: fx.Node, value: torch.Tensor, chosen: torch.Tensor, places: torch.Size, kernel: torch.Size) -> torch.Tensor:
    """What the layer reads for the output positions `chosen` (flat indices into `places`, batch first): (M, channels * taps)."""
    if node.target is aten.linear.default:
        return value.reshape(-1, value.shape[-1])[chosen]
    stride, padding, dilation = ([int(v) for v in node.args[i]] for i in (3, 4, 5))  # type: ignore[union-attr]
    padded = F.pad(value, [p for axis in reversed(padding) for p in (axis, axis)])
    batch, *spatial = torch.unravel_index(chosen, places)
    rank = len(kernel)
    index = []
    for axis, position in enumerate(spatial):
        taps = torch.arange(kernel[axis]) * dilation[axis]
        shape = [len(chosen), *(kernel[axis] if a == axis else 1 for a in range(rank))]
        index.append((position[:, None] * stride[axis] + taps).reshape(shape))
    # Indices apart from each other: the indexed axes come first, (M, *kernel, channels).
    patches = padded[(batch.reshape(-1, *[1] * rank), slice(None), *index)]
    return patches.movedim(-1, 1).reshape(len(chosen), -1)
