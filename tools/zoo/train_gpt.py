"""The training loop of the small GPT: token ids in, the moving average of the weights out. It needs PyTorch and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .gpt import CONTEXT, GPTSmall
from .optimization import WeightAverage, autocast, cosine_schedule, parameter_groups

EPOCHS = 31
STEPS = 100

_BATCH = 256
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.1
_DROPOUT = 0.1


def log_likelihood(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean log-likelihood per token in nats, in float32, of `windows` `(N, 257)`: each token given those before it."""
    model.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            for batch in windows.split(64)
        ]
    return -float(torch.stack(losses).double().sum()) / windows[:, 1:].numel()


def random_windows(tokens: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches `(256, 257)` that start anywhere in the stream `tokens` `(T,)`, as int64 on its device."""
    offsets = torch.arange(CONTEXT + 1, device=tokens.device)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (_BATCH, 1), device=tokens.device)
        yield tokens[starts + offsets].long()


def train_gpt(
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    keep: Callable[[nn.Module], None],
    epochs: int = EPOCHS,
    steps: int = STEPS,
    seed: int = 0,
    dropout: float = _DROPOUT,
) -> float:
    """Train on the stream `tokens` `(T,)`; `keep` gets the averaged model whenever it is the best on `held_out` so far.

    An epoch is `steps` batches of 256 random windows, after which the held-out windows `(N, 257)` are scored. Runs on the device
    of `tokens`, seeded, and repeats up to the order of a GPU's float sums. Returns the best held-out log-likelihood per token.
    """
    torch.manual_seed(seed)
    device = tokens.device
    model = GPTSmall(dropout).to(device)
    average = WeightAverage(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, _WEIGHT_DECAY), lr=_LEARNING_RATE, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    schedule = cosine_schedule(optimizer, epochs * steps)
    best, started = -math.inf, time.monotonic()
    for epoch in range(1, epochs + 1):
        model.train()
        loss = torch.zeros((), device=device)
        for batch in random_windows(tokens, steps):
            with autocast(device):
                logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            schedule.step()
            average.update()
        score = log_likelihood(average.model, held_out)
        if score > best:
            best = score
            keep(average.model)
        print(
            f"gpt-small epoch {epoch}/{epochs} loss {loss.item():.4f} held-out {-score:.4f} (perplexity {math.exp(-score):.3f}) "
            f"best {-best:.4f} {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return best
