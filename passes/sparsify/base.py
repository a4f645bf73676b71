"""What the sparsity passes share: how sparse each layer becomes, which weights stay for given scores, and the walk over layers.

    %y = linear(%x, W)      ->      %y = linear(%x, W')             W' has a share of zeros, or N weights in every M

The passes choose the zeros (and, some of them, new values for the rest). Zeros survive everything that comes after: symmetric
codes and codes with a zero point hold 0 exactly, and rounding passes keep a weight that is 0 at 0. `compress-sparse`, last in a
pipeline, then takes them out of the program: it stores a bit for each weight and the values that are left.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage, origin_of
from ..base import LOSSY, Pass, PassContext, PassResult
from ..fold.layer import Layer, layer_of, set_parameters
from ..layerwise import LayerRows, Layerwise
from ..rules import values_by_name

_FORM = 'LAYER=SPARSITY, such as "*.fc1=0.7" or "*.fc1=2:4"'
_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Level:
    """How sparse a weight becomes: `sparsity` is the share of zeros; of every `group` neighbouring inputs `kept` stay (N:M).

    group 0: no pattern.
    """

    sparsity: float
    kept: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str, what: str) -> Level:
        """`0.7`, or `2:4` for two weights in every four.

        Raises:
            OptionError: neither, a sparsity outside [0, 1), or a pattern that keeps none or all.
        """
        match = _PATTERN.fullmatch(text)
        if match:
            kept, group = int(match[1]), int(match[2])
            if not 0 < kept < group:
                raise OptionError(f"{what}: pattern '{text}' must keep at least 1 of M weights and fewer than all, such as 2:4")
            return cls(1 - kept / group, kept, group)
        try:
            sparsity = float(text)
        except ValueError:
            raise OptionError(f"{what}: '{text}' is neither a sparsity such as 0.7 nor a pattern such as 2:4") from None
        if not 0 <= sparsity < 1:
            raise OptionError(f"{what}: sparsity must lie in [0, 1), not {text}")
        return cls(sparsity)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{self.sparsity:g}"

    def removed(self, count: int) -> int:
        """How many of `count` weights become zero."""
        return count // self.group * (self.group - self.kept) if self.group else min(round(self.sparsity * count), count - 1)


# -- which weights stay, for given scores --------------------------------------------------------------------------------------


def keep_best(scores: torch.Tensor, level: Level, by_row: bool = False) -> torch.Tensor:
    """The mask of the weights (G, O, K) with the highest scores, exactly as many as the level says.

    by_row: as many in every row; else over the whole layer. A pattern always holds in every row. Of equal scores the first stay.
    """
    if level.group:
        groups = scores.reshape(*scores.shape[:-1], -1, level.group)
        return _best(groups, level.group - level.kept).reshape(scores.shape)
    if by_row:
        return _best(scores, level.removed(scores.shape[-1]))
    return _best(scores.reshape(-1), level.removed(scores.numel())).reshape(scores.shape)


def _best(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """All but the `removed` lowest of the last axis."""
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(removed, -1, keepdim=True).values
    above, equal = scores > threshold, scores == threshold
    missing = scores.shape[-1] - removed - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))


# -- the passes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparsify(Pass):
    """Base of the passes that put zeros into the weights of convolutions (not transposed) and linear layers.

    Options:
        sparsity: share of the weights of every layer that becomes zero, in [0, 1).
        pattern: N:M, such as 2:4 or 4:8, for every layer, in place of `sparsity`: in each row, of every M input channels that
            follow each other (at the same tap of a convolution) N weights stay.
        layers: other levels for single layers, `LAYER=0.7`, `LAYER=2:4` or `LAYER=0` (left as it is); a layer may be a glob and
            the last match counts. A plan is replayed by this option.
    """

    effect: ClassVar = LOSSY
    accepts: ClassVar = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves: ClassVar = Stage.COMPRESSED

    sparsity: float = 0.5
    pattern: str = ""
    layers: tuple[str, ...] = ()

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        layers = sparse_layers(program)
        if not layers:
            raise PassError(f"{self.name} finds no convolution or linear layer with a constant weight in '{program.name}'")
        levels = self.levels(layers)
        for layer in layers:
            level, channels = levels[layer.node], layer.weight.shape[1]
            if level.group and channels % level.group:
                name = origin_of(layer.node)
                raise OptionError(
                    f"pattern {level} of {self.name} does not divide the {channels} input channels of '{name}'; "
                    f'leave the layer dense with layers=["{name}=0"], or give it a sparsity of its own'
                )

    def levels(self, layers: Sequence[Layer]) -> dict[fx.Node, Level]:
        """The level of every layer, by node.

        Raises:
            OptionError: a level that is none. UnknownNameError: a rule that names no layer, with the nearest name.
        """
        origins = [origin_of(layer.node) for layer in layers]
        chosen = "pattern" if self.pattern else "sparsity"
        default = Level.parse(self.pattern or str(self.sparsity), f"option '{chosen}' of {self.name}")
        found = {layer.node: default for layer in layers}
        option = f"'layers' of {self.name}"
        named = values_by_name(self.layers, origins, option, _FORM, lambda text: Level.parse(text, f"'{text}' in {option}"))
        return found | {x.node: named[origin] for x, origin in zip(layers, origins, strict=True) if origin in named}

    def run(self, program: Program, context: PassContext) -> PassResult:
        layers = sparse_layers(program)
        weights, errors = self.pruned(program, layers, self.levels(layers), context)
        modified = program.stage is not Stage.COMPRESSED
        for layer in layers:
            if layer.node in weights and not torch.equal(weights[layer.node], layer.weight):
                set_parameters(program, layer, weights[layer.node], layer.bias)
                modified = True
        program.sweep()
        after = sparse_layers(program)
        zeros = {origin_of(layer.node): sparsity_of(layer.weight) for layer in after}
        total = sum(layer.weight.numel() for layer in after)
        removed = sum(int((layer.weight == 0).sum()) for layer in after)
        stats: dict[str, Any] = {"layers": len(weights), "sparsity": round(removed / total, 4), "zeros": zeros}
        return PassResult(program, modified, stats | ({"errors": errors} if errors else {}))

    @abc.abstractmethod
    def pruned(
        self, program: Program, layers: Sequence[Layer], levels: dict[fx.Node, Level], context: PassContext
    ) -> tuple[dict[fx.Node, torch.Tensor], dict[str, float]]:
        """The new weight of every layer's node, and the relative squared errors of the outputs by origin, where known."""


