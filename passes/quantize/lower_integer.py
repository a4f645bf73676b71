"""Lowering of an annotated program to integer arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from ...ir.dialect import gw
from ...ir.errors import PassError
from ...ir.program import Program, Stage, origin_of
from ...ir.verify import FAKE, is_gw
from ..base import Pass, PassContext, PassResult, bounded, register
from .lower_forms import Builder, Form, Real, is_float
from .lower_rules import rule_of

#: Largest change against the annotated program, relative to the largest output. Both round the same real numbers to the same
#: grids; they part by one step only where a value lies within float error (or half a bias step) of the middle between two codes.
#: Once codes differ, later layers round on their own, so the worst case is two quantizations of one model, whose distance is
#: about the quantization error: 0.02 to 0.05 on the reference CNNs and ViT, 0.12 on MiniLM. A wrong scale, zero point, axis or
#: clamp moves outputs by their own size.
TOLERANCE = 0.25


@register
@dataclass(frozen=True)
class LowerInteger(Pass):
    """Replaces fake quantization by integer arithmetic.

        %q = fake_quantize(%x, sx, zx)                            %q = gw.quantize(%x, sx, zx)            u8
        %w = fake_quantize(weight, sw, 0, axis=0)                 weight, bias: s8, s32 parameters
        %y = convolution(%q, %w, bias)                   ->       %a = gw.convolution(%q, weight, bias)   s32
        %r = relu(%y)                                             %r = gw.rescale(%a, sx * sw / sr)       u8
        %s = fake_quantize(%r, sr, zr)

        %w = fake_codebook(weight, table, scale)         packed codes: u8 parameter
        %y = linear(%x, %w, bias)                        %w = gw.decode(packed, table, scale); %y = linear(%x, %w, bias)

    Bias: round(b / (sx * sw)) in s32. Jacob et al. 2018 (arXiv:1712.05877, sections 2.2 to 2.4) for the arithmetic; HAWQ-V3
    (arXiv:2011.10680, section 3.1) for dyadic rescaling. Float parameters of integer layers are gone afterwards.

    Options:
        rescale: `float-scale` (one float32 multiply, round half even) or `dyadic` (64-bit multiply and shift).

    Stats: integer ops by kind, region edges (quantize, dequantize, scale) and every float island with op, origin and reason.

    Raises:
        PassError: an accumulator that could leave 32 bits; the message names the layer.
    """

    name: ClassVar[str] = "lower-integer"
    effect: ClassVar = bounded(TOLERANCE)
    accepts: ClassVar = (Stage.ANNOTATED,)
    leaves: ClassVar = Stage.INTEGER

    rescale: Literal["float-scale", "dyadic"] = "float-scale"

    def run(self, program: Program, context: PassContext) -> PassResult:
        builder = Builder(program, self.rescale == "dyadic", program.output)
        for node in list(program.nodes):
            if node.op == "output":
                break
            builder.at = node
            builder.forms[node] = lower_node(builder, node)
        builder.at = program.output
        returned = [builder.forms[n].real(builder) for n in program.outputs]
        single = isinstance(program.output.args[0], fx.Node)
        program.output.args = (returned[0] if single else returned,)
        program.sweep()
        program.stage = Stage.INTEGER
        return PassResult(program, True, summarize(program, builder))

    def ensures(self, result: PassResult, context: PassContext) -> None:
        for node in result.program.nodes:
            if node.target in FAKE:
                raise PassError(f"{self.name} left '{node.name}' (from {origin_of(node)}) fake-quantized")


def lower_node(b: Builder, node: fx.Node) -> Form:
    """The form of one annotated node, by its rule or as a float island."""
    if node.op in ("placeholder", "get_attr"):
        return Real(node)
    rule = rule_of(b.program, node)
    outcome = rule(b, node) if rule else "it has no integer form"
    if isinstance(outcome, Form):
        return outcome
    if is_float(node):
        b.island(node, outcome)
    return Real(b.emit(node.target, *b.real(node.args), **b.real(node.kwargs)))


EDGES = frozenset({gw.quantize.default, gw.dequantize.default, gw.scale.default})


def summarize(program: Program, builder: Builder) -> dict[str, object]:
    kinds = Counter(str(n.target).split(".")[1] for n in program.nodes if is_gw(n))
    return {
        "integer_ops": {k: v for k, v in sorted(kinds.items()) if k not in ("quantize", "dequantize", "scale")},
        "edges": {k: kinds[k] for k in ("quantize", "dequantize", "scale") if kinds[k]},
        "islands": [{"op": i.op, "origin": i.origin, "why": i.why} for i in builder.islands],
    }
