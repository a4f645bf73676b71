"""Bit operations: multiply-accumulates times the bits of both factors (HAWQ-V3, arXiv:2011.10680, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.program import Program, dtype_of, shape_of
from ...passes.quantize.operators import CONVOLUTION, LINEAR, MATMUL

#: Ops of (value, weight), float, integer and of 8-bit floats; the weight's outputs come first.
WEIGHTED = (CONVOLUTION, LINEAR, gw.convolution.default, gw.linear.default, gw.convolution_fp8.default, gw.linear_fp8.default)
PRODUCTS = (*MATMUL, gw.matmul.default)
#: Bits of float32, what every ratio is relative to.
FLOAT_BITS = 32


@dataclass(frozen=True)
class Work:
    """One product of a program.

    Attributes:
        value_bits, weight_bits: of the factors as they are multiplied: a weight decoded from a table is float by then.
        weights: how many it reads (0: a matmul); stored_bits: of each as it is stored.
    """

    node: fx.Node
    macs: int
    value_bits: int
    weight_bits: int
    weights: int
    stored_bits: float


def multiplications(node: fx.Node) -> int:
    """Multiply-accumulates of a convolution, linear layer or matmul: outputs times the terms of one output's sum."""
    if node.target in PRODUCTS:
        return prod(shape_of(node)) * int(shape_of(node.args[0])[-1])  # type: ignore[arg-type]
    if node.target is CONVOLUTION and node.args[6]:
        # Transposed: every input value meets every kernel tap of its group.
        return prod(shape_of(node.args[0])) * prod(shape_of(node.args[1])[1:])  # type: ignore[arg-type]
    return prod(shape_of(node)) * prod(shape_of(node.args[1])[1:])  # type: ignore[arg-type]


def products(program: Program) -> Iterator[Work]:
    """Every convolution, linear layer and matmul, in graph order."""
    for node in program.nodes:
        if node.target in WEIGHTED or node.target in PRODUCTS:
            value, weight = node.args[:2]
            weights = prod(shape_of(weight)) if node.target in WEIGHTED else 0  # type: ignore[arg-type]
            bits = _bits(weight)  # type: ignore[arg-type]
            yield Work(node, multiplications(node), _bits(value), bits, weights, _stored_bits(weight))  # type: ignore[arg-type]


def bit_operations(program: Program) -> int:
    """Bit operations of one run."""
    return sum(w.macs * w.value_bits * w.weight_bits for w in products(program))


def average_weight_bits(program: Program) -> float:
    """Bits of a weight, averaged over the weights of all convolutions and linear layers."""
    work = [w for w in products(program) if w.weights]
    return sum(w.weights * w.stored_bits for w in work) / max(sum(w.weights for w in work), 1)


def _stored_bits(weight: fx.Node) -> float:
    """Bits a weight takes in the file, on average."""
    if weight.target is gw.decode.default:
        return int(weight.args[1])  # type: ignore[arg-type]
    if weight.target is gw.from_bitmask.default:
        return 1 + _bits(weight) * prod(shape_of(weight.args[1])) / max(prod(shape_of(weight)), 1)  # type: ignore[arg-type]
    return _bits(weight)


def _bits(value: fx.Node) -> int:
    if value.target is gw.unpack.default:
        return int(value.args[1])  # type: ignore[arg-type]
    return torch.empty((), dtype=dtype_of(value)).element_size() * 8
