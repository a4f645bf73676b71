"""Weights of integer layers: s8 values with zero point 0, packed where their encoding has fewer than 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.fake import broadcast_along
from ...ir.dialect.packed import MOST_BITS, pack
from ...ir.errors import PassError
from ...ir.program import origin_of
from .lower_forms import Builder, Codes


@dataclass(frozen=True)
class IntegerWeight:
    """node: s8 in the program. values: the same as a tensor (O, ...), code - zero point."""

    node: fx.Node
    values: torch.Tensor


def integer_weight(b: Builder, weight: Codes, codes: torch.Tensor, layer: fx.Node) -> IntegerWeight:
    """The weight of a convolution or linear layer; layers that share it share the node.

        codes of 8 bits          s8 parameter
        of 2 to 7 bits     ->    gw.unpack(u8 parameter (O, bytes), bits, shape)         symmetric
                                 gw.unpack(..., zero_point int16 (O,))                   asymmetric

    Args:
        codes: what the parameter `weight.node` holds.

    Raises:
        PassError: a code minus its zero point leaves s8 (asymmetric 8-bit encodings can).
    """
    if weight.integer is None:
        values = _values(weight, codes, layer)
        weight.integer = IntegerWeight(_emit(b, weight, codes, values), values)
    return weight.integer


def _values(weight: Codes, codes: torch.Tensor, layer: fx.Node) -> torch.Tensor:
    encoding = weight.encoding
    values = codes.to(torch.int32) - broadcast_along(encoding.zero_point, codes.dim(), encoding.axis)
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    if low < -128 or high > 127:
        raise PassError(
            f"the weight of '{origin_of(layer)}' lies in [{low}, {high}] after its zero point is taken off, and integer layers "
            f"take s8: quantize it symmetric, or asymmetric to at most {MOST_BITS} bits"
        )
    return values.to(torch.int8)


def _emit(b: Builder, weight: Codes, codes: torch.Tensor, values: torch.Tensor) -> fx.Node:
    encoding, name = weight.encoding, str(weight.node.target)
    origin = origin_of(weight.node)
    if encoding.bits > MOST_BITS:
        return weight.node if torch.equal(values, codes) and codes.dtype is torch.int8 else b.parameter(name, values, origin)
    bits, rows = encoding.bits, values.shape[0]
    lowest = -(1 << (bits - 1))
    if int(encoding.zero_point.abs().max()) == 0 and lowest <= encoding.qmin and encoding.qmax < -lowest:
        packed = b.parameter(f"{name}_packed", pack(codes.to(torch.int16) - lowest, bits), origin)
        return b.emit(gw.unpack.default, packed, bits, list(values.shape), origin=origin)
    unsigned = codes.to(torch.int16) - encoding.qmin
    zero = (encoding.zero_point.reshape(-1) - encoding.qmin).to(torch.int16).expand(rows)
    packed = b.parameter(f"{name}_packed", pack(unsigned, bits), origin)
    zero_point = b.parameter(f"{name}_zero_point", zero, origin)
    return b.emit(gw.unpack.default, packed, bits, list(values.shape), zero_point, origin=origin)
