"""Networks small enough for dense Hessians, the tasks of the scorer tests, and exact derivatives."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.program import Program, Stage
from graphwright.passes.quantize.annotate import Quantize
from graphwright.search.sensitivity.base import Layer, Task
from graphwright.search.sensitivity.layers import weight_layers
from graphwright.search.store import Store
from torch import nn

CHOICES = ("int8", "int4", "int2")


class TinyConv(nn.Module):
    """Convolution, depthwise convolution with relu6, a residual sum and a classifier over 8x8 images: 171 weights."""

    shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 2, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((x + F.relu6(self.depthwise(x))).mean((2, 3)))


class TinyBlock(nn.Module):
    """An attention block over 3 tokens of width 4, smooth everywhere, and a classifier."""

    shape = (3, 4)

    def __init__(self, softmax: bool = False) -> None:
        super().__init__()
        self.softmax = softmax
        self.norm = nn.LayerNorm(4)
        self.qkv, self.fc, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).split(4, -1)
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        x = self.head(F.gelu(self.fc(x)).mean(1))
        return x.softmax(-1) if self.softmax else x


class TwoOutputs(nn.Module):
    """Two regressions, one of them behind a tanh."""

    shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.a(x))
        return self.b(hidden), hidden


@functools.lru_cache
def program_of(model_class: type[nn.Module], batch: int = 1, **options) -> Program:
    """A seeded model with larger weights than torch's defaults, so that curvature is not next to nothing."""
    torch.manual_seed(3)
    model = model_class(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    program = capture(model, torch.randn(batch, *model_class.shape), name=model_class.__name__)  # type: ignore[attr-defined]
    program.stage = Stage.CANONICAL
    return program


def task_of(
    model_class: type[nn.Module], samples: int = 12, *, batch: int = 1, store: Store | None = None, seed: int = 0, **options
):
    """A task with labels drawn from the model's own probabilities where it has class scores."""
    program = program_of(model_class, batch, **options)
    generator = torch.Generator().manual_seed(7)
    batches = [torch.randn(batch, *model_class.shape, generator=generator) for _ in range(samples)]  # type: ignore[attr-defined]
    calibration = Calibration.for_program(program, batches)
    labels = None
    if len(program.outputs) == 1:
        labels = torch.stack([torch.multinomial(program(*x)[0].softmax(-1), 1, generator=generator)[:, 0] for x in calibration])
    layers = weight_layers(program, Quantize(), CHOICES)
    return Task(program, layers, CHOICES, calibration, labels, store or Store(), seed=seed)


def mean_loss(task: Task, kind: str, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """The loss of the program with `weight` in one layer, written out sample by sample, differentiable in `weight`."""
    return mean_loss_of(task, kind, [(layer, weight)])


def mean_loss_of(task: Task, kind: str, changed: list[tuple[Layer, torch.Tensor]]) -> torch.Tensor:
    """`mean_loss` with several layers changed."""
    assert task.samples is not None
    weights = {str(layer.node.args[1].target): weight for layer, weight in changed}  # type: ignore[union-attr]
    total = torch.zeros(())
    for index, sample in enumerate(task.samples):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outputs = torch.func.functional_call(task.program.graph_module, weights, sample)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        expected = task.program(*sample)
        if kind == "squared":
            total = total + sum((y - e).square().sum() / e.square().sum() for y, e in zip(outputs, expected, strict=True))
        elif kind == "labels":
            assert task.labels is not None
            total = total + F.cross_entropy(outputs[0], task.labels[index])
        else:
            p = expected[0].softmax(-1)
            total = total + (p * (p.log() - outputs[0].log_softmax(-1))).sum(-1).mean()
    return total / len(task.samples)


@functools.cache
def _hessian(task_key: tuple, kind: str, index: int) -> torch.Tensor:
    model_class, samples, options = task_key
    task = task_of(model_class, samples, **dict(options))
    layer = task.layers[index]
    size = layer.weight.numel()
    dense = torch.autograd.functional.hessian(lambda w: mean_loss(task, kind, layer, w), layer.weight)
    return dense.reshape(size, size).double()  # type: ignore[union-attr]


def dense_hessian(model_class: type[nn.Module], kind: str, index: int, samples: int = 12, **options) -> torch.Tensor:
    """The exact Hessian of the mean loss over layer `index`'s weights, (n, n) float64, of the task of the same arguments."""
    return _hessian((model_class, samples, tuple(sorted(options.items()))), kind, index)
