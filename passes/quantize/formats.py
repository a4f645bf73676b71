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
from fnmatch import fnmatchcase

import torch

from ...ir.errors import OptionError
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


@dataclass(frozen=True)
class Rule:
    """One entry of an allocation: every layer whose origin matches `pattern` has its weights in `format`."""

    pattern: str
    format: WeightFormat

    @classmethod
    def parse(cls, text: str) -> Rule:
        pattern, separator, name = text.rpartition("=")
        if not separator or not pattern:
            raise OptionError(f"'{text}' is no weight rule; write ORIGIN=FORMAT, such as \"blocks.*.conv1=int4\"")
        return cls(pattern, parse_format(name))


class Allocation:
    """The format of every layer: the last rule that matches its origin, or the default.

    Args:
        rules: entries `ORIGIN=FORMAT`; an origin may be a glob.
    """

    def __init__(self, rules: Sequence[str], default: WeightFormat) -> None:
        self.rules = tuple(Rule.parse(text) for text in rules)
        self.default = default

    def of(self, origin: str) -> WeightFormat:
        matches = [rule.format for rule in self.rules if fnmatchcase(origin, rule.pattern)]
        return matches[-1] if matches else self.default

    def require_matches(self, origins: Sequence[str], who: str) -> None:
        """Raises OptionError where a rule names no layer."""
        for rule in self.rules:
            if not any(fnmatchcase(origin, rule.pattern) for origin in origins):
                known = ", ".join(origins[:6]) + (", ..." if len(origins) > 6 else "")
                raise OptionError(f"rule '{rule.pattern}={rule.format}' of {who} matches no quantized layer; there are: {known}")
