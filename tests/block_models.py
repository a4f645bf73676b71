"""Small networks of residual blocks that the tests of depth share."""

from __future__ import annotations

import functools

import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.program import Program
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager, PipelineResult
from graphwright.passes.pipeline import parse
from graphwright.tools.zoo.vit import Block
from torch import nn


class Transformer(nn.Module):
    """A vision transformer of two heads over 9 patches of 12x12 grey images. `readout`: mean over tokens, or the class token."""

    def __init__(self, depth: int, readout: str = "mean", width: int = 8) -> None:
        super().__init__()
        self.readout = readout
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 9 + (readout == "class"), width))
        self.blocks = nn.Sequential(*(Block(width, 2, 2 * width, 0.0) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if self.readout == "class":
            tokens = torch.cat([self.first.expand(x.shape[0], -1, -1), tokens], 1)
        y = self.norm(self.blocks(tokens + self.position))
        return self.head(y.mean(1) if self.readout == "mean" else y[:, 0])


class PostNorm(nn.Module):
    """Three blocks norm(x + f(x)) of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x))
        return x


class Residual(nn.Module):
    """ResNet blocks: two of one width, one that changes it by a projection, one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(self._branch(*sizes) for sizes in ((4, 4), (4, 4), (4, 6), (6, 6)))
        self.shortcut = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    @staticmethod
    def _branch(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for index, block in enumerate(self.blocks):
            x = torch.relu(block(x) + (self.shortcut(x) if index == 2 else x))
        return self.head(x.mean((2, 3)))


def images(program: Program, count: int = 4, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    shape = [d or 1 for d in program.input_specs[0].shape]
    return Calibration(tuple((torch.randn(shape, generator=generator),) for _ in range(count)))


def canonical(model: nn.Module, *shape: int, free: bool = False) -> Program:
    """free: the batch is a symbol."""
    program = capture(model.eval(), (torch.randn(shape),), name="test", dynamic_batch=free)
    return PassManager().run(program, parse("canonicalize")).program


def transformer(depth: int = 3, readout: str = "mean", seed: int = 0, batch: int = 1) -> Program:
    """A copy of the captured `Transformer`; capturing takes longer than most tests, so it happens once a process and network."""
    torch.manual_seed(seed)
    return _transformer(depth, readout, seed, batch)[1].clone()


def transformer_module(depth: int, readout: str, batch: int = 1, free: bool = False) -> tuple[Transformer, Program]:
    """The module with the Program that was captured from it; both share their weights. free: the batch is a symbol."""
    model, program = _transformer(depth, readout, 0, batch, free)
    return model, program.clone()


@functools.cache
def _transformer(depth: int, readout: str, seed: int, batch: int, free: bool = False) -> tuple[Transformer, Program]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(depth, readout)
        return model, canonical(model, batch, 1, 12, 12, free=free)


def residual(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return _residual(seed).clone()


@functools.cache
def _residual(seed: int) -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return canonical(Residual(), 1, 3, 6, 6)


def compress(program: Program, text: str, calibrated: bool = True, seed: int = 0) -> PipelineResult:
    """Runs pipeline text under the manager, which verifies what it leaves."""
    return PassManager().run(program, parse(text), PassContext(calibration=images(program) if calibrated else None, seed=seed))
