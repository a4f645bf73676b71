"""Weight formats: how the weights of a layer are written down, and which layer gets which.

    int8, int4, ...     signed codes in [-(2^(b-1) - 1), 2^(b-1) - 1], one scale an output channel, zero point 0
    uint4, uint2, ...   unsigned codes in [0, 2^b - 1], one scale and one zero point an output channel
    int4g64, pot4, fp8e4m3, fp4e2m1g32, pe4, ...        codes of a table, see `codebooks`

Layers with the first two multiply integers; with the others they compute in float, on weights decoded from their codes. Fewer
than 8 bits are packed in the integer program and unpacked inside the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.errors import OptionError
from ...ir.program import origin_of
from ..rules import values_by_name
from .codebooks import CodebookFormat, parse_codebook
from .encoding import SMALLEST_SCALE, Encoding, code_range, symmetric
from .observers import WeightObserver

_INTEGER = re.compile(r"(u?)int([2-8])")


@dataclass(frozen=True)
class IntegerFormat:
    """Uniform codes of `bits` bits, per output channel; `asymmetric` has a zero point."""

    bits: int
    asymmetric: bool = False

    def __str__(self) -> str:
        return f"{'u' if self.asymmetric else ''}int{self.bits}"

    def encoding(self, weight: torch.Tensor, observer: WeightObserver) -> Encoding:
        """The encoding of a weight (C, ...) along axis 0. The observer chooses where symmetric codes saturate."""
        if not self.asymmetric:
            return symmetric(observer(weight, self.bits), self.bits, axis=0)
        rows = weight.detach().reshape(weight.shape[0], -1).to(torch.float64)
        low, high = rows.amin(1).clamp_max(0.0), rows.amax(1).clamp_min(0.0)
        qmin, qmax = code_range(self.bits, signed=False)
        scale = ((high - low) / (qmax - qmin)).clamp_min(SMALLEST_SCALE).to(torch.float32)
        zero = (qmin - low / scale.to(torch.float64)).round().clamp(qmin, qmax).to(torch.int32)
        return Encoding(scale, zero, qmin, qmax, torch.uint8, axis=0)


WeightFormat = IntegerFormat | CodebookFormat

KNOWN = (
    "int2 to int8 (symmetric) and uint2 to uint8 (asymmetric); for weights of float layers int4g64 and uint4g64 (any bits and "
    "group), pot4, fp8e4m3, fp4e2m1 and others of 1 + e + m bits, pe4, each also with a group such as pot4g64"
)


def parse_format(text: str) -> WeightFormat:
    """`int4`, `uint2`, `int4g64`, `fp4e2m1`, ...

    Raises:
        OptionError: no such format; the message lists what there is.
    """
    match = _INTEGER.fullmatch(text)
    found = IntegerFormat(int(match[2]), bool(match[1])) if match else parse_codebook(text)
    if found is None:
        raise OptionError(f"'{text}' is no weight format; known: {KNOWN}")
    return found


def parse_integer_format(text: str) -> IntegerFormat:
    """A format that layers multiply as integers. Raises OptionError where `text` is another one, or none."""
    found = parse_format(text)
    if not isinstance(found, IntegerFormat):
        raise OptionError(f"'{text}' is for layers that compute in float; choose among int2 to int8 and uint2 to uint7")
    return found


#: How one entry of an allocation is written.
RULE = 'LAYER=FORMAT, such as "blocks.*.conv1=int4"'


def formats_of(rules: Sequence[str], layers: Sequence[fx.Node], default: WeightFormat, who: str) -> dict[fx.Node, WeightFormat]:
    """The format of every layer: that of the last rule that matches its origin, or the default.

    Raises:
        OptionError: no rule, or no format. UnknownNameError: a rule that names no layer.
    """
    named = values_by_name(rules, [origin_of(layer) for layer in layers], f"'weights' of {who}", RULE, parse_format)
    return {layer: named.get(origin_of(layer), default) for layer in layers}
