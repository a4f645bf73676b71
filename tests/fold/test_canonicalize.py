"""canonicalize: real blocks reach the canonical stage, and ONNX's spelling of a block ends as torch's does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from graphwright.ir.capture import capture
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.program import Stage
from graphwright.passes.base import EXACT, Pass, PassContext, PassResult
from graphwright.passes.fold import canonicalize
from graphwright.passes.pipeline import parse
from torch import nn

aten = torch.ops.aten


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and parameters as training leaves them."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-1, 1)
    return model.eval()


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.short = conv_bn(4, 8, 3, 2), conv_bn(8, 8, 3), conv_bn(4, 8, 1, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu(self.second(F.relu(self.first(x))) + self.short(x), inplace=True)
        return self.head(F.dropout(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1), 0.2, self.training))


class MobileNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = conv_bn(4, 12, 1), conv_bn(12, 12, 3, 1, 12), conv_bn(12, 4, 1)

    def forward(self, x):
        return (x + self.project(F.relu6(self.depth(F.hardtanh(self.expand(x), 0, 6))))).mean([-1, -2])


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.relu(self.norm(x)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def split(self, x):
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def attention(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def norm(self, module, x):
        return module(x)

    def gelu(self, x):
        return F.gelu(x)

    def linear(self, module, x):
        return module(x)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y = self.norm(self.norm1, x)
        q, k, v = (self.split(self.linear(m, y)) for m in (self.q, self.k, self.v))
        y = self.attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.linear(self.out, y)
        return x + self.linear(self.down, self.gelu(self.linear(self.up, self.norm(self.norm2, x))))


class WrittenOut(TransformerBlock):
    """The same block as ONNX exporters write it: only arithmetic."""

    def attention(self, q, k, v):
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return torch.softmax(scores, -1) @ v

    def norm(self, module, x):
        d = x - x.mean(-1, keepdim=True)
        return d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + module.eps) * module.weight + module.bias

    def gelu(self, x):
        return x * (torch.erf(x / math.sqrt(2)) + 1) * 0.5

    def linear(self, module, x):
        return torch.matmul(x, module.weight.t()) + module.bias


def test_resnet_block(rewrite, ops):
    after, row = rewrite(capture(randomize(ResNetBlock()), torch.randn(2, 4, 7, 7)), "canonicalize")
    assert after.stage is Stage.CANONICAL
    assert ops(after) == {"convolution": 3, "relu": 2, "add": 1, "mean": 1, "reshape": 1, "linear": 1}
    assert row.stats["fold-batch-norm"] == 1
    assert {n.meta["origin"] for n in after.nodes if n.target is aten.convolution.default} == {"first.0", "second.0", "short.0"}


def test_mobilenet_block(rewrite, ops):
    after, _ = rewrite(capture(randomize(MobileNetBlock()), torch.randn(2, 4, 7, 7), dynamic_batch=True), "canonicalize")
    assert ops(after) == {"convolution": 3, "clamp": 2, "add": 1, "mean": 1}
    clamps = [n.args[1:] for n in after.nodes if n.target is aten.clamp.default]
    assert clamps == [(0.0, 6.0)] * 2


def test_pre_activation_keeps_a_scale_and_a_shift(rewrite, ops):
    after, _ = rewrite(capture(randomize(PreActivation()), torch.randn(2, 4, 7, 7)), "canonicalize")
    assert ops(after) == {"mul": 1, "add": 2, "relu": 1, "convolution": 1}


@pytest.mark.parametrize("dynamic", [False, True])
def test_transformer_block_ends_alike_however_it_is_written(rewrite, ops, dynamic):
    torch.manual_seed(0)
    whole = TransformerBlock()
    written = WrittenOut()
    written.load_state_dict(whole.state_dict())
    x = torch.randn(2, 3, 8, 8)
    results = [rewrite(capture(m, x, dynamic_batch=dynamic), "canonicalize")[0] for m in (whole, written)]
    layers = {"linear": 6, "layer_norm": 2, "matmul": 2, "softmax": 1, "gelu": 1, "convolution": 1}
    for program in results:
        found = ops(program)
        assert {name: found[name] for name in layers} == layers
        assert found["mul"] == found["div"] == found["sub"] == found["erf"] == found["clone"] == 0
    assert ops(results[0]) == ops(results[1])
    torch.testing.assert_close(results[0](x)[0], results[1](x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0](x)[0], whole.eval()(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_canonical_program_is_a_fixed_point(rewrite, build):
    b = build((2, 3))
    b.program.stage = Stage.CANONICAL
    _, row = rewrite(b.returns(b(aten.relu.default, b.x)), "canonicalize")
    assert not row.modified


def test_a_captured_program_without_work_is_modified_by_its_stage(rewrite, build):
    b = build((2, 3))
    after, row = rewrite(b.returns(b(aten.relu.default, b.x)), "canonicalize")
    assert row.modified
    assert row.stats == {}
    assert after.stage is Stage.CANONICAL


def test_passes_that_never_settle_are_an_error_that_names_them(build, rewrite, monkeypatch):
    @dataclass(frozen=True)
    class FlipFlop(Pass):
        name = "flip-flop"
        effect = EXACT

        def run(self, program, context: PassContext) -> PassResult:
            node = next(n for n in program.nodes if n.target in (aten.relu.default, aten.clamp_min.default))
            back = node.target is aten.clamp_min.default
            node.target, node.args = (aten.relu.default, node.args[:1]) if back else (aten.clamp_min.default, (*node.args, 0))
            return PassResult(program, True)

    monkeypatch.setattr(canonicalize, "STEPS", (*canonicalize.STEPS[:2], FlipFlop()))
    b = build((2, 3))
    with pytest.raises(PassError, match=r"no fixed point after 5 rounds; still rewriting: flip-flop \(max_rounds"):
        rewrite(b.returns(b(aten.relu.default, b.x)), "canonicalize{max_rounds=5}")


def test_max_rounds_is_checked():
    with pytest.raises(OptionError, match="at least 1"):
        parse("canonicalize{max_rounds=0}")
