"""A small causal language model (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 1024
CONTEXT = 256

_WIDTH = 256
_DEPTH = 6
_HEADS = 4
_MLP_WIDTH = 4 * _WIDTH


class CausalAttention(nn.Module):
    """Multi-head self-attention in which no token sees a later one; input and output `(N, T, 256)`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.proj = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, _HEADS, width // _HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Pre-norm transformer block; input and output `(N, T, 256)`. Dropout acts on what joins the residual stream."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH)
        self.attention = CausalAttention()
        self.norm2 = nn.LayerNorm(_WIDTH)
        self.fc1 = nn.Linear(_WIDTH, _MLP_WIDTH)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(_MLP_WIDTH, _WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.fc2(self.gelu(self.fc1(self.norm2(x)))))


class GPTSmall(nn.Module):
    """Six pre-norm blocks of width 256 with four heads, learned positions, and a head of its own (not the embedding's weights).

    Input `(N, T)` int64 token ids below 1024, T at most 256; output `(N, T, 1024)` logits of each next token.
    """

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, _WIDTH))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(_DEPTH)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.position, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # Projections into the residual stream start smaller, so that its variance does not grow with depth.
                residual = name.endswith(("proj", "fc2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * _DEPTH) ** 0.5 if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.embedding(input_ids) + self.position[: input_ids.shape[1]])
        return self.head(self.norm(self.blocks(x)))
