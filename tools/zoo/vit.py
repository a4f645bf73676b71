"""A tiny vision transformer for 28x28 grey images (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_IMAGE = 28
_PATCH = 4
_WIDTH = 192
_DEPTH = 6
_HEADS = 3
_MLP_WIDTH = 4 * _WIDTH


class Attention(nn.Module):
    """Multi-head self-attention; input and output `(N, T, width)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class StochasticDepth(nn.Module):
    """Drops a residual branch of whole samples while training (Huang et al., 2016); the identity in eval mode."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = torch.empty((x.shape[0], 1, 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * mask / keep


class Block(nn.Module):
    """Pre-norm transformer block; input and output `(N, T, width)`."""

    def __init__(self, width: int, heads: int, mlp_width: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_width)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(mlp_width, width)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.fc2(self.gelu(self.fc1(self.norm2(x)))))


class ViTTiny(nn.Module):
    """Six blocks of width 192 with three heads over 49 patches of 4x4 pixels; mean pooling, no class token.

    Input `(N, 1, 28, 28)` float32, output `(N, 10)` logits.
    """

    def __init__(self, classes: int = 10, drop_path: float = 0.1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, _WIDTH, _PATCH, _PATCH)
        self.position = nn.Parameter(torch.zeros(1, (_IMAGE // _PATCH) ** 2, _WIDTH))
        rates = [drop_path * index / (_DEPTH - 1) for index in range(_DEPTH)]
        self.blocks = nn.Sequential(*(Block(_WIDTH, _HEADS, _MLP_WIDTH, rate) for rate in rates))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))
