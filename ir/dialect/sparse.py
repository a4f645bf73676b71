"""Weights with zeros: a float layer whose weight is stored by rows, and any weight as a bit for each value and those not zero.

    weight (O, ...)      ->      gw.from_bitmask(mask u8 (O, bytes of a row), values (entries,), shape)

Bit j of byte i of a row says whether value 8 i + j of it is stored; `values` holds the stored ones, row after row. A pattern
such as 2:4 takes no less: which 2 of 4 are stored is written down in 4 bits either way.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F

from ._library import define


def _sparse_linear_shape(x, start, columns, values):
    return torch.empty((*x.shape[:-1], start.shape[0] - 1), dtype=x.dtype, device=x.device)


@define("sparse_linear(Tensor x, Tensor start, Tensor columns, Tensor values) -> Tensor", _sparse_linear_shape)
def sparse_linear(x, start, columns, values):
    """x @ W^T in float32, x (..., K). Row n of W (N, K) holds values[i] at columns[i] for i in start[n] .. start[n + 1] - 1.

    start s32 (N + 1,), columns s16 or s32, values float16 or float32. The order of the sum is free, as in every float layer.
    """
    return F.linear(x, dense(start, columns, values, x.shape[-1]))


def dense(start: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """The float32 matrix (N, width) of compressed rows."""
    rows = torch.arange(len(start) - 1).repeat_interleave(torch.diff(start.to(torch.int64)))
    matrix = torch.zeros(len(start) - 1, width)
    matrix[rows, columns.to(torch.int64)] = values.to(torch.float32)
    return matrix


def compressed(matrix: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(start, columns, values) of the entries where `mask` holds; columns as narrow as the width allows."""
    start = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).to(torch.int32)
    narrow = torch.int16 if matrix.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    return start, mask.nonzero()[:, 1].to(narrow), matrix[mask].to(dtype)


def to_bitmask(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, values) of a weight (O, ...): its zeros are not stored."""
    rows = weight.reshape(weight.shape[0], -1)
    bits = F.pad((rows != 0).to(torch.uint8), (0, -rows.shape[1] % 8)).reshape(rows.shape[0], -1, 8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return (bits * powers).sum(2, dtype=torch.uint8), rows[rows != 0]


def _from_bitmask_shape(mask, values, shape):
    expected = (shape[0], -(-prod(shape[1:]) // 8))
    if mask.dtype is not torch.uint8 or tuple(mask.shape) != expected or values.dim() != 1:
        raise ValueError(
            f"{list(shape)} is stored as a mask uint8 {expected} and one axis of values, not as {mask.dtype} {tuple(mask.shape)} "
            f"and {values.dim()} axes"
        )
    return torch.empty(tuple(shape), dtype=values.dtype, device=mask.device)


@define("from_bitmask(Tensor mask, Tensor values, SymInt[] shape) -> Tensor", _from_bitmask_shape)
def from_bitmask(mask, values, shape):
    """`shape`, in the type of `values`: 0 where the mask has no bit, else the next of the values."""
    result = _from_bitmask_shape(mask, values, shape)
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    stored = bits.reshape(mask.shape[0], -1)[:, : prod(shape[1:])].reshape(tuple(shape)).bool()
    if int(stored.sum()) != values.shape[0]:
        raise ValueError(f"the mask of {list(shape)} has {int(stored.sum())} bits, but there are {values.shape[0]} values")
    return result.zero_().masked_scatter_(stored, values)
