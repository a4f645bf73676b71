"""The `quantize` pass: chooses encodings and writes them into the program as fake quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from ...ir.content import program_hash
from ...ir.dialect import gw
from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage, origin_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..rules import matching, split_rule
from . import operators as ops
from .codebooks import Codebook, CodebookFormat, insert_fake_codebook, is_fake_codebook, read_codebook
from .encoding import Encoding, for_range, insert_fake_quantize, is_fake_quantize, read_encoding
from .formats import RULE, IntegerFormat, WeightFormat, formats_of, parse_format
from .histogram import Histogram
from .observers import Grid, activation_observer, weight_observer
from .regions import Placement, Regions, find_regions
from .statistics import collect

#: A bias may need this many codes of its accumulator at most; see `raise_for_bias`.
LARGEST_BIAS = 1 << 28


@register
@dataclass(frozen=True)
class Quantize(Pass):
    """Puts `gw.fake_quantize` on weights and activations, with encodings chosen on calibration data.

        %y = convolution(%x, weight, bias)               %y = convolution(%x', fake_quantize(weight, sw, 0, -127, 127, 0), bias)
        %r = relu(%y)                             ->     %r = fake_quantize(relu(%y), s, z, 0, 255)
        %z = convolution(%r, ...)                        %z = convolution(%r, ...)

    A layer whose weights are codes of a table (`weights`, see `codebooks`) computes in float; its activations are left alone:

        %y = linear(%x, weight, bias)             ->     %y = linear(%x, fake_codebook(weight, table, scale, group), bias)

    Weights: symmetric, one scale an output channel. Activations: asymmetric u8, one scale a tensor; the second operand of a
    matmul is symmetric s8; a softmax has scale 1/255. Which values: see `regions`. Jacob et al. 2018 (arXiv:1712.05877).

    Options:
        weight_bits, activation_bits: 2 to 8.
        activation_observer: how the range of an activation is chosen; `percentile` sets what the observer of that name keeps.
        weight_observer: the same for weights.
        weights: formats of single layers, `ORIGIN=FORMAT` (see `formats`); an origin may be a glob and the last match counts.
            All other layers have `weight_bits`. Where every layer is to compute in float, so do the matmuls of two activations;
            "*=FORMAT" in the last place says so for every layer, and no calibration is needed then.
        skip: origins (or globs of origins) of nodes that stay float.

    Stats: layers and activations quantized, bits of a weight on average, and the signal-to-noise ratio of every quantized
    weight in dB.

    Raises:
        OptionError: a number out of range. UnknownNameError: a `skip` pattern or a rule of `weights` that matches nothing.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar = LOSSY
    accepts: ClassVar = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves: ClassVar = Stage.ANNOTATED
    float32_only: ClassVar = True

    weight_bits: int = 8
    activation_bits: int = 8
    activation_observer: Literal["min-max", "percentile", "mse", "kl"] = "mse"
    weight_observer: Literal["min-max", "mse"] = "min-max"
    percentile: float = 99.99
    skip: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether some activation may be quantized."""
        if not self.weights:
            return True
        pattern, text = split_rule(self.weights[-1], f"'weights' of {self.name}", RULE)
        return pattern != "*" or not isinstance(parse_format(text), CodebookFormat)

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        for option in ("weight_bits", "activation_bits"):
            if not 2 <= getattr(self, option) <= 8:
                raise OptionError(f"option '{option}' of {self.name} must lie in 2 to 8, not {getattr(self, option)}")
        if not 50 < self.percentile <= 100:
            raise OptionError(f"option 'percentile' of {self.name} must lie in (50, 100], not {self.percentile}")
        for node in program.nodes:
            if node.target is gw.from_bitmask.default:
                raise PassError(
                    f"{self.name} reads weights as parameters, but '{origin_of(node)}' is stored without its zeros; "
                    "put compress-sparse last, after lower-integer"
                )

    def run(self, program: Program, context: PassContext) -> PassResult:
        skipped = self.skipped(program)
        layers = weight_layers(program, find_regions(program, skipped))
        formats = formats_of(self.weights, layers, IntegerFormat(self.weight_bits), self.name)
        decoded = {layer: form for layer, form in formats.items() if isinstance(form, CodebookFormat)}
        regions = find_regions(program, [*skipped, *(decoded if len(decoded) < len(layers) else _all_layers(program, layers))])
        if not regions.layers and not decoded:
            raise PassError(f"{self.name} finds no convolution, linear or matmul to quantize in '{program.name}'")
        encodings = self._activation_encodings(program, regions, context)
        for placement in regions.placements:
            _place(program, placement, encodings[placement.source])
        quality = self._quantize_weights(program, regions, formats)
        quality |= self._decode_weights(program, decoded)
        program.sweep()
        program.stage = Stage.ANNOTATED
        stats = {
            "layers": len(regions.layers),
            "decoded_layers": len(decoded),
            "activations": len(regions.placements),
            "average_bits": round(average_bits(program), 3),
            "weight_sqnr_db": quality,
        }
        return PassResult(program, True, stats)

    def skipped(self, program: Program) -> list[fx.Node]:
        """The nodes that `skip` keeps float. Raises UnknownNameError where a pattern matches nothing."""
        nodes = [n for n in program.nodes if n.op == "call_function"]
        skipped = set(matching(self.skip, [origin_of(n) for n in nodes], f"'skip' of {self.name}"))
        return [n for n in nodes if origin_of(n) in skipped]

    def _activation_encodings(self, program: Program, regions: Regions, context: PassContext) -> dict[fx.Node, Encoding]:
        observer = activation_observer(self.activation_observer)
        if not regions.placements:
            return {}
        watched = [p.source for p in regions.placements if not p.bounded_by_softmax]
        # Many plans of one model differ in weight formats only: its activations are observed once.
        key = f"histograms {program_hash(program)} {[n.name for n in watched]}"
        calibration = context.require_calibration(self.name)
        found = context.remember(key, lambda: _by_name(collect(program, watched, calibration, context.progress)))
        histograms = {node: found[node.name] for node in watched}
        encodings = {}
        for placement in regions.placements:
            if placement.bounded_by_softmax:
                low, high = 0.0, 1.0
            else:
                grid = Grid(self.activation_bits, placement.signed, self.percentile)
                low, high = observer(histograms[placement.source], grid)
            encodings[placement.source] = for_range(low, high, self.activation_bits, placement.signed)
        return encodings

    def _quantize_weights(self, program: Program, regions: Regions, formats: dict[fx.Node, WeightFormat]) -> dict[str, float]:
        """Fake-quantizes the weights of integer convolutions and linear layers; returns their SQNR by origin."""
        observer = weight_observer(self.weight_observer)
        done: set[fx.Node] = set()
        quality: dict[str, float] = {}
        for layer in weight_layers(program, regions):
            if layer.args[1] in done:
                continue
            weight_node: fx.Node = layer.args[1]  # type: ignore[assignment]
            weight: torch.Tensor = program.parameter(weight_node)  # type: ignore[assignment]
            form = formats[layer]
            assert isinstance(form, IntegerFormat)  # the others are no layers of these regions
            encoding = form.encoding(weight.detach(), observer)
            readers = [n for n in weight_node.users if n in regions.layers]
            for reader in readers:
                encoding = raise_for_bias(program, encoding, weight, reader)
            fake = insert_fake_quantize(program, weight_node, encoding, str(weight_node.target), before=readers[0])
            for reader in readers:
                reader.replace_input_with(weight_node, fake)
            done.update((weight_node, fake))
            quality[origin_of(layer)] = round(sqnr_db(weight, encoding), 2)
        return quality

    def _decode_weights(self, program: Program, decoded: dict[fx.Node, CodebookFormat]) -> dict[str, float]:
        """Puts the weights of float layers behind their tables; returns their SQNR by origin."""
        made: dict[tuple[fx.Node, CodebookFormat], tuple[fx.Node, float]] = {}
        quality: dict[str, float] = {}
        for layer, form in decoded.items():
            source: fx.Node = layer.args[1]  # type: ignore[assignment]
            if (source, form) not in made:
                weight: torch.Tensor = program.parameter(source)  # type: ignore[assignment]
                codebook = form.fit(weight, search=self.weight_observer == "mse")
                fake = insert_fake_codebook(program, source, codebook, before=layer)
                made[source, form] = fake, round(sqnr_db(weight, codebook), 2)
            fake, quality[origin_of(layer)] = made[source, form]
            layer.update_arg(1, fake)
        return quality


def weight_layers(program: Program, regions: Regions) -> list[fx.Node]:
    """The layers whose weight is a parameter: convolutions and linear layers, in graph order."""
    return [n for n in regions.layers if n.target not in ops.MATMUL and program.parameter(n.args[1]) is not None]


def _all_layers(program: Program, layers: list[fx.Node]) -> list[fx.Node]:
    """`layers` and the matmuls of two activations."""
    return [*layers, *(n for n in program.nodes if n.target in ops.MATMUL)]


def average_bits(program: Program) -> float:
    """Bits of a weight, averaged over all weights with an encoding. The scales and zeros of a codebook count."""
    bits = count = 0
    for node in program.nodes:
        if is_fake_codebook(node):
            codebook, weight = read_codebook(program, node), program.parameter(node.args[0])
            assert weight is not None
            zeros = 0 if codebook.zero is None else 8 * codebook.zero.numel()
            count += weight.numel()
            bits += weight.numel() * codebook.bits + 32 * codebook.scale.numel() + zeros
        weight = program.parameter(node.args[0]) if is_fake_quantize(node) else None
        if weight is not None:
            encoding = read_encoding(program, node)
            count += weight.numel()
            bits += weight.numel() * encoding.bits
    return bits / max(count, 1)


def _by_name(histograms: dict[fx.Node, Histogram]) -> dict[str, Histogram]:
    return {node.name: histogram for node, histogram in histograms.items()}


def _place(program: Program, placement: Placement, encoding: Encoding) -> None:
    source = placement.source
    fake = insert_fake_quantize(program, source, encoding, source.name, before=_after(source))
    for reader in placement.readers:
        reader.replace_input_with(source, fake)


def _after(node: fx.Node) -> fx.Node:
    """The node before which a reader of `node` can be inserted: the next one, past the parameters and inputs."""
    following = node.next
    while node.op in ("placeholder", "get_attr") and following.op in ("placeholder", "get_attr"):
        following = following.next
    return following


def raise_for_bias(program: Program, encoding: Encoding, weight: torch.Tensor, layer: fx.Node) -> Encoding:
    """Raises the scale of channels whose weights are next to nothing beside their bias, so that the bias fits in s32.

    The bias has the scale s_x * s_w; a dead channel (all weights 0, say after batch-norm folding) would need more than 32 bits.
    The weights lost by this are below 2^-28 of the bias each.
    """
    value, _, bias, *_ = (*layer.args, None)
    bias, source = program.parameter(bias), source_of_codes(program, value)
    if bias is None or source is None:
        return encoding
    input_scale = read_encoding(program, source[0]).step * source[1]
    floor = bias.detach().abs().to(torch.float64) / (input_scale * LARGEST_BIAS)
    scale = torch.maximum(encoding.scale.to(torch.float64), floor).to(torch.float32)
    return replace(encoding, scale=scale)


def source_of_codes(program: Program, value: Any) -> tuple[fx.Node, float] | None:
    """The fake_quantize whose codes reach `value` through moves and constant factors, and the product of those factors."""
    factor = 1.0
    while isinstance(value, fx.Node):
        if is_fake_quantize(value):
            return value, factor
        own = ops.positive_factor(program, value)
        if own is None and not ops.keeps_encoding(value):
            return None
        factor, value = factor * (own or 1.0), value.all_input_nodes[0]
    return None


def bias_on_grid(program: Program, layer: fx.Node, bias: torch.Tensor) -> torch.Tensor:
    """`bias` rounded to multiples of s_x * s_w, as the accumulator of `layer` holds it; unchanged where it reads no codes."""
    source = source_of_codes(program, layer.args[0])
    weight = layer.args[1]
    if source is None or not isinstance(weight, fx.Node) or not is_fake_quantize(weight):
        return bias
    step = read_encoding(program, source[0]).step * source[1] * read_encoding(program, weight).scale.to(torch.float64)
    return (torch.round(bias.detach().to(torch.float64) / step) * step).to(bias.dtype)


def sqnr_db(value: torch.Tensor, encoding: Encoding | Codebook) -> float:
    """10 log10(|x|^2 / |x - quantized x|^2); infinite where nothing is lost."""
    exact = value.detach().to(torch.float64)
    noise = float((encoding.dequantize(encoding.quantize(value.detach())).to(torch.float64) - exact).square().sum())
    signal = float(exact.square().sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
