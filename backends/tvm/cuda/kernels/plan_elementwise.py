"""Launches of the kernels of `triton_elementwise`, from plain numbers: no TVM here."""

from __future__ import annotations

from math import ceil, prod

from .plans import Constant, Plan

#: Codes of a program.
BLOCK = 4096


def lookup(shape: tuple[int, ...], x_dtype: str, table_dtype: str) -> Plan:
    """X u8 / s8 [shape], table [256], which starts at the lowest code -> Y [shape]."""
    buffers = (("X", shape, x_dtype), ("table", (256,), table_dtype), ("Y", shape, table_dtype))
    constants: dict[str, Constant] = {"SIZE": prod(shape), "FIRST": -128 if x_dtype == "int8" else 0, "BLOCK": BLOCK}
    return Plan("triton_elementwise:lookup", constants, (ceil(prod(shape) / BLOCK), 1, 1), buffers, 4, 1)
