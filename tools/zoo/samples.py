"""What a reference model's data looks like, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from ...ir.errors import DataError

#: Samples per batch of every data set here; the last batch of a request may be smaller.
BATCH = 32

Inputs = tuple[torch.Tensor, ...]


class Samples(Protocol):
    """Calibration and evaluation samples that share no image, photograph or document.

    All methods give the same samples in the same order in every process, and a smaller `count` gives a prefix.
    """

    def calibration(self, count: int) -> list[Inputs]:
        """`count` unlabelled samples in batches of at most `BATCH`."""
        ...

    def training(self, count: int | None) -> list[Inputs] | None:
        """`count` unlabelled samples (None: all) that the model was trained on, for fine-tuning; None where they are not at hand.

        None of them occurs in `calibration` or `evaluation`.
        """
        ...

    def calibration_labels(self, count: int) -> torch.Tensor | None:
        """The labels of `calibration(count)`, `(count,)` classes or `(count, T)` following tokens, int64; None without labels."""
        ...

    def evaluation(self, count: int | None) -> Iterable[tuple[Inputs, torch.Tensor | None]]:
        """`count` samples (None: all) in batches of at most `BATCH`, each with its labels where there are any: classes `(N,)`
        int64, or for a language model the tokens that follow, `(N, T)` int64.
        """
        ...


def checked_count(count: int | None, available: int, what: str) -> int:
    """`count`, or everything for None.

    Raises:
        DataError: not between 1 and `available`.
    """
    if count is None:
        return available
    if not 1 <= count <= available:
        raise DataError(f"{count} {what} requested; ask for 1 to {available}")
    return count
