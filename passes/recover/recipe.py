"""How to fine-tune: the numbers that decide the result, shared by the pass `distill` and by `optimize(finetune=...)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...ir.errors import OptionError

LossName = Literal["auto", "kl", "squared"]


@dataclass(frozen=True)
class Recipe:
    """A short training run: so many passes over the samples, at a rate that rises over 5% of the steps and falls as a cosine.

    Attributes:
        epochs: passes over the samples.
        learning_rate: the highest. Adam's steps are of this size whatever the gradient's; SGD wants about 30 times as much.
        batch_size: samples a step.
        optimizer: `adam` without weight decay, or `sgd` with momentum 0.9; the gradient's norm is cut at 1.
        loss: `kl`, `squared`, or `auto`, which asks whether the outputs are class scores (see `distill`).
        temperature: divides the class scores of both networks; above 1 the small probabilities count more.
        mixup: share of the samples of a step that are blended with another one, by a weight drawn from 0 to 1, so that the
            teacher is asked about more than it was trained on (Beyer et al. 2022, arXiv:2106.05237). Float inputs only.
    """

    epochs: int = 1
    learning_rate: float = 1e-3
    batch_size: int = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    loss: LossName = "auto"
    temperature: float = 1.0
    mixup: float = 0.0

    def check(self, who: str) -> None:
        """Raises OptionError where a number is out of range."""
        for option in ("epochs", "batch_size"):
            if getattr(self, option) < 1:
                raise OptionError(f"option '{option}' of {who} must be at least 1, not {getattr(self, option)}")
        for option in ("learning_rate", "temperature"):
            if not 0 < getattr(self, option) < float("inf"):
                raise OptionError(f"option '{option}' of {who} must be above 0 and finite, not {getattr(self, option)}")
        if not 0 <= self.mixup <= 1:
            raise OptionError(f"option 'mixup' of {who} must lie in 0 to 1, not {self.mixup}")
