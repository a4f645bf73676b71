"""Float programs through the TVM backend are close to torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.capture import capture
from graphwright.ir.program import Stage
from integer_graphs import canonical, normal, program
from torch import nn
from tvm_programs import check_bits, compiled, kinds


class FloatNet(nn.Module):
    """Designed float kernels beside generic ones, in both layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.grouped, self.up = nn.Conv2d(16, 24, 3, 1, 1, groups=4), nn.ConvTranspose2d(24, 8, 2, 2)
        self.gate, self.norm, self.head = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x):
        y = F.hardswish(self.grouped(F.relu6(self.depthwise(torch.relu(self.stem(x))))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None] + 0.5 * y
        rows = self.norm(y.flatten(2).transpose(1, 2))
        mixed = torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows
        pools = (
            F.max_pool2d(y, 3, 2, 1),
            F.max_pool2d(y, 3, 2, 1, ceil_mode=True),
            F.avg_pool2d(y, 3, 1, 1),
            F.adaptive_avg_pool2d(y, 1),
        )
        largest, where = torch.topk(y.mean((2, 3)), 3)
        return self.head(F.gelu(mixed).mean(1)), F.max_pool2d(self.up(y), 2), *pools, largest, where


def test_float_program_is_close_to_torch():
    torch.manual_seed(0)
    model, x = FloatNet().eval(), normal(2, 3, 15, 13)
    result = compiled(canonical(capture(model, x), Stage.CANONICAL))
    for got, expected in zip(load_bytes(result.library)(x.numpy()), model(x), strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    names = kinds(result)
    assert names["convolution_f"] == 2 and names["depthwise_f"] == 1 and names["linear_f"] == 2 and names["attention_f"] == 1
    assert names["layer_norm_f"] == 1 and names["max_pool_f"] == 1 and names["mean_pool_f"] == 1 and names["activation_f"] == 1
    assert {row.kind for row in result.kernels} == {"designed", "generic"}


class Attend(nn.Module):
    """Self-attention over three heads, a mask over the keys, and a residual."""

    def __init__(self, scores_are_shared: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.shared = nn.Linear(24, 72), nn.Linear(24, 24), scores_are_shared

    def forward(self, x, mask):
        q, k, v = self.qkv(x).reshape(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 8**0.5 + mask[:, None, None]
        y = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(2, 7, 24)
        return F.silu(x + self.out(y)), *([scores] if self.shared else [])


@pytest.mark.parametrize("shared", [False, True], ids=["one kernel", "scores read twice"])
def test_attention_of_a_float_program(shared):
    torch.manual_seed(0)
    model, inputs = Attend(shared).eval(), (normal(2, 7, 24), normal(2, 7))
    result = compiled(canonical(capture(model, inputs), Stage.CANONICAL))
    for got, expected in zip(load_bytes(result.library)(*(x.numpy() for x in inputs)), model(*inputs), strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    names = kinds(result)
    # Residual and silu are in the last linear layer.
    assert names["linear_f"] == 2
    if shared:
        assert names["softmax_f"] == 1 and names["matmul_f"] == 2
    else:
        assert names == {"linear_f": 2, "attention_f": 1}


def test_ops_that_tvm_lacks_are_lowered_by_torch_decompositions():
    captured = capture(nn.Sequential(nn.Linear(4, 6), nn.Mish()), normal(3, 4))
    captured.stage = Stage.CANONICAL
    result, x = compiled(captured), normal(3, 4)
    np.testing.assert_allclose(load_bytes(result.library)(x.numpy())[0], captured(x)[0].numpy(), rtol=1e-5, atol=1e-6)
    assert {row.nodes for row in result.kernels} == {("linear",), ("mish",)}


def test_float_attention_of_inputs_reads_copies():
    """Vector loads may run past a row; past the end of the caller's memory they must not."""

    class Attend(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v

    inputs = tuple(normal(1, 2, 5, 16) for _ in range(3))
    result = compiled(canonical(capture(Attend(), inputs), Stage.CANONICAL))
    run = load_bytes(result.library)
    (got,) = run(*(x.numpy() for x in inputs))
    np.testing.assert_allclose(got, Attend()(*inputs).numpy(), rtol=1e-5, atol=1e-6)
    assert kinds(result)["attention_f"] == 1
    assert len(run.step_names) >= 4, "three copies before the attention"


def largest_and_smallest(x):
    whole = torch.amax(x, []), torch.amin(x, list(range(x.dim())), True)
    return torch.amax(x, -1), torch.amin(x, [0, -1], True), x.max(1, keepdim=True).values, torch.amax(x, 1, True) - x, *whole


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 33, 1, 40), (1, 1)])
def test_largest_and_smallest_elements_are_torchs(shape):
    check_bits(program(lambda _, x: largest_and_smallest(x), normal(*shape)), (normal(*shape),), (-normal(*shape).abs(),))
