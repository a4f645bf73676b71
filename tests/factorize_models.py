"""Small networks and shortcuts that the factorization tests share."""

from __future__ import annotations

import torch
from graphwright.ir.program import Program
from graphwright.passes.fold.layer import Layer, layer_of
from quantize_models import prepare
from torch import nn


class Convolutions(nn.Module):
    """Strides, dilation, odd kernels, a 1x1, a depthwise convolution, a transposed one, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.wide = nn.Conv2d(16, 24, (3, 5), 1, (1, 2), bias=False)
        self.dilated = nn.Conv2d(24, 16, 3, (2, 1), 2, dilation=2)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.head = nn.Linear(16, 12)

    def forward(self, x):
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        x = self.depthwise(torch.relu(self.dilated(x)))
        x = torch.relu(self.up(torch.relu(self.point(x))))
        return self.head(x.mean((2, 3)))


def layers_of(program: Program) -> list[Layer]:
    return [layer for node in program.nodes if (layer := layer_of(program, node)) is not None]


def one_layer(module: nn.Module, shape: tuple[int, ...], seed: int = 0) -> tuple[Program, Layer]:
    """A program of one layer with random weights, and the layer."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    program, _ = prepare(module, shape, samples=1)
    return program, layers_of(program)[0]


def largest_difference(a: Program, b: Program, shape: tuple[int, ...]) -> float:
    """Largest difference of the outputs over the largest output, on random inputs."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    (expected,), (actual,) = a(x), b(x)
    return float((expected - actual).abs().max() / expected.abs().max())
