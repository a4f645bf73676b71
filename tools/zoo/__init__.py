"""The reference models: networks that bring their data and their metric along. All are trained but ResNet-50 and the widened
ResNet-20 and MobileNetV2, which have random weights and serve to measure latency.

    reference = load("mobilenetv2")
    batches = reference.calibration(512)
    score = reference.evaluate(lambda inputs: reference.model(*inputs), 1000)

What each model is, where it comes from and what it scores stands in docs/ZOO.md. Weights, data and the packages of the `zoo`
extra are touched by `load` and by the methods of what it returns, not by importing this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...ir.errors import UnknownNameError
from .efficientnet_lite import published_efficientnet_lite0
from .fashion_mnist import FashionMnist
from .gpt import GPTSmall
from .manuals import Manuals
from .minilm import published_minilm
from .mobilenetv2 import MobileNetV2
from .photographs import Photographs
from .random_images import RandomImages
from .reference import Metric, ReferenceModel, perplexity
from .resnet import ResNet20
from .resnet50 import random_resnet50
from .samples import Samples
from .sentences import Sentences
from .vit import ViTTiny
from .weights_file import load_weights
from .widened import wide_mobilenetv2, wide_resnet20

__all__ = ["Metric", "ReferenceModel", "load", "names", "perplexity"]

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class _Entry:
    build: Callable[[], nn.Module]
    samples: Callable[[], Samples]
    metric: Metric
    weights: str | None = None


_ENTRIES = {
    "efficientnet-lite0": _Entry(published_efficientnet_lite0, Photographs, Metric.TOP1_AGREEMENT),
    "resnet20": _Entry(ResNet20, FashionMnist, Metric.TOP1, "resnet20.safetensors"),
    "mobilenetv2": _Entry(MobileNetV2, FashionMnist, Metric.TOP1, "mobilenetv2.safetensors"),
    "vit-tiny": _Entry(ViTTiny, FashionMnist, Metric.TOP1, "vit-tiny.safetensors"),
    "minilm-l6": _Entry(published_minilm, Sentences, Metric.SPEARMAN),
    "gpt-small": _Entry(GPTSmall, Manuals, Metric.LOG_LIKELIHOOD, "gpt-small.safetensors"),
    "resnet50": _Entry(random_resnet50, RandomImages, Metric.CORRELATION),
    "resnet20-x4": _Entry(wide_resnet20, FashionMnist, Metric.CORRELATION),
    "mobilenetv2-x4": _Entry(wide_mobilenetv2, FashionMnist, Metric.CORRELATION),
}


def names() -> tuple[str, ...]:
    """The names `load` takes."""
    return tuple(_ENTRIES)


def load(name: str) -> ReferenceModel:
    """Build the reference model `name` with its weights, on the CPU, in eval mode.

    Raises:
        UnknownNameError: no such model; the message gives the nearest name.
        DataError: its weights, its data set or a package of the `zoo` extra is missing or damaged; the message says what to
            install.
    """
    if name not in _ENTRIES:
        raise UnknownNameError("reference model", name, _ENTRIES)
    entry = _ENTRIES[name]
    model = entry.build()
    if entry.weights is not None:
        load_weights(model, WEIGHTS / entry.weights)
    samples = entry.samples()
    inputs, _ = next(iter(samples.evaluation(1)))
    return ReferenceModel(name, model.eval().requires_grad_(False), inputs, entry.metric, samples)
