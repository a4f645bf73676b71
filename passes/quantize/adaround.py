"""AdaRound: up or down, learned by gradient descent on the layer's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import register
from .rounding import Chosen, Following, Rounding, Rows, Steps

#: Stretch of the rectified sigmoid (equation 23), so that it reaches 0 and 1.
LOW, HIGH = -0.1, 1.1
#: Exponent of the regularizer, first and last (section 3.2: high lets h move, low pushes it to 0 or 1).
BETA = (20.0, 2.0)
#: Share of the iterations before the regularizer begins.
WARM_UP = 0.2


@register
@dataclass(frozen=True)
class AdaRound(Rounding):
    """Rounds every weight up or down, whichever keeps the layer's output, after its activation, near the float one.

        fake_quantize(w, s, z, qmin, qmax, 0)      ->      fake_quantize(w, s, z, qmin, qmax, 0, codes)

    Nagel et al. 2020 (arXiv:2004.10568, equations 21 to 25): steps = clamp(floor(w / s) + h(V)) with the rectified sigmoid h, and
    V minimizes |f(W x) - f(W~ x^)|^2 + strength * sum(1 - |2 h(V) - 1|^beta), beta annealed; x^ are the inputs in the annotated
    program, x the float ones, f the activation that follows. Both terms are relative here, the first to the error of the codes
    that are there and the second to the number of weights, so that one strength suits every layer.

    Options:
        iterations: steps of Adam a layer.
        batch: output positions a step.
        rate: learning rate.
        strength: weight of the regularizer.
        samples: calibration samples used at most.
        rows: output positions of a layer used at most.

    Stats: as `gptq`.
    """

    name: ClassVar[str] = "adaround"
    above_zero: ClassVar = ("iterations", "batch", "rate", "strength")

    iterations: int = 500
    batch: int = 256
    rate: float = 0.1
    strength: float = 5.0
    samples: int = 256
    rows: int = 8192

    def choose(self, rows: Rows, steps: Steps, following: Following | None, generator: torch.Generator) -> Chosen:
        apply = following or (lambda value: value)
        floor, v = start(rows.weight, steps)
        v.requires_grad_()
        optimizer = torch.optim.Adam([v], lr=self.rate)
        with torch.no_grad():
            targets = apply(rows.targets)
            base = (apply(rows.outputs(rows.current * steps.scale)) - targets).square().mean()
        if float(base) == 0.0:
            return Chosen(rows.current)
        count = targets.shape[1]
        for iteration in range(self.iterations):
            begin = iteration * self.batch % count
            part = slice(begin, begin + self.batch)
            h = rectified_sigmoid(v)
            weight = steps.clamp(floor + h) * steps.scale
            outputs = apply(torch.baddbmm(rows.bias, rows.inputs[:, part], weight.transpose(1, 2)))
            loss = (outputs - targets[:, part]).square().mean() / base
            if (beta := annealed(iteration / self.iterations)) is not None:
                loss = loss + self.strength * (1 - (2 * h - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            chosen = steps.clamp(floor + (rectified_sigmoid(v) >= 0.5))
            error = (apply(rows.outputs(chosen * steps.scale)) - targets).square().mean()
        return Chosen(chosen if error < base else rows.current)


def start(weight: torch.Tensor, steps: Steps) -> tuple[torch.Tensor, torch.Tensor]:
    """floor(w / s) and the V with h(V) = w / s - floor(w / s)."""
    exact = weight / steps.scale
    floor = exact.floor()
    return floor, torch.special.logit((exact - floor - LOW) / (HIGH - LOW))


def rectified_sigmoid(v: torch.Tensor) -> torch.Tensor:
    return (torch.sigmoid(v) * (HIGH - LOW) + LOW).clamp(0, 1)


def annealed(done: float) -> float | None:
    """Beta at a share `done` of the iterations; None before the regularizer begins."""
    if done < WARM_UP:
        return None
    return BETA[1] + (BETA[0] - BETA[1]) * (1 - (done - WARM_UP) / (1 - WARM_UP))
