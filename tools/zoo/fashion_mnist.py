"""Fashion-MNIST from the files of Debian's package `dataset-fashion-mnist` (Xiao et al., 2017).

The 60,000 training images are cut once, in file order: the first 55,000 train the reference models, the last 5,000 are
held out from training. The held-out slice chooses the checkpoint and is the only source of calibration samples. The
10,000 test images serve evaluation alone.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ...ir.errors import DataError, UnknownNameError
from .samples import BATCH, Inputs, checked_count

DEFAULT_ROOT = Path("/usr/share/datasets/fashion-mnist")
HELD_OUT = 5_000
MEAN = 0.2860
STD = 0.3530

_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", 60_000),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", 10_000),
}


def read_idx(path: Path) -> np.ndarray:
    """Read a gzip-compressed IDX file of unsigned bytes into a `uint8` array of the shape its header states.

    Raises:
        DataError: the file is missing, is not gzip, or its header and length disagree.
    """
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read()
    except FileNotFoundError as error:
        raise DataError(
            f"Fashion-MNIST file {path} is missing: install the Debian package dataset-fashion-mnist "
            "(apt-get install dataset-fashion-mnist), or name a folder that holds its four .gz files"
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"Fashion-MNIST file {path} cannot be read: {error}; reinstall dataset-fashion-mnist") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes (header {raw[:4].hex()}, expected 000008..)")
    rank = raw[3]
    header = 4 + 4 * rank
    if len(raw) < header:
        raise DataError(f"{path} is truncated inside its IDX header of {header} bytes")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", rank, 4))
    if len(raw) - header != math.prod(shape):
        raise DataError(f"{path}: header states shape {shape}, the file holds {len(raw) - header} bytes of data")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


@lru_cache(maxsize=4)
def load_split(split: str, root: Path = DEFAULT_ROOT) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(N, 28, 28)` uint8 and labels `(N,)` int64 of `"train"` (60,000) or `"test"` (10,000)."""
    if split not in _FILES:
        raise UnknownNameError("Fashion-MNIST split", split, _FILES)
    image_file, label_file, expected = _FILES[split]
    images, labels = read_idx(root / image_file), read_idx(root / label_file)
    if images.shape != (expected, 28, 28) or labels.shape != (expected,):
        raise DataError(
            f"Fashion-MNIST {split} in {root} has images {images.shape} and labels {labels.shape}, "
            f"expected ({expected}, 28, 28) and ({expected},)"
        )
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def training_slice(root: Path = DEFAULT_ROOT) -> tuple[torch.Tensor, torch.Tensor]:
    """The 55,000 images and labels the reference models are trained on."""
    images, labels = load_split("train", root)
    return images[:-HELD_OUT], labels[:-HELD_OUT]


def held_out_slice(root: Path = DEFAULT_ROOT) -> tuple[torch.Tensor, torch.Tensor]:
    """The last 5,000 images and labels of the training split: checkpoint choice and calibration."""
    images, labels = load_split("train", root)
    return images[-HELD_OUT:], labels[-HELD_OUT:]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """`(N, 28, 28)` uint8 to `(N, 1, 28, 28)` float32, in units of the training set's standard deviation."""
    return ((images.float() / 255.0 - MEAN) / STD).unsqueeze(1)


class FashionMnist:
    """Samples for the Fashion-MNIST models: inputs `(N, 1, 28, 28)` float32, labels `(N,)` int64 in 0..9."""

    def __init__(self, root: Path = DEFAULT_ROOT) -> None:
        self.root = root

    def calibration(self, count: int) -> list[Inputs]:
        """The first `count` images of the held-out slice of the training split, never test images."""
        images, _ = held_out_slice(self.root)
        count = checked_count(count, HELD_OUT, "Fashion-MNIST calibration images")
        return [(normalize(batch),) for batch in images[:count].split(BATCH)]

    def training(self, count: int | None) -> list[Inputs] | None:
        """The first `count` images (all 55,000 by default) of the training slice."""
        images, _ = training_slice(self.root)
        count = checked_count(count, len(images), "Fashion-MNIST training images")
        return [(normalize(batch),) for batch in images[:count].split(BATCH)]

    def calibration_labels(self, count: int) -> torch.Tensor | None:
        """Their labels."""
        _, labels = held_out_slice(self.root)
        return labels[: checked_count(count, HELD_OUT, "Fashion-MNIST calibration images")]

    def evaluation(self, count: int | None) -> Iterable[tuple[Inputs, torch.Tensor | None]]:
        """The first `count` test images (all 10,000 by default) with their labels."""
        images, labels = load_split("test", self.root)
        count = checked_count(count, len(labels), "Fashion-MNIST test images")
        for start in range(0, count, BATCH):
            stop = min(start + BATCH, count)
            yield (normalize(images[start:stop]),), labels[start:stop]
