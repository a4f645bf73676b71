"""What the float families share: from `FloatSpec` to the tail, the type and the precision of a plan."""

from __future__ import annotations

from ...kernels.attention_f32 import Attention
from ...kernels.float_base import FloatSpec
from .blocks import Block
from .plan_float import FloatTail

#: float32 is multiplied as float32.
PRECISION = "ieee"


def tail_of(spec: FloatSpec) -> FloatTail:
    activation = spec.activation
    return FloatTail(spec.residual, activation.function, activation.low, activation.high)


def block_of(spec: FloatSpec) -> Block | None:
    """A measured block: on a GPU it stands where a register tile does."""
    return spec.tile if isinstance(spec.tile, Block) else None


def dtype_of(spec: FloatSpec | Attention) -> str:
    """float32 for specifications that name no type."""
    return getattr(spec, "dtype", "float32")
