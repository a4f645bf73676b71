"""Fewer tokens in the middle of a transformer: which of them go together, which stay, and their sum.

A plan is a tensor of places, s32 (N, T): token t of T becomes part of token place[n, t] afterwards, or of none where that is -1.
Counts are part of the op, so every shape stays known. Scores have a fixed order of operations (see `exact`): a choice between two
tokens must not hang on the last bit of a backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._library import LIBRARY
from .exact import lane_sum, square_root

#: Smallest squared length of a key; a zero key is then as far from all others as can be.
LEAST_SQUARE = 1e-30


def _define(schema: str) -> Callable[[Callable], Callable]:
    """Registers a reference that is made of ops torch can differentiate and batch."""

    def register(reference: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(schema.split("(", 1)[0], reference, "CompositeImplicitAutograd")
        return reference

    return register


def mergeable(tokens: int, protected: int) -> int:
    """The most tokens that `match_tokens` can merge: those at even places behind the protected ones, if any odd one is left."""
    return (tokens + 1) // 2 - (protected + 1) // 2 if tokens // 2 > protected // 2 else 0


def _ranks(score: torch.Tensor) -> torch.Tensor:
    """How many scores of a row are larger, or equal and earlier; (N, T)."""
    index = torch.arange(score.shape[-1], device=score.device)
    larger = score[:, None, :] > score[:, :, None]
    earlier = (score[:, None, :] == score[:, :, None]) & (index[None, :] < index[:, None])
    return (larger | earlier).sum(-1)


@_define("match_tokens(Tensor keys, int merged, int protected) -> Tensor")
def match_tokens(keys, merged: int, protected: int):
    """Places (N, T) by bipartite soft matching (Bolya et al. 2023, arXiv:2210.09461, section 3). keys float32 (N, H, T, D).

    A token's metric is its key summed over heads, scaled to length 1. Each token at an even place finds the most similar one at
    an odd place (the first of several); the `merged` most similar pairs become one token, at the odd one's place. All tokens keep
    their order. The first `protected` tokens take no part.
    """
    metric = keys[:, 0]
    for head in range(1, keys.shape[1]):
        metric = metric + keys[:, head]
    unit = metric * torch.reciprocal(square_root(torch.clamp(lane_sum(metric * metric), min=LEAST_SQUARE)))
    even, odd = unit[:, 0::2], unit[:, 1::2]
    score = lane_sum(even[:, :, None, :] * odd[:, None, :, :])[..., 0]
    rows, columns = (torch.arange(n, device=keys.device) for n in score.shape[1:])
    hidden = (2 * rows[:, None] < protected) | (2 * columns[None, :] + 1 < protected)
    score = torch.where(hidden, float("-inf"), score)
    merges = _ranks(score.amax(-1)) < merged
    token = torch.arange(keys.shape[2], device=keys.device)
    gone = (token % 2 == 0) & merges[:, token // 2]
    position = (~gone).to(torch.int64).cumsum(-1) - 1
    partner = 2 * score.argmax(-1)[:, token // 2] + 1
    return torch.where(gone, position.gather(1, partner), position).to(torch.int32)


@_define("keep_tokens(Tensor score, int kept, int protected) -> Tensor")
def keep_tokens(score, kept: int, protected: int):
    """Places (N, T) of the `kept` tokens of the largest scores, float32 (N, T), earlier ones first among equals; -1 for the
    others. The first `protected` tokens stay in any case, and all keep their order."""
    token = torch.arange(score.shape[1], device=score.device)
    stays = _ranks(torch.where(token < protected, float("inf"), score)) < kept
    position = stays.to(torch.int64).cumsum(-1) - 1
    return torch.where(stays, position, -1).to(torch.int32)


@_define("sum_tokens(Tensor x, Tensor place, int tokens) -> Tensor")
def sum_tokens(x, place, tokens: int):
    """(N, `tokens`, W): the sum of the tokens of x float32 (N, T, W) that have each place, from 0 on in the order of t."""
    out = x.new_zeros((x.shape[0], tokens + 1, x.shape[2]))
    target = torch.where(place < 0, tokens, place).to(torch.int64)
    for token in range(x.shape[1]):
        index = target[:, token, None, None].expand(-1, 1, x.shape[2])
        out = out.scatter_add(1, index, x[:, token : token + 1])
    return out[:, :tokens]
