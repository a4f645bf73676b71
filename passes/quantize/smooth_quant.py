"""SmoothQuant: outlying activation channels become larger weights, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.data import Calibration
from ...ir.errors import OptionError
from ...ir.program import Program, shape_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from . import operators as ops
from .statistics import visit

aten = torch.ops.aten

#: A channel's factor stays within [1 / LIMIT, LIMIT].
LIMIT = 1e4


@dataclass(frozen=True)
class Site:
    """A value and the linear layers that read it. producer: the layer norm or linear layer whose parameters take the factors.

    channels: for each channel of the value, the output channel of the linear layer that it comes from; None for a layer norm.
    """

    value: fx.Node
    readers: tuple[fx.Node, ...]
    producer: fx.Node
    channels: torch.Tensor | None = None


@register
@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divides the channels of what linear layers read by factors s, and multiplies their weights by them.

        %n = layer_norm(%x, g, b)                %n = layer_norm(%x, g, b)                (only where others read it: a residual)
        %y = linear(%n, W)                 ->    %m = layer_norm(%x, g / s, b / s)
        %r = add(%n, ...)                        %y = linear(%m, W * s)

        %v = linear(%x, V, c)                    %v = linear(%x, V / s, c / s)            rows, through the moves of the heads
        %y = linear(matmul(%p, %v), W)     ->    %y = linear(matmul(%p, %v), W * s)

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha) for each input channel j, over the calibration samples and over all linear
    layers that read X: Xiao et al. 2022 (arXiv:2211.10438, equation 4). The paper scales layer norms; a linear layer before
    (through relu, moves, and the product of attention probabilities with values, which mixes positions and not channels) serves
    as well. A second layer norm where a residual reads the first keeps the rewrite exact in post-norm networks, at the cost of
    computing it twice. What an activation function makes (gelu) has nowhere to put the factors and is left alone.

    Weights (O, C), factors (C,). Quantize activations with `min-max` or `percentile` afterwards as the paper does: their outliers
    are gone, so nothing needs clipping.

    Options:
        alpha: how much of the difficulty goes to the weights, in [0, 1]; the paper's 0.5 suits most networks.
        samples: calibration samples used at most.

    Stats: values smoothed at layer norms and at linear layers, layer norms computed twice, and the largest factor.
    """

    name: ClassVar[str] = "smooth-quant"
    effect: ClassVar = EXACT
    needs_calibration: ClassVar = True

    alpha: float = 0.5
    samples: int = 64

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"option 'alpha' of {self.name} must lie in 0 to 1, not {self.alpha}")
        if self.samples < 1:
            raise OptionError(f"option 'samples' of {self.name} must be at least 1, not {self.samples}")

    def run(self, program: Program, context: PassContext) -> PassResult:
        sites = find_sites(program)
        if not sites:
            return PassResult(program, False, {"layer_norms": 0, "linear_layers": 0, "doubled": 0, "largest_factor": 1.0})
        calibration = context.require_calibration(self.name)
        largest = largest_magnitudes(program, [s.value for s in sites], calibration, self.samples, context.progress)
        doubled, top = 0, 1.0
        for site in sites:
            factor = factors(program, site, largest[site.value], self.alpha)
            top = max(top, float(torch.maximum(factor, 1 / factor).max()))
            doubled += _smooth(program, site, factor)
        program.sweep()
        norms = sum(s.channels is None for s in sites)
        stats = {"layer_norms": norms, "linear_layers": len(sites) - norms, "doubled": doubled, "largest_factor": round(top, 3)}
        return PassResult(program, True, stats)


def find_sites(program: Program) -> list[Site]:
    """Every value that only needs new parameters to be smoothed, in graph order."""
    sites = []
    for value in program.nodes:
        readers = tuple(u for u in value.users if u.target is ops.LINEAR and u.args[0] is value and _owns(program, u))
        if not readers:
            continue
        if value.target is ops.LAYER_NORM:
            if len(value.args) > 3 and len(value.args[1]) == 1 and all(_parameter(program, a) for a in value.args[2:4]):  # type: ignore[arg-type]
                sites.append(Site(value, readers, value))
        elif len(readers) == len(value.users):
            traced = trace_channels(program, value)
            if traced is not None:
                sites.append(Site(value, readers, *traced))
    return sites


def _parameter(program: Program, argument: Any) -> bool:
    return program.parameter(argument) is not None


def _owns(program: Program, layer: fx.Node) -> bool:
    """Whether the layer's weight, and bias if any, are parameters that nobody else reads."""
    constants = [a for a in layer.args[1:3] if isinstance(a, fx.Node)]
    return all(_parameter(program, a) and len(a.users) == 1 for a in constants)


