"""Cross-layer equalization: weight ranges of neighbouring layers made equal, channel by channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from . import operators as ops

#: A channel's factor stays within [1 / LIMIT, LIMIT]: dead channels would otherwise get infinite ones.
LIMIT = 1e4
#: Sweeps over all pairs. Nagel et al. iterate until convergence; the largest factor is close to 1 after a few.
SWEEPS = 20
CONVERGED = 1e-3


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but relu (which commutes with positive factors) between them, each read once."""

    first: fx.Node
    second: fx.Node


@register
@dataclass(frozen=True)
class Equalize(Pass):
    """Moves scale between consecutive layers so that the weight ranges of channel i agree on both sides.

        %y = relu(convolution(%x, W1, b1))               %y = relu(convolution(%x, W1 / s, b1 / s))
        %z = convolution(%y, W2, b2)              ->     %z = convolution(%y, W2 * s, b2)

    s_i = sqrt(r1_i / r2_i), with r1_i the largest |W1| of output channel i and r2_i the largest |W2| that reads channel i: Nagel
    et al. 2019 (arXiv:1906.04721, equation 11); depthwise triples are two pairs that are swept until they agree. Convolutions,
    grouped and depthwise ones, and linear layers; W1 (C, ...), W2 (O, C / groups, ...). Clamps with an upper bound (relu6) do
    not commute with the factors: such pairs are left alone, as the paper's replacement of relu6 by relu changes the model.

    Stats: pairs found, and the largest factor applied.
    """

    name: ClassVar[str] = "equalize"
    effect: ClassVar = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        pairs = [pair for node in program.nodes if (pair := find_pair(program, node)) is not None]
        weights: dict[fx.Node, torch.Tensor] = {}
        biases: dict[fx.Node, torch.Tensor] = {}
        for pair in pairs:
            for layer in (pair.first, pair.second):
                weights[layer] = program.parameter(layer.args[1]).detach().clone()  # type: ignore[union-attr]
            if len(pair.first.args) > 2 and pair.first.args[2] is not None:
                biases[pair.first] = program.parameter(pair.first.args[2]).detach().clone()  # type: ignore[union-attr]
        largest = sweep_pairs(pairs, weights, biases)
        modified = largest > 1.0 + CONVERGED
        if modified:
            _write(program, weights, biases)
        return PassResult(program, modified, {"pairs": len(pairs), "largest_factor": round(largest, 3)})


def find_pair(program: Program, first: fx.Node) -> Pair | None:
    """The pair that starts at `first`; None where its only reader is not, through relu, another layer."""
    if not _is_layer(program, first):
        return None
    reader = single_user(first)
    if reader is not None and ops.clamp_bounds(reader) == (0.0, math.inf):
        reader = single_user(reader)
    if reader is None or not _is_layer(program, reader) or reader.target is not first.target:
        return None
    return Pair(first, reader)


def _is_layer(program: Program, node: fx.Node) -> bool:
    """A convolution or linear layer whose weight and bias are constants nobody else reads."""
    if node.target not in (ops.CONVOLUTION, ops.LINEAR) or ops.is_transposed(node):
        return False
    constants = [a for a in node.args[1:3] if a is not None]
    return all(program.parameter(a) is not None and len(a.users) == 1 for a in constants)  # type: ignore[union-attr]


def sweep_pairs(pairs: list[Pair], weights: dict[fx.Node, torch.Tensor], biases: dict[fx.Node, torch.Tensor]) -> float:
    """Equalizes `weights` and `biases` in place until the factors settle; returns the largest accumulated factor."""
    accumulated = {pair.first: torch.ones(weights[pair.first].shape[0], dtype=torch.float64) for pair in pairs}
    for _ in range(SWEEPS):
        step = 1.0
        for pair in pairs:
            factor = _factors(pair, weights)
            factor = (accumulated[pair.first] * factor).clamp(1 / LIMIT, LIMIT) / accumulated[pair.first]
            accumulated[pair.first] *= factor
            _apply(pair, weights, biases, factor)
            step = max(step, float(torch.maximum(factor, 1 / factor).max()))
        if step < 1.0 + CONVERGED:
            break
    return max((float(torch.maximum(f, 1 / f).max()) for f in accumulated.values()), default=1.0)


def _factors(pair: Pair, weights: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """s of equation 11, (C,) float64; 1 for channels that are zero on either side."""
    out_range = weights[pair.first].flatten(1).abs().amax(1).to(torch.float64)
    in_range = _by_input(pair.second, weights[pair.second]).abs().amax((1, 2)).to(torch.float64)
    alive = (out_range > 0) & (in_range > 0)
    return torch.where(alive, (out_range / in_range.clamp_min(1e-300)).sqrt(), 1.0).clamp_min(1e-300)


def _by_input(layer: fx.Node, weight: torch.Tensor) -> torch.Tensor:
    """W (O, C / groups, ...) seen by input channel: (C, O / groups, taps)."""
    groups = int(layer.args[8]) if layer.target is ops.CONVOLUTION else 1  # type: ignore[arg-type]
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2).reshape(groups * weight.shape[1], weight.shape[0] // groups, -1)


def _apply(pair: Pair, weights: dict[fx.Node, torch.Tensor], biases: dict[fx.Node, torch.Tensor], factor: torch.Tensor) -> None:
    first, second = weights[pair.first], weights[pair.second]
    factor = factor.to(first.dtype)
    weights[pair.first] = first / factor.reshape(-1, *[1] * (first.dim() - 1))
    if pair.first in biases:
        biases[pair.first] = biases[pair.first] / factor
    groups = int(pair.second.args[8]) if pair.second.target is ops.CONVOLUTION else 1  # type: ignore[arg-type]
    spread = factor.reshape(groups, 1, -1).expand(groups, second.shape[0] // groups, -1).reshape(*second.shape[:2])
    weights[pair.second] = second * spread.reshape(*second.shape[:2], *[1] * (second.dim() - 2))


def _write(program: Program, weights: dict[fx.Node, torch.Tensor], biases: dict[fx.Node, torch.Tensor]) -> None:
    for layer, weight in weights.items():
        program.replace_parameter(layer.args[1], weight)  # type: ignore[arg-type]
    for layer, bias in biases.items():
        program.replace_parameter(layer.args[2], bias)  # type: ignore[arg-type]
