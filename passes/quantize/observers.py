"""Observers: from what was seen on calibration data to the range an encoding covers.

`ACTIVATION_OBSERVERS` choose (low, high) of a tensor from its histogram; `WEIGHT_OBSERVERS` choose the largest magnitude of every
output channel. Both are registries by name; an unknown name is an error with the nearest known one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...ir.errors import UnknownNameError
from .encoding import code_range
from .histogram import BINS, Histogram


@dataclass(frozen=True)
class Grid:
    """What the codes of an activation will be: bits, symmetric s8 or asymmetric u8, and the share that `percentile` keeps."""

    bits: int = 8
    signed: bool = False
    percentile: float = 99.99


ActivationObserver = Callable[[Histogram, Grid], tuple[float, float]]
WeightObserver = Callable[[torch.Tensor, int], torch.Tensor]


def min_max(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """Everything seen: nothing saturates on the calibration data (Krishnamoorthi 2018, arXiv:1806.08342, section 3.1)."""
    return histogram.min, histogram.max


def percentile(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The central `grid.percentile` percent (Wu et al. 2020, arXiv:2004.09602, section 4.1, two-sided)."""
    tail = (1 - grid.percentile / 100) / (2 if histogram.min < 0 else 1)
    low = histogram.quantile(tail) if histogram.min < 0 else histogram.min
    return low, histogram.quantile(1 - tail)


#: Clipping candidates of the searches below, as shares of the full range.
SHRINK = torch.linspace(1.0, 0.1, 91, dtype=torch.float64)
#: Weights have light tails; clipping them by more than half never pays.
WEIGHT_SHRINK = torch.linspace(1.0, 0.5, 51, dtype=torch.float64)


