"""smooth-quant: exact moves of factors, the sites it finds, and what it is for."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.passes.quantize import operators as ops
from graphwright.passes.quantize.smooth_quant import find_sites
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import prepare, run
from torch import nn


class Encoder(nn.Module):
    """One block, pre-norm or post-norm, with fused or separate projections; two channels of its input are outliers."""

    def __init__(self, width: int = 16, heads: int = 2, post: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.post, self.fused = heads, post, fused
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        for norm in (self.first, self.second):
            norm.weight.data[:2] = 30.0
            norm.bias.data.normal_()
        self.qkv = nn.Linear(width, 3 * width)
        self.split = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 32), nn.Linear(32, width)
        for reader in (self.qkv, *self.split, self.up):
            reader.weight.data[:, :2] /= 30.0  # pyright: ignore

    def attend(self, x):
        n, t, c = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).reshape(n, t, self.heads, c // self.heads).transpose(1, 2) for layer in self.split)
        weights = torch.softmax(q @ k.transpose(2, 3), 3)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, c))

    def feed(self, x):
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x):
        if self.post:
            x = self.first(x)
            x = self.second(self.attend(x) + x)
            return self.feed(x) + x
        x = x + self.attend(self.first(x))
        return x + self.feed(self.second(x))


@settings(max_examples=8, deadline=None)
@given(post=st.booleans(), fused=st.booleans(), alpha=st.sampled_from([0.0, 0.5, 0.8, 1.0]), seed=st.integers(0, 10**6))
def test_exact_for_any_block(post, fused, alpha, seed):
    torch.manual_seed(seed)
    program, context = prepare(Encoder(post=post, fused=fused), (2, 5, 16), samples=2)
    stats = run(program, f"smooth-quant{{alpha={alpha}}}", context).certificate[0].stats  # the manager checks the effect
    assert (stats["layer_norms"], stats["linear_layers"]) == (2, 1)
    assert stats["doubled"] == (2 if post else 0) and stats["largest_factor"] > 1


def test_ranges_meet_in_the_middle():
    program, context = prepare(Encoder(), (2, 5, 16), samples=4)
    spread = []
    for text in ("canonicalize", "smooth-quant"):
        smoothed = run(program, text, context).program
        norm = next(n for n in smoothed.nodes if n.target is ops.LAYER_NORM)
        weight = smoothed.parameter(norm.args[2]).abs()
        spread.append(float(weight.max() / weight.median()))
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("post", [False, True])
def test_helps_where_activations_have_outlying_channels(post):
    torch.manual_seed(1)
    program, context = prepare(Encoder(post=post), (2, 5, 16), samples=4)
    text = "quantize{activation_observer=min-max}"
    plain = run(program, text, context).certificate[-1].sqnr_db
    smooth = run(program, f"smooth-quant,{text}", context).certificate[-1].sqnr_db
    assert smooth > plain + 2


class Chain(nn.Module):
    """Layers in a row; `between` is what stands between the second and the third."""

    def __init__(self, between) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(8, 4), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize(
    ("between", "sites"),
    [
        (nn.Identity(), 1),
        (nn.ReLU(), 1),
        (lambda y: y.flip(-1), 1),
        (nn.GELU(), 0),
        (nn.Softmax(-1), 0),
        (lambda y: y.reshape(8, 3).transpose(0, 1), 0),  # channels become positions
        (lambda y: y[:, :4].repeat(1, 2), 0),  # one channel in two places
        (lambda y: y + y.flip(-1), 0),
    ],
)
def test_sites_between_linear_layers(between, sites):
    program, context = prepare(Chain(between if isinstance(between, nn.Module) else Call(between)), (3, 6), samples=1)
    assert len(find_sites(program)) == sites
    assert run(program, "smooth-quant", context).certificate[0].modified == bool(sites)


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_value_that_others_read_is_left_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(y)

    assert find_sites(prepare(Both(), (3, 6), samples=1)[0]) == []


def test_a_shared_weight_is_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    assert find_sites(prepare(Tied(), (3, 6), samples=1)[0]) == []


@pytest.mark.parametrize("options", ["alpha=1.5", "alpha=-0.1", "samples=0"])
def test_options_out_of_range_are_refused(options):
    program, context = prepare(Encoder(), (2, 5, 16), samples=1)
    with pytest.raises(OptionError):
        run(program, f"smooth-quant{{{options}}}", context)
