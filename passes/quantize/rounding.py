"""Choosing the codes of weights on data: what the rounding passes (`adaround`, `gptq`, `gpfq`, ...) share.

Each takes an annotated program, whose scales are given, and chooses the code of every weight so that its layer's outputs stay
near the float ones, where the nearest code only keeps the weight itself. `passes/layerwise.py` shows the layers.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage, origin_of, single_user
from ..base import LOSSY, Pass, PassContext, PassResult
from ..layerwise import LayerRows, gather_rows
from . import operators as ops
from .annotate import bias_on_grid
from .codebooks import Codebook, read_codebook, read_table_codes, write_table_codes
from .encoding import Encoding, is_fake_quantize, read_codes, read_encoding, write_codes
from .side_by_side import SideBySide, is_quantized_layer

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows(LayerRows):
    """A layer's rows in an annotated program, where `exact` is the float model.

    current: the weight as the annotated program rounds it now, in steps: nearest, or what a pass before chose; (G, O, K).
    """

    current: torch.Tensor


@dataclass(frozen=True)
class Steps:
    """The grid of a weight (G, O, K) in steps: value = step * scale, with low <= step <= high; all (G, O, 1), float32."""

    scale: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, encoding: Encoding, weight: torch.Tensor) -> Steps:
        shape = (*weight.shape[:2], 1)
        scale, zero = (v.to(torch.float32).expand(math.prod(shape)).reshape(shape) for v in (encoding.scale, encoding.zero_point))
        return cls(scale, encoding.qmin - zero, encoding.qmax - zero)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        return self.clamp(torch.round(weight / self.scale))

    def clamp(self, steps: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(steps, self.low), self.high)


@dataclass(frozen=True)
class Entries:
    """What a weight (G, O, K) behind a table may be: (table[code] - zero) * scale, with one scale and zero for `group` inputs.

    Attributes:
        table: sorted, (T,). scale, zero: (G, O, parts); all float64.
    """

    table: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: int

    @classmethod
    def of(cls, codebook: Codebook, weight: torch.Tensor) -> Entries:
        shape = (*weight.shape[:2], -1)
        scale = codebook.scale.to(torch.float64).reshape(shape)
        zero = torch.zeros_like(scale) if codebook.zero is None else codebook.zero.to(torch.float64).reshape(shape)
        return cls(codebook.table.to(torch.float64), scale, zero, codebook.group)

    def nearest(self, column: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values nearest to the weights (G, O) of one input, whose place in each group of channels is `places` (G,)."""
        part = (places // self.group)[:, None, None].expand(*column.shape, 1)
        scale, zero = (v.gather(2, part)[:, :, 0] for v in (self.scale, self.zero))
        codes = torch.bucketize(column / scale + zero, (self.table[1:] + self.table[:-1]) / 2)
        return codes.to(torch.float64), (self.table[codes] - zero) * scale


@dataclass(frozen=True)
class Chosen:
    """What a pass chose for a layer: the step of every weight (G, O, K), and a new scale (G, O, 1) or bias (G, 1, O) if any."""

    steps: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Rounding(Pass):
    """Base of the passes that choose codes layer by layer: each one sees inputs that the choices before it have made."""

    effect: ClassVar = LOSSY
    accepts: ClassVar = (Stage.ANNOTATED,)
    needs_calibration: ClassVar = True

    #: Calibration samples, and output positions of a layer, used at most.
    samples: int
    rows: int
    #: Whether `choose_entries` chooses codes of tables.
    tables: ClassVar[bool] = False
    #: Further options that must be above 0.
    above_zero: ClassVar[tuple[str, ...]] = ()

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        for option in ("samples", "rows"):
            if getattr(self, option) < 1:
                raise OptionError(f"option '{option}' of {self.name} must be at least 1, not {getattr(self, option)}")
        for option in self.above_zero:
            if getattr(self, option) <= 0:
                raise OptionError(f"option '{option}' of {self.name} must be above 0, not {getattr(self, option)}")

    @abc.abstractmethod
    def choose(self, rows: Rows, steps: Steps, following: Following | None, generator: torch.Generator) -> Chosen:
        """The step of every weight: whole numbers within the limits of `steps`."""

    def choose_entries(self, rows: LayerRows, entries: Entries) -> torch.Tensor:
        """The code of every weight (G, O, K) of a layer whose codes are of a table; of passes with `tables`."""
        raise NotImplementedError(self.name)

    def run(self, program: Program, context: PassContext) -> PassResult:
        samples = context.require_calibration(self.name).samples[: self.samples]
        both = SideBySide(program, samples, context.progress, self.name)
        generator = torch.Generator().manual_seed(context.seed)
        done: set[fx.Node] = set()
        errors: dict[str, list[float]] = {}
        changed = total = 0
        modified = False
        if not self.tables:
            self._refuse_tables(program)
        for layer in both.layers(self.tables):
            if layer.args[1] in done:
                continue
            done.add(layer.args[1])  # type: ignore[arg-type]
            if not is_fake_quantize(layer.args[1]):  # type: ignore[arg-type]
                moved, count, pair = self._round_table(program, layer, both, generator)
                modified, changed, total = modified or moved > 0, changed + moved, total + count
                errors[origin_of(layer)] = [round(error, 6) for error in pair]
                continue
            rows = gather(program, layer, both, self.rows, generator)
            before = read_codes(program, layer.args[1])  # type: ignore[arg-type]
            encoding = read_encoding(program, layer.args[1])  # type: ignore[arg-type]
            steps = Steps.of(encoding, rows.weight)
            with torch.enable_grad():
                chosen = self.choose(rows, steps, following(program, layer), generator)
            # What a sparsity pass made 0 stays 0.
            chosen = replace(chosen, steps=chosen.steps * (rows.weight != 0))
            after = chosen.steps.reshape(before.shape) + along_channels(encoding.zero_point, before)
            modified |= write(program, layer, chosen, after)
            both.redo(layer)
            changed += int((after != before).sum())
            total += before.numel()
            last = chosen.steps * (steps.scale if chosen.scale is None else chosen.scale)
            pair = (rows.error(rows.current * steps.scale), rows.error(last, chosen.bias))
            errors[origin_of(layer)] = [round(error, 6) for error in pair]
        program.sweep()
        return PassResult(program, modified, {"layers": len(errors), "changed": changed / max(total, 1), "errors": errors})

    def _round_table(
        self, program: Program, layer: fx.Node, both: SideBySide, generator: torch.Generator
    ) -> tuple[int, int, tuple[float, float]]:
        """Codes that changed, codes, and the layer's relative errors before and after."""
        quantized: fx.Node = layer.args[1]  # type: ignore[assignment]
        rows = layer_rows(program, layer, both, self.rows, generator)
        codebook, before = read_codebook(program, quantized), read_table_codes(program, quantized)
        after = self.choose_entries(rows, Entries.of(codebook, rows.weight)).reshape(before.shape).to(torch.uint8)
        write_table_codes(program, quantized, after)
        both.redo(layer)
        values = [codebook.dequantize(codes).reshape(rows.weight.shape) for codes in (before, after)]
        return int((after != before).sum()), before.numel(), (rows.error(values[0]), rows.error(values[1]))

    def _refuse_tables(self, program: Program) -> None:
        layers = [n for n in program.nodes if is_quantized_layer(n)]
        if layers and not any(is_fake_quantize(n.args[1]) for n in layers):  # type: ignore[arg-type]
            raise PassError(
                f"{self.name} chooses codes of integers with a scale a channel, and every layer's weights are behind a table, as "
                f"those of '{origin_of(layers[0])}'; gptq takes tables too"
            )


def write(program: Program, layer: fx.Node, chosen: Chosen, codes: torch.Tensor) -> bool:
    """Puts what was chosen for `layer` into the program; whether anything changed."""
    quantized: fx.Node = layer.args[1]  # type: ignore[assignment]
    if chosen.scale is not None:
        scale = program.parameter(quantized.args[1])
        if scale is None or scale.numel() != chosen.scale.numel():
            raise PassError(
                f"the weight of '{origin_of(layer)}' has one scale for all channels; quantize it with one a channel, or take a "
                "pass that keeps scales (gptq, gpfq, adaround)"
            )
        quantized.update_arg(1, program.add_parameter(str(quantized.args[1]), chosen.scale.reshape(scale.shape), quantized))
    if chosen.bias is not None:
        args = [*layer.args, None][: max(len(layer.args), 3)]
        name = str(args[2]) if args[2] is not None else f"{layer.name}_bias"
        args[2] = program.add_parameter(name, bias_on_grid(program, layer, chosen.bias.reshape(-1)), layer)
        layer.args = tuple(args)
    return write_codes(program, quantized, codes) or chosen.scale is not None or chosen.bias is not None


def along_channels(zero_point: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Zero points, one or one an output channel, in a shape that broadcasts against codes; float32."""
    return zero_point.to(torch.float32).reshape(-1, *[1] * (codes.dim() - 1))


@dataclass(frozen=True)
class Following:
    """The element-wise function that reads a layer's output, where nothing else does."""

    node: fx.Node
    rest: tuple[object, ...]

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return self.node.target(value, *self.rest, **self.node.kwargs)  # type: ignore[operator]


def following(program: Program, layer: fx.Node) -> Following | None:
    reader = single_user(layer)
    if reader is None or not ops.is_unary(program, reader):
        return None
    return Following(reader, tuple(ops.number(program, a) if isinstance(a, fx.Node) else a for a in reader.args[1:]))


def layer_rows(program: Program, layer: fx.Node, both: SideBySide, count: int, generator: torch.Generator) -> LayerRows:
    """The rows of a layer at up to `count` output positions, drawn evenly from all samples."""
    source: fx.Node = layer.args[0]  # type: ignore[assignment]
    weight = program.parameter(layer.args[1].args[0])  # type: ignore[union-attr]
    assert weight is not None
    bias = program.parameter((*layer.args, None)[2])
    return gather_rows(
        layer, weight, bias, both.values[source], both.exact[source], both.exact[layer], count, generator
    )  # fmt: skip


def gather(program: Program, layer: fx.Node, both: SideBySide, count: int, generator: torch.Generator) -> Rows:
    """`layer_rows`, with the weight as it is rounded now."""
    quantized: fx.Node = layer.args[1]  # type: ignore[assignment]
    rows = layer_rows(program, layer, both, count, generator)
    codes = read_codes(program, quantized)
    current = codes - along_channels(read_encoding(program, quantized).zero_point, codes)
    return Rows(**vars(rows), current=current.reshape(rows.weight.shape))
