"""Float layers whose weight is mostly zero, stored by rows."""

from __future__ import annotations

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
