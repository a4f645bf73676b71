"""quantize-fp8: layers that multiply 8-bit floats by 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.fp8 import LARGEST, quantize_rows
from ...ir.errors import PassError
from ...ir.program import Program, origin_of, shape_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..rules import matching
from . import operators as ops
from .encoding import SMALLEST_SCALE
from .statistics import collect

#: Tensor cores multiply 32 bytes of a row at once, and kernels pad channels to 16: of fewer, most of the work is on zeros.
FEWEST_CHANNELS = 16


@register
@dataclass(frozen=True)
class QuantizeFp8(Pass):
    """Convolutions and linear layers whose weights and inputs are e4m3 numbers, with sums in float32.

        %y = linear(%x, W, bias)     ->     %q = quantize_fp8(%x, s_x);  %y = linear_fp8(%q, W8, s_x * s_w, bias, float32)

    Scales: one a tensor for activations, the largest magnitude on the calibration samples / 448; one an output channel for
    weights, its largest magnitude / 448. Floats have their precision at every magnitude, so ranges are not clipped as those of
    integers are. What a layer reads is quantized once, for all layers that read it. A code is off by at most 2^-4 of its value
    (2^-10 of the scale below 2^-6 of it).

    Layers stay float whose weight is no parameter, and convolutions of groups, of three axes, transposed, or of fewer than 16
    input channels; matmuls of two activations do, too. The stats name each layer left. The values between layers are float:
    `cast-float` behind this pass makes them half precision.

    GPUs of level sm_89 and sm_90 run these layers on their tensor cores; other targets refuse them.

    Options:
        skip: origins (or globs of origins) of layers that stay float.

    Source: Micikevicius et al. 2022 (arXiv:2209.05433), sections 3 and 4.2.

    Raises:
        PassError: no such layer. UnknownNameError: a `skip` pattern that matches nothing.
    """

    name: ClassVar[str] = "quantize-fp8"
    effect: ClassVar = LOSSY
    needs_calibration: ClassVar[bool] = True
    float32_only: ClassVar[bool] = True

    skip: tuple[str, ...] = ()

    def run(self, program: Program, context: PassContext) -> PassResult:
        layers = [n for n in program.nodes if n.target in (ops.CONVOLUTION, ops.LINEAR)]
        skipped = set(matching(self.skip, [origin_of(n) for n in layers], f"'skip' of {self.name}"))
        reasons = {layer: "skip" if origin_of(layer) in skipped else left_float(program, layer) for layer in layers}
        chosen = [layer for layer in layers if not reasons[layer]]
        if not chosen and not fp8_layers(program):
            raise PassError(f"{self.name} finds no layer to quantize in '{program.name}': {_listed(reasons) or 'it has none'}")
        sources = list(dict.fromkeys(_operands(layer)[0] for layer in chosen))
        calibration = context.require_calibration(self.name)
        seen = collect(program, sources, calibration, context.progress) if sources else {}
        scales = {node: max(max(-h.min, h.max) / LARGEST, SMALLEST_SCALE) for node, h in seen.items()}
        rewrite = _Rewrite(program, scales)
        for layer in chosen:
            rewrite.layer(layer)
        program.sweep()
        left = {origin_of(layer): reason for layer, reason in reasons.items() if reason}
        return PassResult(program, bool(chosen), {"layers": len(chosen), "activations": len(sources), "left_float": left})


def fp8_layers(program: Program) -> list[fx.Node]:
    """The layers of a program that multiply 8-bit floats already."""
    return [n for n in program.nodes if n.target in (gw.linear_fp8.default, gw.convolution_fp8.default)]


def left_float(program: Program, layer: fx.Node) -> str:
    """Why a convolution or linear layer stays float; empty where it need not."""
    x, weight, bias = _operands(layer)
    if program.parameter(weight) is None or program.parameter(x) is not None:
        return "its weight is no parameter, or its input is one"
    if bias is not None and program.parameter(bias) is None:
        return "its bias is computed"
    if layer.target is ops.LINEAR:
        return ""
    transposed, groups = bool(layer.args[6]), int(layer.args[8])  # type: ignore[arg-type]
    channels, rank = shape_of(weight)[1], len(shape_of(weight))
    if transposed or rank > 4:
        return "no kernel multiplies 8-bit floats in a transposed or 3-D convolution"
    if groups != 1:
        return f"{groups} groups"
    return f"{channels} input channels, fewer than {FEWEST_CHANNELS}" if channels < FEWEST_CHANNELS else ""


def _operands(layer: fx.Node) -> tuple[Any, Any, Any]:
    """(x, weight, bias or None)."""
    args: list[Any] = [*layer.args, None]
    return args[0], args[1], args[2]


def _listed(reasons: dict[fx.Node, str]) -> str:
    return "; ".join(f"'{origin_of(layer)}': {reason}" for layer, reason in reasons.items())


class _Rewrite:
    """Layers rewritten one by one; values and weights that several of them read are quantized once."""

    def __init__(self, program: Program, scales: dict[fx.Node, float]) -> None:
        self.program, self.scales = program, scales
        self._values: dict[fx.Node, fx.Node] = {}
        self._weights: dict[fx.Node, tuple[torch.Tensor, fx.Node]] = {}

    def layer(self, layer: fx.Node) -> None:
        source, weight_node, bias = _operands(layer)
        x = self._value(source, layer)
        steps, weight = self._weight(weight_node, layer)
        scale = self.program.add_parameter(f"{weight_node.target}_scale", steps * self.scales[source], layer)
        if layer.target is ops.LINEAR:
            call, rest = gw.linear_fp8.default, ()
        else:
            call, rest = gw.convolution_fp8.default, tuple(layer.args[3:6])
        made = self.program.insert(call, (x, weight, scale, bias, *rest, torch.float32), layer, origin=origin_of(layer))
        layer.replace_all_uses_with(made)
        if layer in self.scales:
            self.scales[made] = self.scales[layer]
        self.program.graph.erase_node(layer)

    def _value(self, source: fx.Node, layer: fx.Node) -> fx.Node:
        # Layers come in graph order, so the first reader stands before the others.
        if source not in self._values:
            args = source, self.scales[source]
            self._values[source] = self.program.insert(gw.quantize_fp8.default, args, layer, origin=origin_of(source))
        return self._values[source]

    def _weight(self, node: fx.Node, layer: fx.Node) -> tuple[torch.Tensor, fx.Node]:
        if node not in self._weights:
            weight = self.program.parameter(node)
            assert weight is not None
            codes, steps = quantize_rows(weight, SMALLEST_SCALE)
            self._weights[node] = steps, self.program.add_parameter(str(node.target), codes, layer)
        return self._weights[node]