def mse(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The range with the least mean squared error of quantize-dequantize over the histogram (Sung et al. 2015,
    arXiv:1511.06488; Banner et al. 2019, arXiv:1810.05723). Both ends shrink together, then each on its own."""
    low, high = min(histogram.min, 0.0), max(histogram.max, 0.0)
    if low == high:
        return low, high
    if grid.signed:
        top = max(-low, high)
        best = float((top * SHRINK)[_squared_errors(histogram, grid, -top * SHRINK, top * SHRINK).argmin()])
        return -best, best
    best = int(_squared_errors(histogram, grid, low * SHRINK, high * SHRINK).argmin())
    low, high = float(low * SHRINK[best]), float(high * SHRINK[best])
    for _ in range(2):
        lows = low * SHRINK
        low = float(lows[_squared_errors(histogram, grid, lows, torch.full_like(lows, high)).argmin()])
        highs = max(histogram.max, 0.0) * SHRINK
        high = float(highs[_squared_errors(histogram, grid, torch.full_like(highs, low), highs).argmin()])
    return low, high


def _squared_errors(histogram: Histogram, grid: Grid, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Total squared error for K candidate ranges, (K,). Each bin counts as its center; exact zeros have no error."""
    qmin, qmax = code_range(grid.bits, grid.signed)
    scale = ((high - low) / (qmax - qmin)).clamp_min(1e-30)[:, None]
    zero = torch.zeros_like(scale) if grid.signed else torch.round(qmin - low[:, None] / scale).clamp(qmin, qmax)
    used = histogram.counts > 0
    x = histogram.centers[used][None]
    codes = torch.clamp(torch.round(x / scale) + zero, qmin, qmax)
    return (((codes - zero) * scale - x).square() * histogram.counts[used]).sum(1)


#: The KL search tries a threshold every this many bins (the original tries every bin; the curve is flat at this distance).
KL_STRIDE = 8
#: Average count a bin needs: fewer, and the divergence measures sampling noise, which merging bins into levels smooths away, so
#: that the search would rather clip than smooth. Small tensors get wider bins, down to two a level.
KL_COUNT = 64


def kl(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The threshold T whose clipped, quantized distribution is closest in relative entropy to what was seen (Migacz, "8-bit
    inference with TensorRT", GTC 2017). Works on magnitudes: 2^bits levels where nothing is negative, half of them otherwise;
    the range is [-T, T] cut to what was seen. Suits smooth, long-tailed values; where a value sits in a few sharp peaks (a
    constant image background), the entropy prefers resolving the peaks to covering the range: compare with `mse`."""
    largest = max(abs(histogram.min), abs(histogram.max))
    if largest == 0:
        return 0.0, 0.0
    one_sided = histogram.min >= 0 and not grid.signed
    levels = (1 << grid.bits) >> (0 if one_sided else 1)
    count = BINS
    while count > 2 * levels and float(histogram.counts.sum()) < KL_COUNT * count:
        count //= 2
    bins = (histogram.centers.abs() / largest * count).floor().clamp(0, count - 1).to(torch.int64)
    magnitudes = torch.zeros(count, dtype=torch.float64).index_add(0, bins, histogram.counts)
    edges = range(levels, count + 1, KL_STRIDE)
    divergences = [_divergence(magnitudes, edge, levels) for edge in edges]
    best = edges[divergences.index(min(divergences))]
    threshold = largest * best / count
    return max(histogram.min, -threshold), min(histogram.max, threshold)


def _divergence(magnitudes: torch.Tensor, edge: int, levels: int) -> float:
    """KL(P || Q): P is the first `edge` bins with everything beyond in the last one, Q the same bins on `levels` levels."""
    kept = magnitudes[:edge]
    p = kept.clone()
    p[-1] += magnitudes[edge:].sum()
    level = torch.arange(edge) * levels // edge
    filled = (kept > 0).to(torch.float64)
    mass = torch.zeros(levels, dtype=torch.float64).index_add(0, level, kept)
    share = torch.zeros(levels, dtype=torch.float64).index_add(0, level, filled)
    q = (mass / share.clamp_min(1))[level] * filled
    total_p, total_q = float(p.sum()), float(q.sum())
    if total_p == 0 or total_q == 0:
        return float("inf")
    p, q = p / total_p, q / total_q
    # Where Q is empty but P is not (only the last bin), a tiny mass keeps the divergence finite, as in TensorRT's slides.
    q = torch.where((p > 0) & (q == 0), 1e-10, q)
    at = p > 0
    return float((p[at] * (p[at] / q[at]).log()).sum())


def weight_min_max(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Largest magnitude of each output channel, (C,). weight (C, ...)."""
    return weight.reshape(weight.shape[0], -1).abs().amax(1)


def weight_mse(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The clipping magnitude of each output channel with the least squared error, (C,). weight (C, ...)."""
    rows = weight.reshape(weight.shape[0], -1).to(torch.float64)
    largest = rows.abs().amax(1)
    _, qmax = code_range(bits, signed=True)
    best, best_error = largest.clone(), torch.full_like(largest, float("inf"))
    for share in WEIGHT_SHRINK:
        scale = (largest * share / qmax).clamp_min(1e-30)[:, None]
        error = (torch.clamp(torch.round(rows / scale), -qmax, qmax) * scale - rows).square().sum(1)
        best = torch.where(error < best_error, largest * share, best)
        best_error = torch.minimum(error, best_error)
    return best.to(weight.dtype)


ACTIVATION_OBSERVERS: dict[str, ActivationObserver] = {"min-max": min_max, "percentile": percentile, "mse": mse, "kl": kl}
WEIGHT_OBSERVERS: dict[str, WeightObserver] = {"min-max": weight_min_max, "mse": weight_mse}


def activation_observer(name: str) -> ActivationObserver:
    if name not in ACTIVATION_OBSERVERS:
        raise UnknownNameError("activation observer", name, ACTIVATION_OBSERVERS)
    return ACTIVATION_OBSERVERS[name]


def weight_observer(name: str) -> WeightObserver:
    if name not in WEIGHT_OBSERVERS:
        raise UnknownNameError("weight observer", name, WEIGHT_OBSERVERS)
    return WEIGHT_OBSERVERS[name]
