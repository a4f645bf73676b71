"""fold-batch-norm: batch normalization becomes part of a neighbouring layer, or a scale and a shift."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.errors import PassError
from ...ir.program import Program, dtype_of, origin_of, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .layer import can_fold_before, fold_after, fold_before, layer_of, reading_layers
from .match import aten, is_call, substitute


@register
@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Folds y = x * scale + shift, with scale = gamma / sqrt(var + eps) and shift = beta - mean * scale, into a layer.

        after a layer that nothing else reads:   W' = W * scale,  b' = b * scale + shift
        before the layers that read it:          W' = W * scale,  b' = b + sum over inputs and kernel of W * shift
        otherwise:                               %y = aten.add(aten.mul(%x, scale), shift)

    Layers are convolutions, transposed convolutions and linear layers, with any groups. gamma, beta, mean and var are (C,); in
    the last form scale and shift are (1, C, 1, ...) parameters. Folding before a layer needs unpadded input or a zero shift:
    padding adds zeros after the normalization, so at the borders a shift has another sum. Computed in float64, stored in the
    layer's dtype.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2.

    Raises:
        PassError: a normalization that uses statistics of its batch, which no constant can replace.
    """

    name = "fold-batch-norm"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        stats = {"after_layer": 0, "before_layer": 0, "scale_and_shift": 0}
        for node in list(program.nodes):
            if is_call(node, aten.batch_norm.default):
                stats[_fold(program, node)] += 1
        return PassResult(program, any(stats.values()), stats)


def _fold(program: Program, node: fx.Node) -> str:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    scale, shift = _scale_and_shift(program, node)
    channel = 1
    layer = layer_of(program, x)
    if layer is not None and single_user(x) is node and layer.axis == channel:
        fold_after(program, layer, scale, shift)
        substitute(program, node, x)
        return "after_layer"
    readers = reading_layers(program, node)
    if readers is not None and all(r.axis == channel and can_fold_before(r, shift) for r in readers):
        for reader in readers:
            fold_before(program, reader, scale, shift)
        substitute(program, node, x)
        return "before_layer"
    broadcast = [1, -1, *[1] * (node.meta["val"].dim() - 2)]
    dtype = dtype_of(node)
    factor = program.add_parameter(f"{node.name}_scale", scale.reshape(broadcast).to(dtype), node)
    offset = program.add_parameter(f"{node.name}_shift", shift.reshape(broadcast).to(dtype), node)
    scaled = program.insert(aten.mul.Tensor, (x, factor), node)
    substitute(program, node, program.insert(aten.add.Tensor, (scaled, offset), node))
    return "scale_and_shift"


def _scale_and_shift(program: Program, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (C,) each."""
    weight, bias, mean, var = (program.parameter(a) for a in node.args[1:5])
    training, eps = node.args[5], node.args[7]
    unknown = [a for a in node.args[1:3] if a is not None and program.parameter(a) is None]
    if training or mean is None or var is None or unknown:
        raise PassError(
            f"batch normalization at '{node.name}' (from {origin_of(node)}) depends on its input batch, or its parameters are "
            "computed; only fixed running statistics fold (track_running_stats=True, eval mode)"
        )
    scale = torch.rsqrt(var.to(torch.float64) + eps)  # type: ignore[operator]
    if weight is not None:
        scale = scale * weight.to(torch.float64)
    shift = -mean.to(torch.float64) * scale
    return scale, shift if bias is None else shift + bias.to(torch.float64)
