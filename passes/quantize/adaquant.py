"""AdaQuant: weights, scale and bias of a layer learned together on its outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import register
from .rounding import Chosen, Following, Rounding, Rows, Steps

#: Iterations between two looks at the error of all rows: rounding through the estimator jumps, and the best is kept.
CHECK = 25


@register
@dataclass(frozen=True)
class AdaQuant(Rounding):
    """Moves the weights of a layer, their scales and the bias until its rounded output is nearest to the float one.

        %w = fake_quantize(w, s, z, qmin, qmax, 0)      ->      %w = fake_quantize(w, s', z, qmin, qmax, 0, codes)
        %y = convolution(%x', %w, b)                            %y = convolution(%x', %w, b')

    Hubara et al. 2020 (arXiv:2006.10518, equation 2): min |f(W x) - f(Q(W + V, s') x^ + b')|^2 over V, s' and b', by Adam through
    the straight-through estimator; the scale's gradient is that of LSQ (Esser et al. 2020, arXiv:1902.08153). x^ are the
    annotated inputs, whose own scale stays (the paper moves it too: here other layers may read the same codes). A code may end
    several steps from the nearest one. V is in steps and b' in standard deviations of the output, so that one rate suits all.
    It starts from the codes that are there: after `gptq`, from GPTQ's.

    Scales move, so `align-scales` comes afterwards. The bias moves, and with it what bypassing fake quantization gives: passes
    that compare with the float model come before.

    Options:
        iterations: steps of Adam a layer; the rate falls to 0 along a cosine.
        batch: output positions a step.
        rate: learning rate.
        samples: calibration samples used at most.
        rows: output positions of a layer used at most.

    Stats: as `gptq`.
    """

    name: ClassVar[str] = "adaquant"
    above_zero: ClassVar = ("iterations", "batch", "rate")

    iterations: int = 300
    batch: int = 256
    rate: float = 0.03
    samples: int = 256
    rows: int = 8192

    def choose(self, rows: Rows, steps: Steps, following: Following | None, generator: torch.Generator) -> Chosen:
        apply = following or (lambda value: value)
        spread = rows.targets.std(1, correction=0, keepdim=True).clamp_min(1e-12)
        # Codes that a pass before chose are where the weights start from.
        origin = torch.where(rows.current == steps.nearest(rows.weight), rows.weight / steps.scale, rows.current)
        moved, factor, offset = origin.clone(), torch.zeros_like(steps.scale), torch.zeros_like(rows.bias)
        learned = [t.requires_grad_() for t in (moved, factor, offset)]
        optimizer = torch.optim.Adam([{"params": [moved]}, {"params": [factor, offset], "lr": self.rate / 10}], lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        with torch.no_grad():
            targets = apply(rows.targets)

        def error(part: slice) -> torch.Tensor:
            wanted = steps.clamp(moved / factor.exp())
            weight = (wanted + (wanted.round() - wanted).detach()) * steps.scale * factor.exp()
            bias = rows.bias + offset * spread
            outputs = apply(torch.baddbmm(bias, rows.inputs[:, part], weight.transpose(1, 2)))
            return (outputs - targets[:, part]).square().mean()

        best, kept = math.inf, [t.detach().clone() for t in learned]
        for iteration in range(self.iterations + 1):
            if iteration % CHECK == 0 or iteration == self.iterations:
                with torch.no_grad():
                    whole = float(error(slice(None)))
                if whole < best:
                    best, kept = whole, [t.detach().clone() for t in learned]
            begin = iteration * self.batch % targets.shape[1]
            optimizer.zero_grad()
            error(slice(begin, begin + self.batch)).backward()
            optimizer.step()
            schedule.step()
        moved, factor, offset = kept
        chosen = steps.clamp(torch.round(moved / factor.exp()))
        return Chosen(chosen, steps.scale * factor.exp(), rows.bias + offset * spread)
