"""Attention and rotary position embedding (opset 23 on)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .registry import Call, op, torch_type


def _heads(x: torch.Tensor, heads: int | None) -> torch.Tensor:
    """(B, S, H * D) -> (B, H, S, D); four dimensions stay."""
    return x if x.dim() == 4 or not heads else x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, -math.inf)


def _bias(
    call: Call,
    shape: tuple[int, int],
    past: int | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The additive mask: the caller's, plus causal order, a window, and keys beyond each sequence's length."""
    queries, keys = shape
    parts = []
    if mask is not None:
        bias = _additive(mask, dtype) if mask.dtype == torch.bool else mask
        parts.append(F.pad(bias, (0, keys - bias.shape[-1]), value=-math.inf) if bias.shape[-1] < keys else bias)
    left, right = (call.attr(f"{side}_window_size", -1) for side in ("left", "right"))
    if call.attr("is_causal", 0) or left >= 0 or right >= 0:
        # Distance from each query to each key; with a cache the first query stands behind the cached keys.
        distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
        if past is None and lengths is not None:
            distance = distance - (lengths.to(torch.int64) - queries).reshape(-1, 1, 1, 1)
        else:
            distance = distance - (past or 0)
        if call.attr("is_causal", 0):
            parts.append(_additive(distance <= 0, dtype))
        if left >= 0:
            parts.append(_additive(distance >= -left, dtype))
        if right >= 0:
            parts.append(_additive(distance <= right, dtype))
    if lengths is not None:
        inside = torch.arange(keys)[None, :] < lengths.to(torch.int64)[:, None]
        parts.append(_additive(inside, dtype)[:, None, None, :])
    return sum(parts[1:], parts[0]) if parts else None


@op("Attention")
def attention(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Scaled dot product attention with grouped key heads, a cache, soft capping and a view of the scores."""
    flat = q.dim() == 3
    q, k, v = _heads(q, call.attr("q_num_heads")), _heads(k, call.attr("kv_num_heads")), _heads(v, call.attr("kv_num_heads"))
    past = None
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present_key, present_value = k, v
    if q.shape[1] != k.shape[1]:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scale = call.attr("scale") or 1.0 / math.sqrt(q.shape[-1])
    bias = _bias(call, (q.shape[2], k.shape[2]), past, mask, lengths, q.dtype)
    scores_wanted = len(call.wanted) > 3 and call.wanted[3]
    if scores_wanted or call.attr("softcap", 0.0) or call.attr("softmax_precision"):
        y, scores = _spelled_out(call, q, k, v, bias, scale)
    else:
        y, scores = F.scaled_dot_product_attention(q, k, v, bias, scale=scale), None
    if flat:
        y = y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)
    return y, present_key, present_value, scores


def _spelled_out(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    cap, mode = call.attr("softcap", 0.0), call.attr("qk_matmul_output_mode", 0)
    stages = [torch.matmul(q, k.transpose(-1, -2)) * scale]
    capped = torch.tanh(stages[0] / cap) * cap if cap else stages[0]
    masked = capped if bias is None else capped + bias
    precision = call.attr("softmax_precision")
    wide = masked.to(torch_type(precision, call.name)) if precision else masked
    weights = torch.softmax(wide, -1).to(q.dtype)
    if bias is not None:  # a query that may see no key gets zeros
        weights = weights.masked_fill((masked == -math.inf).all(-1, keepdim=True), 0.0)
    return torch.matmul(weights, v), (stages[0], capped, masked, weights)[mode]


@op("RotaryEmbedding")
def rotary_embedding(
    call: Call, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotates pairs of features by their position's angle (RoFormer, arXiv:2104.09864, equation 34)."""
    heads = call.attr("num_heads", 0)
    inner = x.reshape(x.shape[0], x.shape[1], heads, -1) if x.dim() == 3 else x.transpose(1, 2)  # (B, S, H, D)
    width = call.attr("rotary_embedding_dim", 0) or inner.shape[-1]
    turned, kept = inner[..., :width], inner[..., width:]
    if positions is not None:
        cosines, sines = F.embedding(positions, cosines), F.embedding(positions, sines)
    cosines, sines = cosines[..., : width // 2].unsqueeze(2), sines[..., : width // 2].unsqueeze(2)
    if call.attr("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        rotated = torch.stack([a * cosines - b * sines, a * sines + b * cosines], -1).flatten(-2)
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
        rotated = torch.cat([a * cosines - b * sines, a * sines + b * cosines], -1)
    y: Any = torch.cat([rotated, kept], -1)
    return y.reshape(x.shape) if x.dim() == 3 else y.transpose(1, 2)
