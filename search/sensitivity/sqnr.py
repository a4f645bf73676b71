"""sqnr: the noise of weight rounding beside the signal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Scorer, Scores, Task, register
from .statistics import exact


@register
@dataclass(frozen=True)
class Sqnr(Scorer):
    """loss = ||Q(w) - w||^2 / ||w||^2: the reciprocal of the signal-to-quantization-noise ratio of a layer's weight.

    Noise-to-signal ratios of independent layers add up where layers keep the ratio of their input (Lin et al. 2016,
    arXiv:1511.06393, equation 5), so the reciprocal is the additive form; the ratio in dB is -10 log10 of it. Needs no data.
    """

    name: ClassVar[str] = "sqnr"
    needs_samples: ClassVar[bool] = False

    def score(self, task: Task) -> Scores:
        start = time.perf_counter()
        return exact(self.name, task, noise_to_signal(task), time.perf_counter() - start)


def noise_to_signal(task: Task) -> np.ndarray:
    """||Q(w) - w||^2 / ||w||^2, (layers, choices); 0 where a weight is all zeros."""
    table = np.zeros((len(task.layers), len(task.choices)))
    for i, layer in enumerate(task.layers):
        signal = float(layer.weight.double().square().sum())
        for j, choice in enumerate(task.choices):
            noise = float((layer.rounded(choice) - layer.weight).double().square().sum())
            table[i, j] = noise / signal if signal else 0.0
        task.progress(i + 1, len(task.layers), "weight noise")
    return table
