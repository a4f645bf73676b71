"""A small integer program written by hand from gw ops, and its artifact."""

from __future__ import annotations

import functools

import torch
from graphwright.backends.artifact import Artifact
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.ir.capture import capture
from graphwright.ir.dialect import gw
from graphwright.ir.program import Program, Stage


class Integers(torch.nn.Module):
    """Quantize, a convolution with either kind of rescaling, a residual add, a sum pool, a linear layer; int8 inside."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator).to(dtype)

        self.register_buffer("w1", integers(-127, 128, 8, 3, 3, 3))
        self.register_buffer("b1", integers(-5000, 5000, 8, dtype=torch.int32))
        self.register_buffer("s1", torch.rand(8, generator=generator) * 1e-3 + 1e-3)
        self.register_buffer("w2", integers(-127, 128, 8, 8, 1, 1))
        self.register_buffer("m2", integers(1 << 20, 1 << 21, 8, dtype=torch.int32))
        self.register_buffer("h2", integers(29, 31, 8, dtype=torch.int32))
        self.register_buffer("s_pool", torch.full((1,), 1 / 64))
        self.register_buffer("w3", integers(-127, 128, 5, 8))
        self.register_buffer("b3", integers(-500, 500, 5, dtype=torch.int32))
        self.register_buffer("s3", torch.rand(1, generator=generator) * 1e-2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = gw.quantize(x, 0.03, 118, 0, 255, torch.uint8)
        a = gw.convolution(q, self.w1, self.b1, [1, 1], [1, 1], [1, 1], 1, 118)
        a = gw.rescale(a, self.s1, 3, 0, 255, torch.uint8, 1)
        b = gw.convolution(a, self.w2, None, [1, 1], [0, 0], [1, 1], 1, 3)
        b = gw.rescale_dyadic(b, self.m2, self.h2, 120, 0, 255, torch.uint8, 1)
        c = gw.add(a, b, 300000, 400000, 20, 3, 120, 10, 0, 255, torch.uint8)
        pooled = gw.rescale(gw.sum(c, [2, 3], False, 10), self.s_pool, 10, 0, 255, torch.uint8, 1)
        return gw.scale(gw.linear(pooled, self.w3, self.b3, 10), self.s3, 1), c


@functools.cache
def program() -> Program:
    captured = capture(Integers(), samples(1)[0], name="integers")
    return Program(captured.graph_module, Stage.INTEGER, "integers")


def samples(count: int) -> torch.Tensor:
    """(count, 1, 3, 8, 8) float32, with values past both ends of the quantized range."""
    return torch.randn(count, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2


@functools.cache
def artifact(*targets: str) -> Artifact:
    compiled = [TVMBackend().compile(program(), Target.parse(target)) for target in targets]
    plan = {"pipeline": "lower-integer", "target": targets[0]}
    return Artifact.build(program(), compiled, certificate=[{"name": "lower-integer", "sqnr_db": float("inf")}], plan=plan)
