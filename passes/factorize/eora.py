"""eora: a low-rank branch beside a quantized layer makes up for what rounding its weights loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.errors import OptionError
from ...ir.program import Program, Stage, origin_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..fold.layer import Layer
from ..fold.match import aten
from ..layerwise import LayerRows, Layerwise
from ..quantize.codebooks import CodebookFormat
from ..quantize.formats import parse_format
from ..quantize.observers import weight_observer
from ..rules import matching
from .base import chain, factorizable
from .calibrated import Moments, damped
from .decomposition import Part, pointwise
from .matrix import Matrix, Metric


@register
@dataclass(frozen=True)
class Eora(Pass):
    """Rounds the weights of layers, and adds what that loses as a low-rank branch.

        %y = linear(%x, W, b)      ->      %d = linear(%x, Q(W), b)
                                           %s = linear(linear(%x, A), B)                    B A X nearest to (W - Q(W)) X
                                           %y = add(%d, %s)

    Liu et al. 2024, EoRA (arXiv:2410.21271, algorithm 1): the error W - Q(W) is projected into the eigenspace of the layer's
    inputs, Q' = Q sqrt(Lambda) with X X^T = Q Lambda Q^T, and truncated there, so that rank goes where the outputs need it and
    not where the weights are off. As everywhere in this family, B is U and A is U^T (W - Q(W)), with U the leading left singular
    vectors in that metric. Convolutions branch as A with their geometry, then B as 1x1.

    Q(W) are float values on the format's grid, which `quantize` finds again: run it before, with the same format and min-max
    ranges, and give the branch its own, for instance

        eora{format=int3,rank=16},quantize{weight_bits=3,weights=["*.eora.*=int8"]},lower-integer

    Options:
        format: of the weights, as in `quantize`.
        rank: of every branch.
        layers: origins (or globs) of the layers to treat.
        samples, rows, damping: as in `Calibrated`.

    Stats: layers, weights of branches over weights, each layer's squared output error on calibration data without and with its
    branch, relative to the variance of its outputs, and why other layers have none.
    """

    name: ClassVar[str] = "eora"
    effect: ClassVar = LOSSY
    accepts: ClassVar = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves: ClassVar = Stage.COMPRESSED
    needs_calibration: ClassVar = True
    float32_only: ClassVar = True

    format: str = "int4"
    rank: int = 16
    layers: tuple[str, ...] = ("*",)
    samples: int = 128
    rows: int = 8192
    damping: float = 1e-6

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        parse_format(self.format)
        for option in ("rank", "samples", "rows"):
            if getattr(self, option) < 1:
                raise OptionError(f"option '{option}' of {self.name} must be at least 1, not {getattr(self, option)}")
        if self.damping <= 0:
            raise OptionError(f"option 'damping' of {self.name} must be above 0, not {self.damping}")

    def run(self, program: Program, context: PassContext) -> PassResult:
        chosen, whole = self._layers(program)
        samples = context.require_calibration(self.name).samples[: self.samples]
        walk = Layerwise(program, samples, context.progress, self.name)
        generator = torch.Generator().manual_seed(context.seed)
        branches: list[tuple[Layer, torch.Tensor, Matrix]] = []
        errors = {}
        for layer in walk.layers():
            if layer.node in chosen:
                rows = walk.rows(layer, self.rows, generator)
                rounded, branch = self._decompose(layer, rows)
                branches.append((layer, rounded, branch))
                both = rounded.flatten(1).to(torch.float64) + branch.dense((self.rank,))[0]
                pair = (rounded, both)
                errors[origin_of(layer.node)] = [round(rows.error(w.reshape(rows.weight.shape).float()), 6) for w in pair]
        for layer, rounded, branch in branches:
            self._insert(program, layer, rounded, branch)
        added = sum(branch.parameters((self.rank,)) for _, _, branch in branches)
        weights = sum(layer.weight.numel() for layer, _, _ in branches)
        stats = {"layers": len(branches), "added": round(added / max(weights, 1), 4), "errors": errors, "whole": whole}
        return PassResult(program, bool(branches) or program.stage is not self.leaves, stats)

    def _layers(self, program: Program) -> tuple[set[object], dict[str, str]]:
        found, whole = factorizable(program)
        origins = [*(origin_of(layer.node) for layer in found), *whole]
        asked = set(matching(self.layers, origins, f"'layers' of {self.name}"))
        chosen = [x for x in found if origin_of(x.node) in asked]
        for layer in chosen:
            full = min(layer.weight.flatten(1).shape)
            if self.rank > full:
                raise OptionError(
                    f"rank {self.rank} of {self.name} is larger than the full rank {full} of '{origin_of(layer.node)}'; "
                    "lower it, or name the layers that shall have it in 'layers'"
                )
        return {layer.node for layer in chosen}, whole

    def _decompose(self, layer: Layer, rows: LayerRows) -> tuple[torch.Tensor, Matrix]:
        """Q(W), and the lost part in the metric of the layer's inputs."""
        weight, form = layer.weight.detach(), parse_format(self.format)
        if isinstance(form, CodebookFormat):
            grid = form.fit(weight, search=False)
        else:
            grid = form.encoding(weight, weight_observer("min-max"))
        rounded = grid.dequantize(grid.quantize(weight))
        moments = Moments.of(rows.exact_inputs[0], rows.targets[0], centered=False)
        metric = Metric(columns=torch.linalg.cholesky(damped(moments.second, self.damping)))
        return rounded, Matrix(layer, metric, (weight - rounded).flatten(1))

    def _insert(self, program: Program, layer: Layer, rounded: torch.Tensor, branch: Matrix) -> None:
        node, origin = layer.node, origin_of(layer.node)
        first, second = branch.factors((self.rank,))
        shaped = first.reshape(self.rank, *layer.weight.shape[1:])
        parts = (Part(shaped, None, layer.stride, layer.padding, layer.dilation), pointwise(layer, second))
        after = node.next
        program.replace_parameter(node.args[1], rounded.to(layer.weight.dtype))  # type: ignore[arg-type]
        last = chain(program, layer, parts, f"{origin}.eora", after)
        total = program.insert(aten.add.Tensor, (node, last), after, f"{origin}.eora")
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
