"""linearize-activations: an activation between two layers becomes a line, and the layers become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from ...ir.errors import OptionError, PassError, UnknownNameError
from ...ir.program import Program, Stage, origin_of, single_user
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..fold.layer import Layer, fold_after, layer_of
from ..fold.match import aten, is_call
from ..fold.merge_conv import macs, merge, mergeable
from .block_scores import keep_values, output_distortion

ACTIVATIONS = (
    aten.relu.default, aten.relu6.default, aten.clamp.default, aten.hardtanh.default, aten.gelu.default, aten.silu.default,
    aten.hardswish.default, aten.hardsigmoid.default, aten.sigmoid.default, aten.tanh.default, aten.leaky_relu.default,
    aten.elu.default,
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An activation between two layers that could be one; macs: multiply-accumulates of the two, and of the one."""

    name: str
    activation: fx.Node
    first: Layer
    second: Layer

    @property
    def macs(self) -> tuple[int, int]:
        return macs(self.first, self.second)


def candidates(program: Program) -> list[Candidate]:
    """Every activation that alone stands between two convolutions, or two linear layers, in graph order."""
    found: list[Candidate] = []
    for node in program.nodes:
        first, reader = layer_of(program, node.args[0]) if is_call(node, *ACTIVATIONS) else None, single_user(node)
        second = None if reader is None else layer_of(program, reader)
        if first is None or second is None or second.input is not node or node in second.node.args[1:]:
            continue
        if mergeable(first, second):
            taken = {c.name for c in found}
            name = origin_of(node)
            found.append(Candidate(name if name not in taken else f"{name}:{node.name}", node, first, second))
    return found


@register
@dataclass(frozen=True)
class LinearizeActivations(Pass):
    """Replaces activations by lines and merges the layers around them: fewer layers, and where it pays fewer products.

        %h = linear(%x, W1, b1);  %a = gelu(%h);  linear(%a, W2, b2)   ->   linear(%x, W2 diag(s) W1, W2 (s b1 + t) + b2)

    s and t are each channel's least-squares line through its activation on the calibration samples. Convolutions of kernels k1
    and k2 become one of k1 + s1 (k2 - 1); where the second pads, its border is lost. The price is known before: with `count` only
    activations whose removal saves multiply-accumulates go, the report says what was saved.

    Source: Dror et al. 2021, Layer Folding (arXiv:2106.09309), there with trained slopes; Kim et al. 2023 (arXiv:2301.12187).

    Args:
        layers: names of activations, such as blocks.0.relu1. Either this or `count`.
        count: how many go.
        criterion: `fit` takes those that their lines miss least, `output-distortion` those that move the network's outputs least,
            one at a time and scored anew each time, `random` is a control.
        samples: calibration samples that lines and scores see.

    Raises:
        OptionError: neither or both of `layers` and `count`. UnknownNameError: an activation that does not exist or does not
            stand between two such layers. PassError: fewer that save anything than `count`.
    """

    layers: tuple[str, ...] = ()
    count: int = 0
    criterion: Literal["fit", "output-distortion", "random"] = "output-distortion"
    samples: int = 64

    name = "linearize-activations"
    effect = LOSSY
    accepts = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves = Stage.COMPRESSED
    needs_calibration = True

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if bool(self.layers) == bool(self.count) or self.count < 0 or self.samples < 1:
            raise OptionError(
                "linearize-activations: name them (layers=[blocks.0.relu1]) or say how many go (count=2), one of the two"
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        names = self.layers or tuple(self._choose(program, context))
        before, after = self._linearize(program, names, context)
        return PassResult(program, True, {"linearized": ", ".join(names), "macs_before": before, "macs_after": after})

    def _linearize(self, program: Program, names: Sequence[str], context: PassContext) -> tuple[int, int]:
        """Edits `program`; gives the multiply-accumulates of the layers that went and of those in their place."""
        known = {c.name: c for c in candidates(program)}
        for name in names:
            if name not in known:
                raise UnknownNameError("activation between two layers", name, known)
        lines = self._lines(program, [known[name] for name in names], context)
        before = after = 0
        # Forwards, so that a chain of layers folds into its last; each is looked at again, as its neighbours may have changed.
        for name in [name for name in known if name in names]:
            candidate = next(c for c in candidates(program) if c.activation is known[name].activation)
            spent, left = candidate.macs
            before, after = before + spent, after + left
            scale, shift, _ = lines[name]
            activation, first = candidate.activation, candidate.first
            fold_after(program, first, scale, shift)
            activation.replace_all_uses_with(first.node)
            program.graph.erase_node(activation)
            folded, second = layer_of(program, first.node), layer_of(program, candidate.second.node)
            assert folded is not None and second is not None
            merge(program, folded, second)
        return before, after

    def _lines(
        self, program: Program, chosen: Sequence[Candidate], context: PassContext
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """Name -> (slope (C,), offset (C,), share of the activation's variance that the line misses), float64."""
        samples = context.require_calibration(self.name).samples[: self.samples]
        sums = {c.name: torch.zeros(6, c.first.out_channels, dtype=torch.float64) for c in chosen}
        wanted = {node for c in chosen for node in (c.first.node, c.activation)}
        for kept in keep_values(program, wanted, samples):
            for c in chosen:
                z, a = (kept[n].double().movedim(c.first.axis, 0).flatten(1) for n in (c.first.node, c.activation))
                parts = (torch.ones_like(z), z, a, z * z, z * a, a * a)
                sums[c.name] += torch.stack([part.sum(1) for part in parts])
        found = {}
        for name, total in sums.items():
            z, a, zz, za, aa = (total[1:] / total[0]).unbind()
            scale = torch.where(zz - z * z > 1e-12, (za - z * a) / (zz - z * z).clamp_min(1e-12), 0.0)
            missed = (aa - a * a - scale * (za - z * a)).clamp_min(0).sum() / (aa - a * a).sum().clamp_min(1e-30)
            found[name] = scale, a - scale * z, float(missed)
        return found

    def _choose(self, program: Program, context: PassContext) -> list[str]:
        known = candidates(program)
        paying = [c for c in known if c.macs[1] < c.macs[0]]
        if len(paying) < self.count:
            raise PassError(
                f"{self.count} activations are to go, but '{program.name}' has {len(paying)} whose layers take fewer multiply-"
                f"accumulates as one, of {len(known)} between two layers; name others by layers=[...]"
            )
        names = [c.name for c in paying]
        if self.criterion == "random":
            draw = torch.randperm(len(names), generator=torch.Generator().manual_seed(context.seed))
            return [names[i] for i in sorted(draw[: self.count].tolist())]
        if self.criterion == "fit":
            missed = {name: line[2] for name, line in self._lines(program, paying, context).items()}
            chosen = sorted(names, key=missed.__getitem__)[: self.count]
            return [name for name in names if name in chosen]
        samples = context.require_calibration(self.name).samples[: self.samples]
        chosen = []
        for _ in range(self.count):
            rest = [name for name in names if name not in chosen]
            variants = [self._variant(program, (*chosen, name), context) for name in rest]
            scores = output_distortion(program, variants, samples, context)
            chosen.append(rest[min(range(len(rest)), key=scores.__getitem__)])
        return [name for name in names if name in chosen]

    def _variant(self, program: Program, names: Sequence[str], context: PassContext) -> Program:
        variant = program.clone()
        replace(self, layers=tuple(names), count=0)._linearize(variant, names, context)
        variant.sweep()
        return variant
