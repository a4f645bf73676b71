"""Random images for a network whose weights are random too: they exercise every kernel and prove nothing about accuracy.

Image number `i` is drawn from a generator seeded with `i` alone: a smooth field of colours, which differs from image to image
after pooling, with noise on top; mean 0 and variance about 1, as normalized photographs have.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from .samples import BATCH, Inputs, checked_count

IMAGE = 224
CALIBRATION_IMAGES = 4_096
EVALUATION_IMAGES = 200

_CALIBRATION_SEED = 3_000_000
_EVALUATION_SEED = 4_000_000
_FIELD = 4


def random_image(seed: int) -> torch.Tensor:
    """`(3, 224, 224)` float32."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(1, 3, _FIELD, _FIELD, generator=generator)
    smooth = F.interpolate(field, (IMAGE, IMAGE), mode="bicubic", align_corners=False)[0]
    return smooth + 0.5 * torch.randn(3, IMAGE, IMAGE, generator=generator)


def _images(seed: int, count: int) -> Iterable[torch.Tensor]:
    for start in range(0, count, BATCH):
        yield torch.stack([random_image(seed + i) for i in range(start, min(start + BATCH, count))])


class RandomImages:
    """Samples: inputs `(N, 3, 224, 224)` float32, no labels."""

    def calibration(self, count: int) -> list[Inputs]:
        count = checked_count(count, CALIBRATION_IMAGES, "calibration images")
        return [(batch,) for batch in _images(_CALIBRATION_SEED, count)]

    def training(self, count: int | None) -> list[Inputs] | None:
        """None: nobody trained it."""
        return None

    def calibration_labels(self, count: int) -> torch.Tensor | None:
        """None: random images show nothing."""
        return None

    def evaluation(self, count: int | None) -> Iterable[tuple[Inputs, torch.Tensor | None]]:
        """`count` images (200 by default), made as they are asked for."""
        count = checked_count(count, EVALUATION_IMAGES, "evaluation images")
        for batch in _images(_EVALUATION_SEED, count):
            yield (batch,), None
