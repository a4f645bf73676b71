"""Which layers get a choice, and in which encodings: the same ones that the `quantize` pass would write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from ...ir.errors import PassError
from ...ir.program import Program, origin_of, single_user
from ...passes.quantize import annotate
from ...passes.quantize import operators as ops
from ...passes.quantize.annotate import Quantize
from ...passes.quantize.codebooks import Codebook, CodebookFormat
from ...passes.quantize.encoding import Encoding
from ...passes.quantize.formats import WeightFormat, parse_format
from ...passes.quantize.observers import weight_observer
from ...passes.quantize.regions import find_regions
from .base import Layer


def weight_layers(program: Program, quantize: Quantize, choices: Sequence[str]) -> tuple[Layer, ...]:
    """The layers whose weights `quantize` would quantize, in graph order, each with its encodings in every choice.

    A weight that several layers read is one layer, named after the first reader. The pass may raise the scale of a dead channel
    once its activations are known (`raise_for_bias`); weights below 2^-28 of their bias are lost by it, so that no score changes.

    Args:
        program: canonical or compressed.
        quantize: the pass of the pipeline: its `skip` and `weight_observer` count.
        choices: weight formats, see `formats.parse_format`.

    Raises:
        OptionError: a choice that is no format, or a `skip` pattern that matches nothing.
        PassError: no layer to quantize, or two layers of one origin, which no plan could tell apart.
    """
    formats = {choice: parse_format(choice) for choice in choices}
    nodes = annotate.weight_layers(program, find_regions(program, quantize.skipped(program)))
    first_readers = {node.args[1]: node for node in reversed(nodes)}
    layers = []
    for node in nodes:
        if first_readers[node.args[1]] is not node:
            continue
        weight = program.parameter(node.args[1])
        assert weight is not None
        weight = weight.detach()
        encodings = {choice: _encoding(weight, form, quantize) for choice, form in formats.items()}
        layers.append(Layer(origin_of(node), node, weight, encodings))
    if not layers:
        raise PassError(f"'{program.name}' has no convolution or linear layer whose weight is a parameter: nothing to allocate")
    repeated = [origin for origin, count in Counter(layer.origin for layer in layers).items() if count > 1]
    if repeated:
        raise PassError(
            f"'{program.name}' has several layers of origin {', '.join(map(repr, repeated))}; a plan names layers by origin: "
            "give each its own module, or skip them (quantize{skip=...})"
        )
    return tuple(layers)


def _encoding(weight: torch.Tensor, form: WeightFormat, quantize: Quantize) -> Encoding | Codebook:
    if isinstance(form, CodebookFormat):
        return form.fit(weight, search=quantize.weight_observer == "mse")
    return form.encoding(weight, weight_observer(quantize.weight_observer))


def activation_of(layer: Layer) -> fx.Node:
    """The value that a layer hands on: its output, after the clamps (relu, relu6, ...) that fuse with it."""
    node = layer.node
    while (user := single_user(node)) is not None and ops.clamp_bounds(user) is not None:
        node = user
    return node
