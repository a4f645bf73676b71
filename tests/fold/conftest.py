"""Programs written op by op, so that a test states its input graph and needs no export."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from graphwright.ir.program import Program, Stage
from graphwright.passes.base import PassContext
from graphwright.passes.manager import CertificateRow, PassManager
from graphwright.passes.pipeline import parse
from hypothesis import settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

settings.register_profile("fold", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fold")


class Build:
    """Appends calls to a program. Inputs are float32 of the given shapes."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        graph = fx.Graph()
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.inputs = []
        for index, shape in enumerate(shapes):
            node = graph.placeholder(f"x{index}")
            node.meta["val"] = mode.from_tensor(torch.empty(shape), static_shapes=True)
            self.inputs.append(node)
        self.end = graph.output([])
        self.program = Program(fx.GraphModule(torch.nn.Module(), graph), Stage.CAPTURED, "test")

    @property
    def x(self) -> fx.Node:
        return self.inputs[0]

    def __call__(self, target, *args, **kwargs) -> fx.Node:
        return self.program.insert(target, args, self.end, origin=f"layer{len(self.program.graph.nodes)}", **kwargs)

    def parameter(self, value: torch.Tensor, name: str = "p") -> fx.Node:
        return self.program.add_parameter(name, value, self.end, origin=name)

    def random(self, *shape: int, name: str = "p") -> fx.Node:
        return self.parameter(torch.randn(shape), name)

    def conv(
        self, x, weight, bias=None, stride=1, padding=0, dilation=1, transposed=False, output_padding=0, groups=1
    ) -> fx.Node:
        """`weight` and `bias` are nodes, or shapes of random parameters."""
        weight = weight if isinstance(weight, fx.Node) else self.random(*weight, name="conv_weight")
        bias = self.random(bias, name="conv_bias") if isinstance(bias, int) else bias
        rank = weight.meta["val"].dim() - 2
        numbers = [[v] * rank if isinstance(v, int) else list(v) for v in (stride, padding, dilation, output_padding)]
        args = (x, weight, bias, *numbers[:3], transposed, numbers[3], groups)
        return self(torch.ops.aten.convolution.default, *args)

    def linear(self, x, inputs: int, outputs: int, bias: bool = True) -> fx.Node:
        weight = self.random(outputs, inputs, name="weight")
        return self(torch.ops.aten.linear.default, x, weight, self.random(outputs, name="bias") if bias else None)

    def batch_norm(self, x, channels: int, affine: bool = True, shift: bool = True) -> fx.Node:
        weight = self.parameter(torch.rand(channels) + 0.5, "gamma") if affine else None
        bias = self.parameter(torch.randn(channels) * shift, "beta") if affine else None
        mean, var = self.parameter(torch.randn(channels) * shift, "mean"), self.parameter(torch.rand(channels) + 0.1, "var")
        return self(torch.ops.aten.batch_norm.default, x, weight, bias, mean, var, False, 0.1, 1e-5, False)

    def returns(self, *outputs: fx.Node) -> Program:
        self.end.args = (list(outputs),)
        self.program.sweep()
        return self.program


@st.composite
def _convolutions(draw, padded: bool = True):
    """Arguments of a random one- to three-dimensional convolution that fits its input, plain or transposed."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    transposed = draw(st.booleans())

    def per_dim(low, high):
        return [draw(st.integers(low, high)) for _ in range(rank)]

    kernel, stride, dilation = per_dim(1, 3), per_dim(1, 3), per_dim(1, 2)
    padding = [min(p, k - 1) for p, k in zip(per_dim(0, 2 if padded else 0), kernel, strict=True)]
    size = [d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, per_dim(0, 4), strict=True)]
    weight = (inputs, outputs // groups, *kernel) if transposed else (outputs, inputs // groups, *kernel)
    output_padding = [draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation, strict=True)]
    options = {
        "bias": outputs if draw(st.booleans()) else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "transposed": transposed,
        "output_padding": output_padding,
        "groups": groups,
    }
    return (draw(st.integers(1, 2)), inputs, *size), weight, outputs, options


def _rewrite(program: Program, text: str, probes: tuple = ()) -> tuple[Program, CertificateRow]:
    """Runs pipeline text under the manager, which verifies and compares outputs; gives the program and the last row."""
    before = str(program.graph)
    result = PassManager().run(program, parse(text), PassContext(probes=tuple(probes)))
    assert str(program.graph) == before, "the pass edited the program it was given"
    row = result.certificate[-1]
    if row.modified:
        again = PassManager().run(result.program, parse(text)).certificate[-1]
        assert not again.modified, "the pass is not idempotent"
    return result.program, row


def _ops(program: Program) -> Counter:
    """How often each op occurs, by its short name, such as {"convolution": 2}."""
    return Counter(str(n.target).split(".")[1] for n in program.nodes if n.op == "call_function")


@pytest.fixture(scope="session")
def build() -> type[Build]:
    return Build


@pytest.fixture(scope="session")
def rewrite():
    return _rewrite


@pytest.fixture(scope="session")
def ops():
    return _ops


@pytest.fixture(scope="session")
def convolutions():
    """Strategy of (input shape, weight shape, output channels, options of Build.conv)."""
    return _convolutions


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
