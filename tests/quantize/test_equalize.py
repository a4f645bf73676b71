import pytest
import torch
from graphwright.passes.quantize import operators as ops
from graphwright.passes.quantize.equalize import find_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import prepare, run, seeded
from torch import nn


def weights(program) -> list[torch.Tensor]:
    return [program.parameter(n.args[1]) for n in program.nodes if n.target in (ops.CONVOLUTION, ops.LINEAR)]


def unequal(model: nn.Module, seed: int = 0) -> nn.Module:
    """Spreads the channel ranges of every layer over three decades."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            spread = 10 ** (torch.rand(layer.weight.shape[0], generator=generator) * 3 - 1.5)
            layer.weight.data *= spread.reshape(-1, *[1] * (layer.weight.dim() - 1))
    return model


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([1, 2, 4]), relu=st.booleans(), bias=st.booleans())
def test_exact_for_any_grouping(seed, groups, relu, bias):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 8, 3, padding=1, bias=bias), nn.ReLU() if relu else nn.Identity(), nn.Conv2d(8, 4, 1, groups=groups)]
    program, context = prepare(unequal(nn.Sequential(*layers), seed), (1, 4, 5, 5), samples=1)
    result = run(program, "equalize", context)
    assert result.certificate[0].modified and result.certificate[0].stats["pairs"] == 1
    first, second = weights(result.program)
    per_input = second.reshape(groups, 4 // groups, 8 // groups).transpose(1, 2).reshape(8, -1).abs().amax(1)
    assert torch.allclose(first.flatten(1).abs().amax(1), per_input, rtol=1e-3)


def test_depthwise_triples_agree_on_both_sides():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    program, context = prepare(unequal(model), (1, 3, 6, 6))
    result = run(program, "equalize", context)
    assert result.certificate[0].stats["pairs"] == 2
    a, b, c = weights(result.program)
    middle = b.flatten(1).abs().amax(1)
    assert torch.allclose(a.flatten(1).abs().amax(1), middle, rtol=1e-2)
    assert torch.allclose(c[:, :, 0, 0].abs().amax(0), middle, rtol=1e-2)


def test_helps_low_bit_depthwise_networks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    program, context = prepare(unequal(model), (1, 3, 6, 6))
    plain = run(program, "quantize", context).certificate[-1].sqnr_db
    equalized = run(program, "equalize,quantize", context).certificate[-1].sqnr_db
    assert equalized > plain + 3


def test_linear_layers_and_dead_channels():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    unequal(model)
    model[0].weight.data[2] = 0
    program, context = prepare(model, (2, 4))
    result = run(program, "equalize", context)
    assert result.certificate[0].modified and all(bool(w.isfinite().all()) for w in weights(result.program))


class Between(nn.Module):
    """Two convolutions with something between them that forbids the rescaling."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.a, self.b = what, nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        y = self.a(x)
        match self.what:
            case "relu6":
                return self.b(nn.functional.relu6(y))
            case "two readers":
                return self.b(y) + y
            case "sigmoid":
                return self.b(torch.sigmoid(y))
            case "shared":
                return self.a(torch.relu(y))
        raise ValueError(self.what)


@pytest.mark.parametrize("what", ["relu6", "two readers", "sigmoid", "shared"])
def test_leaves_alone_what_does_not_commute(what):
    program, context = prepare(unequal(seeded(Between, what=what)), (1, 2, 4, 4))
    assert all(find_pair(program, n) is None for n in program.nodes)
    row = run(program, "equalize", context).certificate[0]
    assert not row.modified and row.stats == {"pairs": 0, "largest_factor": 1.0}


def test_a_second_run_changes_nothing():
    program, context = prepare(unequal(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))), (1, 3, 4, 4))
    rows = run(program, "equalize,equalize", context).certificate
    assert [row.modified for row in rows] == [True, False]
