"""Weights whose zeros are not stored (`gw::from_bitmask`): the library holds bits and values, a kernel before the layer decodes.

What is stored is the array that the layer's kernel reads, packed in its order, so every layer kernel takes such a weight; the
file is smaller, and the memory of a run holds one decoded layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.dialect import gw
from ..kernels import bitmask
from ..lower import Lowering
from ..values import Expr, arguments


def sparse_weight(lowering: Lowering, node: Any) -> np.ndarray | None:
    """The dense values of a `gw::from_bitmask` of parameters; None for any other node."""
    if not isinstance(node, fx.Node) or node.target is not gw.from_bitmask.default:
        return None
    mask_node, values_node, shape = arguments(node)
    mask, values = (lowering.program.parameter(n) for n in (mask_node, values_node))
    if mask is None or values is None:
        return None
    dense: torch.Tensor = gw.from_bitmask(mask.detach().cpu(), values.detach().cpu(), shape)
    return dense.numpy() if dense.dtype in (torch.int8, torch.float32) else None


def stored(lowering: Lowering, node: Any, packed: np.ndarray) -> np.ndarray | Expr:
    """`packed`, what a kernel reads of the weight `node`: as it is, or decoded where the node's zeros are not stored.

    On a GPU decoding would be one more launch before every layer: there the weights lie decoded in its memory.
    """
    if lowering.target.arch == "cuda" or sparse_weight(lowering, node) is None:
        return packed
    description, buffers = bitmask.pack(packed)
    kind = "int8" if packed.dtype == np.int8 else "f32"
    options = {"inputs": buffers, "nodes": (node,), "label": f"expand_{kind}"}
    return lowering.kernel(bitmask.expand, description, lowering.float_level, **options)
