"""Small models and shortcuts that the quantization tests share."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.program import Program, Stage
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager, PipelineResult
from graphwright.passes.pipeline import parse
from graphwright.passes.quantize.encoding import is_fake_quantize
from torch import nn

#: Input shape of Block. Tests of several files share it, and with it the model that `prepared` keeps.
BLOCK = (2, 5, 32)


class ConvNet(nn.Module):
    """Stem, depthwise block with relu6 and a residual sum, pooling, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand = nn.Conv2d(8, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.project = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return self.head(F.max_pool2d(x, 3, 2, 1).mean((2, 3)))


class Mixed(nn.Module):
    """Squeeze-and-excitation, concat, slices, average pool, table activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.branch = nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([x, F.gelu(self.branch(x))], 1)
        return self.head(F.avg_pool2d(x, 2).mean((2, 3)))


class Kinds(nn.Module):
    """Dense, depthwise and grouped convolutions, 1x1, a residual sum, linear layers over many rows and over one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.expand = nn.Conv2d(16, 40, 1)
        self.depthwise = nn.Conv2d(40, 40, 3, 1, 1, groups=40)
        self.grouped = nn.Conv2d(40, 24, 3, 1, 1, groups=4)
        self.project = nn.Conv2d(24, 16, 1)
        self.rows, self.head = nn.Linear(16, 48), nn.Linear(48, 11)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.grouped(torch.relu(self.depthwise(torch.relu(self.expand(x))))))
        rows = (x + self.project(y)).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.rows(rows)).mean(1))


class Concat(nn.Module):
    """A concatenation of two parts, one of which another layer reads; the other may be on a grid of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = torch.relu(self.a(x))
        branch = self.b(x)
        return self.c(torch.cat([x, branch if self.scale == 1.0 else self.scale * branch], 1))


class Block(nn.Module):
    """A pre-norm transformer block with its attention written out, and a head over the mean token."""

    def __init__(self, width: int = 32, heads: int = 2, masked: bool = False) -> None:
        super().__init__()
        self.heads, self.masked = heads, masked
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (w // self.heads) ** -0.5) @ k.transpose(-2, -1)
        if self.masked:
            scores = scores + torch.triu(torch.full((t, t), -1e9), 1)
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, w))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm1(x).mean(1))


def prepare(model: nn.Module, shape: tuple[int, ...], samples: int = 8, seed: int = 0) -> tuple[Program, PassContext]:
    """The captured model without copies (canonical) and a context with `samples` random inputs of `shape` (batch included)."""
    generator = torch.Generator().manual_seed(seed)
    program = capture(model.eval(), torch.randn(shape, generator=generator))
    for node in list(program.nodes):
        if node.target is torch.ops.aten.clone.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    program.sweep()
    program.stage = Stage.CANONICAL
    batches = [torch.randn(shape, generator=generator) for _ in range(samples)]
    return program, PassContext(Calibration.for_program(program, batches))


@functools.lru_cache
def prepared(model_class: type[nn.Module], shape: tuple[int, ...], **options) -> tuple[Program, PassContext]:
    """`prepare` of a seeded model, made once: programs are never edited in place."""
    return prepare(seeded(model_class, **options), shape)


def seeded(model_class: type[nn.Module], seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return model_class(**options)


def run(program: Program, text: str, context: PassContext) -> PipelineResult:
    return PassManager().run(program, parse(text), context)


def targets(program: Program) -> list[str]:
    """Op names such as `gw.add` in graph order."""
    return [str(n.target).removesuffix(".default") for n in program.nodes if n.op == "call_function"]


def weights_of(program: Program) -> list[torch.fx.Node]:
    """The fake-quantized weights, in graph order."""
    return [n for n in program.nodes if is_fake_quantize(n) and program.parameter(n.args[0]) is not None]


def correlated(shape: tuple[int, ...], count: int, seed: int) -> list[torch.Tensor]:
    """Inputs whose neighbours along the last axis go together: where inputs are independent, the nearest code is the best."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).cumsum(-1) / shape[-1] ** 0.5 for _ in range(count)]
