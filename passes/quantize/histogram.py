"""A histogram of a stream of tensors in bounded memory."""

from __future__ import annotations

import math

import torch

from ...ir.errors import CalibrationError

BINS = 2048
#: torch.histc counts in float32, which is exact up to 2^24 a bin.
COUNTABLE = 1 << 24


class Histogram:
    """Counts of 2048 equal bins over a range that grows by doubling, so that old counts merge pairwise and stay exact.

    Exact zeros (what relu makes) are counted apart: zero has its own code in every encoding. The true smallest and largest
    values are kept beside the bins.
    """

    def __init__(self, what: str = "a value") -> None:
        self.what = what
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.low = self.high = 0.0  # range of the bins; low == high until a value other than 0 was seen
        self.zeros = 0
        self.min, self.max = 0.0, 0.0
        self.total = 0

    def observe(self, value: torch.Tensor) -> None:
        """Adds a float tensor of any shape. Raises CalibrationError where it holds a NaN or an infinity."""
        flat = value.detach().flatten().to(torch.float32)
        if not flat.numel():
            return
        low, high = (float(v) for v in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(f"{self.what} reaches {low} to {high} on the calibration samples; check inputs and weights")
        self.min, self.max = (min(self.min, low), max(self.max, high)) if self.total else (low, high)
        self.total += flat.numel()
        zeros = flat.numel() - int(flat.count_nonzero())
        self.zeros += zeros
        if zeros < flat.numel():
            self._grow(low, high)
            for part in flat.split(COUNTABLE):
                self.counts += torch.histc(part, BINS, self.low, self.high)
            if zeros and self.low <= 0 <= self.high:
                self.counts -= zeros * torch.histc(torch.zeros(1), BINS, self.low, self.high).to(torch.float64)

    def _grow(self, low: float, high: float) -> None:
        if self.low == self.high:
            margin = 1e-6 * max(abs(low), abs(high))  # keeps the range open where every value is the same
            self.low, self.high = low - margin, high + margin
        while high > self.high:
            self.counts = torch.cat([self._merged(), torch.zeros(BINS // 2, dtype=torch.float64)])
            self.high = self.low + 2 * (self.high - self.low)
        while low < self.low:
            self.counts = torch.cat([torch.zeros(BINS // 2, dtype=torch.float64), self._merged()])
            self.low = self.high - 2 * (self.high - self.low)

    def _merged(self) -> torch.Tensor:
        return self.counts.reshape(-1, 2).sum(1)

    @property
    def width(self) -> float:
        return (self.high - self.low) / BINS

    @property
    def centers(self) -> torch.Tensor:
        """Bin centers, float64 (BINS,)."""
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width

    def quantile(self, fraction: float) -> float:
        """The value under which `fraction` of everything seen lies, linear inside a bin; within [min, max]."""
        below = torch.where(self.centers < 0, self.counts, 0.0)
        wanted = fraction * self.total
        if wanted <= float(below.sum()):
            return self._position(wanted)
        if wanted <= float(below.sum()) + self.zeros:
            return 0.0
        return self._position(wanted - self.zeros)

    def _position(self, wanted: float) -> float:
        running = torch.cumsum(self.counts, 0)
        index = min(int(torch.searchsorted(running, torch.tensor(wanted, dtype=torch.float64))), BINS - 1)
        before = float(running[index - 1]) if index else 0.0
        count = float(self.counts[index])
        inside = (wanted - before) / count if count else 0.0
        return min(max(self.low + (index + inside) * self.width, self.min), self.max)
