"""Lowering rules, one module an op family. Importing this package fills `lower.RULES`."""

from __future__ import annotations

from . import attention_float, data, elementwise, exact, floating, fp8, integer, pooling, pooling_float, tokens
from .generic import fallback

__all__ = [
    "attention_float",
    "data",
    "elementwise",
    "exact",
    "fallback",
    "floating",
    "fp8",
    "integer",
    "pooling",
    "pooling_float",
    "tokens",
]
