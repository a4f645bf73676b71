"""Crops of the real photographs that scikit-image and scikit-learn carry inside their packages.

No labelled ImageNet is at hand, so these crops measure how often a compressed model agrees with its float model. The
photographs are split once, by photograph: no calibration crop shows a scene of an evaluation crop. Crop number `i` is drawn
from a generator seeded with `i` alone, so a smaller request is a prefix of a larger one. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from ...ir.errors import DataError
from .efficientnet_lite import IMAGE, PIXEL_MEAN, PIXEL_SCALE
from .packages import package_file
from .samples import BATCH, Inputs, checked_count

_SKIMAGE = ("skimage", "scikit-image", "data")
_SKLEARN = ("sklearn", "scikit-learn", "datasets/images")

#: Photographs only: drawings, scans, microscope and telescope images are left out. Brick, grass and gravel fill the frame with a
#: surface that ImageNet has no class for (the float model hesitates), so they calibrate only.
CALIBRATION_PHOTOGRAPHS = (
    (*_SKIMAGE, "chelsea.png"),
    (*_SKLEARN, "china.jpg"),
    (*_SKIMAGE, "rocket.jpg"),
    (*_SKIMAGE, "clock_motion.png"),
    (*_SKIMAGE, "brick.png"),
    (*_SKIMAGE, "grass.png"),
    (*_SKIMAGE, "gravel.png"),
)
EVALUATION_PHOTOGRAPHS = (
    (*_SKIMAGE, "astronaut.png"),
    (*_SKIMAGE, "coffee.png"),
    (*_SKLEARN, "flower.jpg"),
    (*_SKIMAGE, "motorcycle_left.png"),
    (*_SKIMAGE, "camera.png"),
    (*_SKIMAGE, "coins.png"),
)
CALIBRATION_CROPS = 4_096
EVALUATION_CROPS = 2_000

_AREA = (0.2, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_CALIBRATION_SEED = 1_000_000
_EVALUATION_SEED = 2_000_000


@lru_cache(maxsize=len(CALIBRATION_PHOTOGRAPHS) + len(EVALUATION_PHOTOGRAPHS))
def read_photograph(package: str, distribution: str, folder: str, name: str) -> torch.Tensor:
    """The photograph as `(3, H, W)` uint8 RGB; grey ones have three equal channels.

    Raises:
        DataError: Pillow or the carrying package is missing, or the file is damaged.
    """
    path = package_file(package, f"{folder}/{name}", distribution)
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading photographs needs Pillow: run pip install 'graphwright[zoo]'") from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"the photograph {path} cannot be read ({error}); reinstall {distribution}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def random_crop(photograph: torch.Tensor, seed: int) -> torch.Tensor:
    """A crop of `(3, H, W)` uint8, resized to `(3, 224, 224)` float32 and normalized for EfficientNet-lite.

    It covers 20% to 100% of the photograph at an aspect ratio of 3/4 to 4/3 (the crop of Szegedy et al., 2015, without its
    smallest ones), and half of the crops are mirrored.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    _, height, width = photograph.shape
    area = (_AREA[0] + draw[0] * (_AREA[1] - _AREA[0])) * height * width
    aspect = math.exp(math.log(_ASPECT[0]) + draw[1] * math.log(_ASPECT[1] / _ASPECT[0]))
    crop_width = min(width, round(math.sqrt(area * aspect)))
    crop_height = min(height, round(math.sqrt(area / aspect)))
    top = round(draw[2] * (height - crop_height))
    left = round(draw[3] * (width - crop_width))
    crop = photograph[:, top : top + crop_height, left : left + crop_width].float().unsqueeze(0)
    resized = F.interpolate(crop, (IMAGE, IMAGE), mode="bilinear", align_corners=False, antialias=True)[0]
    if draw[4] < 0.5:
        resized = resized.flip(2)
    return (resized - PIXEL_MEAN) / PIXEL_SCALE


def _crops(photographs: tuple[tuple[str, str, str, str], ...], seed: int, count: int) -> Iterable[torch.Tensor]:
    """Batches of crops; crop `i` shows photograph `i` modulo their number, so each has the same weight."""
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        yield torch.stack([random_crop(read_photograph(*photographs[i % len(photographs)]), seed + i) for i in indices])


class Photographs:
    """Samples for EfficientNet-lite0: inputs `(N, 3, 224, 224)` float32, no labels."""

    def calibration(self, count: int) -> list[Inputs]:
        """`count` crops of the calibration photographs; 0.6 MB each."""
        count = checked_count(count, CALIBRATION_CROPS, "calibration crops")
        return [(batch,) for batch in _crops(CALIBRATION_PHOTOGRAPHS, _CALIBRATION_SEED, count)]

    def training(self, count: int | None) -> list[Inputs] | None:
        """None: the photographs it was trained on are not at hand."""
        return None

    def calibration_labels(self, count: int) -> torch.Tensor | None:
        """None: nobody has labelled the photographs."""
        return None

    def evaluation(self, count: int | None) -> Iterable[tuple[Inputs, torch.Tensor | None]]:
        """`count` crops (2,000 by default) of the evaluation photographs, made as they are asked for."""
        count = checked_count(count, EVALUATION_CROPS, "evaluation crops")
        for batch in _crops(EVALUATION_PHOTOGRAPHS, _EVALUATION_SEED, count):
            yield (batch,), None
