"""Where the value of a graph node lives in the compiled program, and under which physical layout."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import tvm
from torch import fx

from ...ir.program import dtype_of, shape_of
from .chains import Deferred
from .kernels.quantize_image import Quantize
from .strided import Strided

#: torch dtype -> TVM dtype of every type a lowered program may hold.
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}

#: Types that float kernels compute on -> how the names of those kernels end.
SUFFIXES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

#: A Relax expression. TVM's stubs type every field of it as its base class, which knows neither shape nor dtype.
Expr = Any

#: What `relax.const` makes.
CONSTANT: Any = tvm.ir.expr.GenericConst


@dataclass(frozen=True)
class Frame:
    """A 4-D pad that nothing has carried out: `before` and `after` (rows, columns) of `fill` around the value of `source`."""

    source: fx.Node
    before: tuple[int, int]
    after: tuple[int, int]
    fill: float


@dataclass(frozen=True)
class FloatImage:
    """`gw::quantize` of a few planes [N, C, H, W] that nothing has carried out."""

    source: Any
    quantize: Quantize


@dataclass(frozen=True)
class Normalization:
    """A layer normalization that nothing has carried out: ((source - mean) * inverse) * weight + bias.

    source: the node normalized over its last axis. statistics: (mean, inverse) of each row, a variable [rows, 2].
    """

    source: fx.Node
    statistics: Any
    weight: fx.Node
    bias: fx.Node


@dataclass
class Value:
    """A node's value. At least one form exists: `dense` row-major, `channels` as [N, spatial..., Cp], `moved`, `pending`,
    `normalization` or `expression`.

    shape: the logical shape; channels holds axis 1 of it last, padded to LANES. A view changes `shape` and moves nothing:
    the Relax variable keeps the shape its kernel gave it, and is reshaped (free) where a kernel asks for another.
    """

    shape: tuple[int, ...]
    dtype: str
    dense: Any | None = None
    channels: Any | None = None
    #: The dense form as an index map over another variable, not copied yet: (variable, map).
    moved: tuple[Any, Strided] | None = None
    #: What makes the channels form when a reader asks for it; a convolution may do it itself and never ask.
    pending: Frame | FloatImage | None = None
    #: What makes the dense form when a reader asks for it; an addition may normalize as it reads and never ask.
    normalization: Normalization | None = None
    #: What makes the dense form when a reader asks for it; an element-wise reader never asks.
    expression: Deferred | None = None

    @property
    def spatial(self) -> tuple[int, int]:
        """(H, W) of a Channels value of rank 3 or more; further axes are flattened into W."""
        inner = self.shape[2:]
        return (inner[0], inner[1]) if len(inner) == 2 else (1, prod(inner))


def arguments(node: fx.Node) -> Any:
    """The positional arguments of a call node. Their types follow from the op's schema, which no checker reads."""
    return node.args


def item_size(dtype: str) -> int:
    """Bytes of one element."""
    return 1 if dtype == "bool" else int("".join(c for c in dtype if c.isdigit())) // 8


def of_node(node: fx.Node, **places: Any) -> Value:
    return Value(shape_of(node), DTYPES[dtype_of(node)], **places)


def shape_of_var(var: Expr) -> tuple[int, ...]:
    return tuple(int(d) for d in var.ty.shape)


def dtype_of_var(var: Expr) -> str:
    return str(var.ty.dtype)
