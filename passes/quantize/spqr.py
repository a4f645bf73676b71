"""SpQR: the few weights that would stretch everybody's scale are stored apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.sparse import compressed
from ...ir.errors import OptionError
from ...ir.program import Program, origin_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from ..rules import matching
from . import operators as ops
from .codebooks import CodebookFormat
from .formats import parse_format
from .statistics import visit

aten = torch.ops.aten

#: float16 holds magnitudes up to this.
LARGEST = 65504.0


@register
@dataclass(frozen=True)
class Spqr(Pass):
    """Moves the outliers of linear weights into a sparse layer beside, so that what is left quantizes to fewer bits.

        %y = linear(%x, W, b)      ->      %d = linear(%x, W - S, b)
                                           %s = gw.sparse_linear(%x, start, columns, values)         S: a few entries a group
                                           %y = add(%d, %s)

    Dettmers et al. 2023 (arXiv:2306.03078): outliers are the weights whose removal lowers the error of their group most. The
    error of a group of G weights that share a scale is modelled as (largest magnitude)^2 * sum_j E[x_j^2], the diagonal of the
    layer's Hessian; how many each group gives away is the exact optimum of that model under the total, by a Lagrange multiplier.
    The paper tests one weight at a time and stores 32 bits an outlier, as we do: 16 for the column, 16 for the value. The value
    is rounded to float16 and W - S keeps the rest, so that the rewrite is exact.

    It pays at 2 to 4 bits, for layers that are bound by reading their weights; for a layer that already has small groups or many
    rows of input, the sparse layer costs more time than it saves bytes. Run it before `quantize`.

    Options:
        format: what the weights are quantized to afterwards; its group is the group here.
        share: outliers over weights, in (0, 0.5].
        layers: origins (or globs) of the linear layers to treat.
        samples: calibration samples used at most.

    Stats: layers, outliers over weights, and bits an original weight that outliers cost.
    """

    name: ClassVar[str] = "spqr"
    effect: ClassVar = EXACT
    needs_calibration: ClassVar = True
    float32_only: ClassVar = True

    format: str = "int3g64"
    share: float = 0.01
    layers: tuple[str, ...] = ("*",)
    samples: int = 32

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        parse_format(self.format)
        if not 0 < self.share <= 0.5:
            raise OptionError(f"option 'share' of {self.name} must lie in (0, 0.5], not {self.share}")
        if self.samples < 1:
            raise OptionError(f"option 'samples' of {self.name} must be at least 1, not {self.samples}")

    def run(self, program: Program, context: PassContext) -> PassResult:
        layers = self._layers(program)
        energies = _energies(program, layers, context, self.samples, self.name)
        weights = outliers = stored = 0
        for layer in layers:
            weight: torch.Tensor = program.parameter(layer.args[1]).detach()  # type: ignore[union-attr]
            mask = choose_outliers(weight, energies[layer.args[0]], self._group(weight), self.share)  # type: ignore[index]
            stored += _move(program, layer, weight, mask)
            weights, outliers = weights + weight.numel(), outliers + int(mask.sum())
        program.sweep()
        stats = {
            "layers": len(layers),
            "outliers": round(outliers / max(weights, 1), 5),
            "bits_a_weight": round(8 * stored / max(weights, 1), 4),
        }
        return PassResult(program, outliers > 0, stats)

    def _group(self, weight: torch.Tensor) -> int:
        form = parse_format(self.format)
        size = form.group if isinstance(form, CodebookFormat) else 0
        return min(size or weight.shape[1], weight.shape[1])

    def _layers(self, program: Program) -> list[fx.Node]:
        """The linear layers asked for whose weight is a parameter of their own."""
        linear = [n for n in program.nodes if n.target is ops.LINEAR and program.parameter(n.args[1]) is not None]
        linear = [n for n in linear if len(n.args[1].users) == 1]  # type: ignore[union-attr]
        asked = set(matching(self.layers, [origin_of(n) for n in linear], f"'layers' of {self.name}")) if linear else ()
        return [n for n in linear if origin_of(n) in asked]


def _energies(
    program: Program, layers: list[fx.Node], context: PassContext, samples: int, who: str
) -> dict[fx.Node, torch.Tensor]:
    """sum x_j^2 over the samples for each value that a layer reads, (K,) float64."""
    energies: dict[fx.Node, torch.Tensor] = {}

    def watch(node: fx.Node):
        def update(value: torch.Tensor) -> None:
            seen = value.to(torch.float64).reshape(-1, value.shape[-1]).square().sum(0)
            energies[node] = energies[node] + seen if node in energies else seen

        return update

    values: list[fx.Node] = [layer.args[0] for layer in layers]  # type: ignore[misc]
    visit(program, {v: watch(v) for v in values}, context.require_calibration(who).samples[:samples], context.progress)
    return energies


def choose_outliers(weight: torch.Tensor, energy: torch.Tensor, group: int, share: float) -> torch.Tensor:
    """Which weights (O, K) to take out, at most `share` of them: minimizes sum over groups of H_g * (largest one left)^2.

    energy: sum x_j^2, (K,). For a multiplier m, each group gives away the r largest with the least H_g * a_r^2 + m * r.
    """
    rows, count = weight.shape
    pad = -count % group
    magnitudes = F.pad(weight.abs().to(torch.float64), (0, pad)).reshape(rows, -1, group)
    magnitudes = torch.where(magnitudes > LARGEST, 0.0, magnitudes)
    most = min(group - 1, max(4, round(8 * share * group))) if group > 1 else 0
    largest, places = magnitudes.topk(most + 1, 2)
    weights = F.pad(energy.to(torch.float64), (0, pad)).reshape(-1, group).sum(1)
    error = largest.square() * weights[None, :, None]
    removed = torch.arange(most + 1, dtype=torch.float64)
    low, high = 0.0, float(error.max()) + 1e-300
    for _ in range(60):
        middle = (low + high) / 2
        total = int((error + middle * removed).argmin(2).sum())
        low, high = (middle, high) if total > share * rows * count else (low, middle)
    given = (error + high * removed).argmin(2)
    chosen = torch.arange(most + 1) < given[..., None]
    mask = torch.zeros_like(magnitudes, dtype=torch.bool).scatter(2, places, chosen)
    return mask.reshape(rows, -1)[:, :count]


def _move(program: Program, layer: fx.Node, weight: torch.Tensor, mask: torch.Tensor) -> int:
    """Rewrites one layer; returns the bytes of its sparse part."""
    if not bool(mask.any()):
        return 0
    start, columns, values = compressed(weight, mask, torch.float16)
    rest = weight.clone()
    rest[mask] -= values.to(weight.dtype)
    node: fx.Node = layer.args[1]  # type: ignore[assignment]
    name = str(node.target)
    after = layer.next
    parts = [
        program.add_parameter(f"{name}_outlier_{what}", tensor, after, origin_of(layer))
        for what, tensor in (("start", start), ("columns", columns), ("values", values))
    ]
    sparse = program.insert(gw.sparse_linear.default, (layer.args[0], *parts), after, origin_of(layer))
    total = program.insert(aten.add.Tensor, (layer, sparse), after, origin_of(layer))
    layer.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    program.replace_parameter(node, rest)
    return sum(t.numel() * t.element_size() for t in (start, columns, values))
