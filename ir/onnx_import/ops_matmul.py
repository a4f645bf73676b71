"""Matrix products. A product with a constant matrix becomes `aten.linear`, as it is in a torch model."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .registry import Call, op


def _transpose_matrix(call: Call, known: list[torch.Tensor | None]) -> dict[int, torch.Tensor]:
    """W (K, N) -> (N, K), once, at import: linear layers hold their weight by output row."""
    weight = known[1]
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or call.attr("transB"):
        return {}
    call.attributes["prepared"] = "transposed"  # type: ignore[index]
    return {1: weight.t().contiguous()}


@op("MatMul", prepare=_transpose_matrix)
def matmul(call: Call, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`bias` is not in the standard: the reader puts the Add of a bias after a product with a constant matrix here."""
    return F.linear(a, b, bias) if call.attr("prepared") else _exact(torch.matmul, a, b)


def _exact(function, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch has no product of unsigned integers; s64 wraps to the same bits."""
    if a.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return function(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    return function(a, b)


@op("Gemm", prepare=_transpose_matrix)
def gemm(call: Call, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    alpha, beta = call.attr("alpha"), call.attr("beta")
    a = a.t() if call.attr("transA") else a
    rows = bool(call.attr("transB")) or bool(call.attr("prepared"))
    plain = a.is_floating_point() and alpha == 1
    if plain and beta == 1 and rows and (c is None or c.dim() == 1) and (c is None or c.shape[0] == b.shape[0]):
        return F.linear(a, b, c)
    y = F.linear(a, b) if rows and plain else _exact(torch.matmul, a, b.t() if rows else b)
    y = y if alpha == 1 else y * alpha
    if c is None:
        return y.to(a.dtype)
    return (y + (c if beta == 1 else c * beta)).to(a.dtype)


@op("MatMulInteger")
def matmul_integer(
    call: Call, a: torch.Tensor, b: torch.Tensor, a_zero: torch.Tensor | None = None, b_zero: torch.Tensor | None = None
) -> torch.Tensor:
    wide_a, wide_b = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        wide_a = wide_a - (a_zero.to(torch.int32).unsqueeze(-1) if a_zero.dim() == 1 else a_zero.to(torch.int32))
    if b_zero is not None:
        wide_b = wide_b - b_zero.to(torch.int32)
    return torch.matmul(wide_a, wide_b)