@dataclass(frozen=True)
class CalibratedSparsify(Sparsify):
    """Base of the passes that look at what a layer reads: each layer sees inputs that the sparse layers before it have made."""

    needs_calibration: ClassVar = True

    #: Options of the subclasses: calibration samples, and output positions of a layer, used at most.
    samples: int = 128
    rows: int = 8192

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        for option in ("samples", "rows"):
            if getattr(self, option) < 1:
                raise OptionError(f"option '{option}' of {self.name} must be at least 1, not {getattr(self, option)}")

    @abc.abstractmethod
    def choose(self, rows: LayerRows, level: Level) -> torch.Tensor:
        """The sparse weight (G, O, K). With a pattern, of every `level.group` neighbouring columns `level.kept` stay."""

    def pruned(
        self, program: Program, layers: Sequence[Layer], levels: dict[fx.Node, Level], context: PassContext
    ) -> tuple[dict[fx.Node, torch.Tensor], dict[str, float]]:
        samples = context.require_calibration(self.name).samples[: self.samples]
        walk = Layerwise(program, samples, context.progress, self.name)
        generator = torch.Generator().manual_seed(context.seed)
        shared: dict[fx.Node, torch.Tensor] = {}
        weights: dict[fx.Node, torch.Tensor] = {}
        errors: dict[str, float] = {}
        for layer in walk.layers():
            level = levels.get(layer.node)
            if level is None or not level.sparsity:
                continue
            parameter: fx.Node = layer.node.args[1]  # type: ignore[assignment]
            if parameter not in shared:
                rows = walk.rows(layer, self.rows, generator)
                order = channels_last(layer)
                chosen = self.choose(_columns(rows, order), level)[:, :, order.argsort()]
                errors[origin_of(layer.node)] = round(rows.error(chosen), 6)
                shared[parameter] = chosen.reshape(layer.weight.shape).to(layer.weight.dtype)
            weights[layer.node] = shared[parameter]
            walk.rewrite(layer, shared[parameter])
        return weights, errors


def sparse_layers(program: Program) -> list[Layer]:
    """The layers that the passes treat, in graph order."""
    found = [layer_of(program, node) for node in program.nodes]
    return [layer for layer in found if layer is not None and not layer.transposed]


def sparsity_of(weight: torch.Tensor) -> float:
    return round(float((weight == 0).sum() / weight.numel()), 4)


def channels_last(layer: Layer) -> torch.Tensor:
    """The columns of a layer's rows, channels outside and taps inside, in the order of a pattern: taps outside."""
    channels, taps = layer.weight.shape[1], prod(layer.kernel)
    return torch.arange(channels * taps).reshape(channels, taps).T.reshape(-1)


def _columns(rows: LayerRows, order: torch.Tensor) -> LayerRows:
    """The same layer with its columns in another order."""
    if bool((order[1:] > order[:-1]).all()):
        return rows
    return LayerRows(
        rows.inputs[:, :, order], rows.exact_inputs[:, :, order], rows.targets, rows.weight[:, :, order], rows.bias, rows.fitted
    )