def trace_channels(program: Program, value: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
    """The linear layer whose output channels, alone and unmixed, are the channels of `value`; and which is which, (C,).

    Follows moves, relu and one product with attention probabilities. None where channels mix, or where somebody else reads them.
    """
    path, node, crossed = [value], value, False
    while node.target is not ops.LINEAR:
        if node.target in ops.MATMUL and not crossed:
            crossed, node = True, node.args[1]  # type: ignore[assignment]
        elif node.target in ops.MOVES or node.target is aten.relu.default:
            node = node.args[0]  # type: ignore[assignment]
        else:
            return None
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        path.append(node)
    if node is value or not _owns(program, node) or not all(isinstance(d, int) for d in shape_of(node)):
        return (node, torch.arange(shape_of(node)[-1])) if node is value and _owns(program, node) else None
    places = _follow(path[::-1])
    if places is None:
        return None
    rows = places[value].reshape(-1, places[value].shape[-1])
    channels = rows[0]
    if not bool((rows == channels).all()) or len(torch.unique(channels)) != len(channels):
        return None
    on_path = set(path)
    for step in path[1:]:
        for other in step.users:
            if other not in on_path and not _reads_other_channels(step, other, places, channels):
                return None
    return node, channels


def _follow(path: list[fx.Node]) -> dict[fx.Node, Any] | None:
    """For each node from a linear layer on, the output channel of that layer that each element comes from."""
    shape = shape_of(path[0])
    places: dict[fx.Node, Any] = {path[0]: torch.arange(shape[-1]).expand(shape)}
    for before, node in itertools.pairwise(path):
        given = places[before]
        if node.target in ops.MATMUL:
            if given.shape[:-2] != shape_of(node)[:-2] or not bool((given == given[..., :1, :]).all()):
                return None
            places[node] = given[..., :1, :].expand(shape_of(node))
        else:
            places[node] = given if node.target is aten.relu.default else _moved(node, given)
    return places


def _moved(node: fx.Node, given: Any) -> Any:
    return node.target(given, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _reads_other_channels(step: fx.Node, other: fx.Node, places: dict[fx.Node, Any], channels: torch.Tensor) -> bool:
    if other.target not in ops.MOVES or other.args[0] is not step:
        return False
    read = _moved(other, places[step])
    return isinstance(read, torch.Tensor) and not bool(torch.isin(read, channels).any())


def largest_magnitudes(
    program: Program, nodes: list[fx.Node], calibration: Calibration, samples: int, progress: Callable[[int, int, str], None]
) -> dict[fx.Node, torch.Tensor]:
    """max |X_j| of each value over the samples, (C,) along the last axis."""
    largest = {node: torch.zeros(shape_of(node)[-1]) for node in nodes}

    def watch(node: fx.Node) -> Callable[[torch.Tensor], None]:
        def update(value: torch.Tensor) -> None:
            largest[node] = torch.maximum(largest[node], value.abs().reshape(-1, value.shape[-1]).amax(0))

        return update

    visit(program, {node: watch(node) for node in nodes}, calibration.samples[:samples], progress)
    return largest


def factors(program: Program, site: Site, largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """s of equation 4, (C,) float64; 1 for channels that are zero on either side."""
    weights = torch.stack([program.parameter(r.args[1]).detach().abs().amax(0) for r in site.readers])  # type: ignore[union-attr]
    x, w = largest.to(torch.float64), weights.amax(0).to(torch.float64)
    factor = x.clamp_min(1e-300) ** alpha / w.clamp_min(1e-300) ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), factor.clamp(1 / LIMIT, LIMIT), 1.0)


def _smooth(program: Program, site: Site, factor: torch.Tensor) -> bool:
    """Moves the factors; whether a layer norm is computed twice from now on."""
    for reader in site.readers:
        _scale(program, reader, 1, factor)
    if site.channels is not None:
        rows = torch.ones(shape_of(site.producer)[-1], dtype=torch.float64)
        rows[site.channels] = 1 / factor
        _scale(program, site.producer, 1, rows[:, None])
        if len(site.producer.args) > 2 and site.producer.args[2] is not None:
            _scale(program, site.producer, 2, rows)
        return False
    norm = site.producer
    parameters = [program.parameter(a).detach().to(torch.float64) / factor for a in norm.args[2:4]]  # type: ignore[union-attr]
    scaled = [
        program.add_parameter(str(node.target), value.to(torch.float32), norm)  # type: ignore[union-attr]
        for node, value in zip(norm.args[2:4], parameters, strict=True)
    ]
    smoothed = program.insert(norm.target, (*norm.args[:2], *scaled, *norm.args[4:]), norm, **norm.kwargs)  # type: ignore[arg-type]
    for reader in site.readers:
        reader.update_arg(0, smoothed)
    return bool(norm.users)


def _scale(program: Program, layer: fx.Node, index: int, factor: torch.Tensor) -> None:
    node: fx.Node = layer.args[index]  # type: ignore[assignment]
    tensor: torch.Tensor = program.parameter(node)  # type: ignore[assignment]
    program.replace_parameter(node, (tensor.detach().to(torch.float64) * factor).to(tensor.dtype))
