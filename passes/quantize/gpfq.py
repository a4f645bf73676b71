"""GPFQ: rounding by following the path of the float layer's partial sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import register
from .rounding import Chosen, Following, Rounding, Rows, Steps


@register
@dataclass(frozen=True)
class Gpfq(Rounding):
    """Chooses codes column by column so that the running sum of the annotated layer stays next to that of the float one.

        fake_quantize(w, s, z, qmin, qmax, 0)      ->      fake_quantize(w, s, z, qmin, qmax, 0, codes)

    Lybrand and Saab 2021 (arXiv:2010.11526, equation 2), in the form for several layers of Zhang, Zhou and Saab 2023
    (arXiv:2201.11113, equation 4): u_t = u_(t-1) + w_t X_t - q_t Y_t and q_t = Q(<Y_t, u_(t-1) + w_t X_t> / |Y_t|^2), with X_t
    column t of the float inputs (over M positions) and Y_t that of the annotated inputs. All that is needed of the data are the
    products Y^T X and Y^T Y, (K, K) a group. Unlike GPTQ it looks back only, and wants no inverse; the columns keep the order
    of the weight.

    Options:
        samples: calibration samples used at most.
        rows: output positions of a layer used at most.

    Stats: as `gptq`.
    """

    name: ClassVar[str] = "gpfq"

    samples: int = 256
    rows: int = 8192

    def choose(self, rows: Rows, steps: Steps, following: Following | None, generator: torch.Generator) -> Chosen:
        inputs, exact = rows.inputs.to(torch.float64), rows.exact_inputs.to(torch.float64)
        return Chosen(gpfq(rows.weight, inputs.transpose(1, 2) @ exact, inputs.transpose(1, 2) @ inputs, steps))


def gpfq(weight: torch.Tensor, cross: torch.Tensor, gram: torch.Tensor, steps: Steps) -> torch.Tensor:
    """Steps (G, O, K) for a weight (G, O, K), Y^T X (`cross`) and Y^T Y (`gram`), (G, K, K) float64 each."""
    exact = weight.to(torch.float64)
    chosen = torch.zeros_like(exact)
    values = torch.zeros_like(exact)
    for t in range(weight.shape[2]):
        product = (exact[:, :, : t + 1] * cross[:, None, t, : t + 1]).sum(2) - (values[:, :, :t] * gram[:, None, t, :t]).sum(2)
        norm = gram[:, None, t, t]
        # A column that is never read says nothing about its weight.
        wanted = torch.where(norm > 0, product / norm.clamp_min(1e-300), exact[:, :, t])
        chosen[:, :, t] = steps.nearest(wanted[:, :, None])[:, :, 0]
        values[:, :, t] = chosen[:, :, t] * steps.scale[:, :, 0]
    return chosen.to(weight.dtype)
