"""Integer programs written by hand from gw ops, for the backend's tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from graphwright.ir.capture import capture
from graphwright.ir.program import Program, Stage

GENERATOR = torch.Generator().manual_seed(7)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR).to(dtype)


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Every value of an 8-bit type is as likely as any other."""
    info = torch.iinfo(dtype)
    return integers(info.min, info.max + 1, *shape, dtype=dtype)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def scales(count: int, around: float) -> torch.Tensor:
    return (torch.rand(count, generator=GENERATOR) + 0.5) * around


class Graph(torch.nn.Module):
    """`function(parameters, *inputs)` with its tensors as buffers."""

    def __init__(self, function: Callable, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: torch.Tensor):
        return self.function(self, *inputs)


def program(function: Callable, *inputs: torch.Tensor, stage: Stage = Stage.INTEGER, **parameters: torch.Tensor) -> Program:
    """Captures `function(p, *inputs)`, p holding `parameters` as attributes."""
    return canonical(capture(Graph(function, parameters).eval(), inputs, name="graph"), stage)


def canonical(captured: Program, stage: Stage) -> Program:
    """Drops copies, as canonicalization does; a view that relied on one becomes a reshape."""
    for node in list(captured.nodes):
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        elif node.target is torch.ops.aten.clone.default:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    captured.sweep()
    captured.infer_shapes()
    return Program(captured.graph_module, stage, captured.name)
