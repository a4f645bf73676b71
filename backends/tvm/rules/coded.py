"""Weights of float layers that stand in the library as packed codes of a table (`gw::decode`).

A linear layer of few rows decodes in its inner loop. Before any other layer a kernel of its own decodes the weight into the
program's arena, in the order that the float kernel reads: the file is smaller, and the memory of a run holds one decoded layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import fx

from ....ir.dialect import gw
from ....ir.dialect.codebook import unpack
from ....ir.program import shape_of
from ..kernels import coded_f32
from ..kernels.coded_f32 import Coded
from ..lower import Lowering
from ..values import Expr, arguments


@dataclass(frozen=True)
class CodedWeight:
    """The constants of a `gw::decode` node, numpy. codes: u8 (rows, count)."""

    node: fx.Node
    codes: np.ndarray
    bits: int
    table: np.ndarray
    scale: np.ndarray
    group: int
    zero: np.ndarray | None

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.node)

    def coded(self, level: str, taps: int = 1) -> Coded:
        rows, count = self.codes.shape
        rule = coded_f32.rule_of(self.table, level)
        return Coded(rows, count, self.bits, self.group, len(self.table), rule, self.zero is not None, taps)

    def buffers(self, coded: Coded) -> list[np.ndarray]:
        """As `Coded.arguments` names them."""
        zero = [] if self.zero is None else [coded.pack_groups(self.zero)]
        table = [] if coded.rule is not None else [coded.pack_table(self.table)]
        return [coded.pack_codes(self.codes), coded.pack_groups(self.scale), *zero, *table]

    def panels(self, lowering: Lowering, taps: int = 1) -> Expr:
        """The decoded weight as the float kernels read it, [panels, count, LANES]; made right before its layer."""
        coded = self.coded(lowering.float_level, taps)
        spec = coded, lowering.float_level
        return lowering.kernel(coded_f32.decode, *spec, inputs=self.buffers(coded), nodes=(self.node,), label="decode_f32")


def coded_weight(lowering: Lowering, node: Any) -> CodedWeight | None:
    """The weight behind a `gw::decode` of parameters; None for any other node."""
    if not isinstance(node, fx.Node) or node.target is not gw.decode.default:
        return None
    packed_node, bits, shape, table_node, scale_node, group, *zeros = arguments(node)
    zero_node = zeros[0] if zeros else None
    packed, table, scale = (lowering.program.parameter(n) for n in (packed_node, table_node, scale_node))
    zero = lowering.program.parameter(zero_node)
    if packed is None or table is None or scale is None or (zero is None) != (zero_node is None):
        return None
    codes = unpack(packed.detach().cpu(), bits, prod(shape[1:])).numpy()
    constants = table.detach().cpu().numpy(), scale.detach().cpu().numpy(), group
    return CodedWeight(node, codes, bits, *constants, None if zero is None else zero.detach().cpu().numpy())
