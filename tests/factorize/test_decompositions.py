"""At full rank every decomposition is the layer; below it, what it says of its error and size is what its parts do."""

from __future__ import annotations

import pytest
import torch
from factorize_models import largest_difference, one_layer
from graphwright.passes.factorize.base import replace
from graphwright.passes.factorize.decomposition import parse_rank, rank_text
from graphwright.passes.factorize.matrix import Matrix, Metric
from graphwright.passes.factorize.spatial import Spatial
from graphwright.passes.factorize.tucker import Tucker
from graphwright.search.cost.bops import products
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

KINDS = {"matrix": Matrix, "spatial": Spatial, "tucker": Tucker}


@st.composite
def convolutions(draw):
    """A convolution of any geometry, and its input's shape."""
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = draw(st.tuples(st.integers(2, 4), st.integers(2, 4)))
    stride, padding, dilation = (draw(st.tuples(st.integers(a, 2), st.integers(a, 2))) for a in (1, 0, 1))
    module = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=draw(st.booleans()))
    return module, (2, inputs, draw(st.integers(8, 10)), draw(st.integers(8, 10)))


def applied(decomposition, program, layer, rank):
    """The program with the layer replaced at a rank."""
    changed = program.clone()
    node = next(n for n in changed.nodes if n.name == layer.node.name)
    mirrored = type(layer)(node, *(getattr(layer, f) for f in list(layer.__dataclass_fields__)[1:]))
    replace(changed, mirrored, decomposition.parts(rank))
    changed.sweep()
    return changed


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(convolutions())
def test_full_rank_is_the_layer_itself(kind, drawn):
    module, shape = drawn
    program, layer = one_layer(module, shape)
    found = KINDS[kind](layer)
    assert found.error(found.full) == pytest.approx(0, abs=1e-9)
    assert largest_difference(program, applied(found, program, layer, found.full), shape) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(convolutions(), st.data())
def test_sizes_and_error_are_those_of_the_parts(kind, drawn, data):
    module, shape = drawn
    program, layer = one_layer(module, shape)
    found = KINDS[kind](layer)
    rank = tuple(data.draw(st.integers(1, most)) for most in found.full)
    taps = layer.weight[0, 0].numel()
    assume(kind != "tucker" or (rank[0] <= rank[1] * taps and rank[1] <= rank[0] * taps))  # no core has other ranks
    changed = applied(found, program, layer, rank)
    assert sum(w.weights for w in products(changed)) == found.parameters(rank)
    assert sum(w.macs for w in products(changed)) == found.macs(rank) * shape[0]
    # The error of the weights is read off the outputs: an input of single ones shows every weight.
    value = torch.eye(layer.weight[0].numel()).reshape(-1, *layer.weight.shape[1:]).double()
    for part in found.parts(rank):
        value = torch.nn.functional.conv2d(value, part.weight)
    dense = value.flatten(1).T
    lost = (dense - layer.weight.double().flatten(1)).square().sum() / layer.weight.double().square().sum()
    assert float(lost) <= found.error(rank) + 1e-7  # Tucker's is an upper bound
    if kind != "tucker":
        assert float(lost) == pytest.approx(found.error(rank), abs=1e-7)


@settings(max_examples=5)
@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_linear_layers_at_full_rank_in_any_metric(inputs, outputs, bias, seed):
    program, layer = one_layer(nn.Linear(inputs, outputs, bias=bias), (3, 4, inputs), seed)
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    root, mean = torch.randn(inputs, inputs, **draw), torch.randn(inputs, **draw)
    weight = layer.weight.double()
    metrics = [
        Metric(),
        Metric(rows=torch.rand(outputs, **draw) + 0.1, columns=torch.rand(inputs, **draw) + 0.1),
        Metric(columns=torch.linalg.cholesky(root @ root.T + torch.eye(inputs)), means=(mean, mean @ weight.T + layer.bias64())),
    ]
    for metric in metrics:
        found = Matrix(layer, metric)
        assert found.full == (min(inputs, outputs),)
        assert largest_difference(program, applied(found, program, layer, found.full), (3, 4, inputs)) < 1e-4


@settings(max_examples=5)
@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 99), st.data())
def test_a_metric_is_what_its_factorization_minimizes(inputs, outputs, seed, data):
    _, layer = one_layer(nn.Linear(inputs, outputs), (3, inputs), seed)
    draw = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    rows, root = torch.rand(outputs, **draw) + 0.1, torch.randn(inputs, 2 * inputs, **draw)
    columns = torch.linalg.cholesky(root @ root.T)

    def loss(weight):
        return float((rows[:, None] * (weight - layer.weight.double()) @ columns).square().sum())

    found = Matrix(layer, Metric(rows, columns))
    rank = (data.draw(st.integers(1, found.full[0])),)
    ours = loss(found.dense(rank)[0])
    assert ours == pytest.approx(found.error(rank) * found.energy, rel=1e-6, abs=1e-8)
    for other in (Matrix(layer), Matrix(layer, Metric(rows)), Matrix(layer, Metric(None, columns))):
        assert ours <= loss(other.dense(rank)[0]) * (1 + 1e-6) + 1e-9


def test_path_of_tucker_ranks_falls_in_size_and_never_merges_back():
    _, layer = one_layer(nn.Conv2d(24, 32, 3, padding=1), (1, 24, 8, 8))
    found = Tucker(layer)
    ranks = found.ranks(8)
    assert ranks[-1] == found.full == (32, 24)
    sizes = [found.parameters(rank) for rank in ranks]
    assert sizes == sorted(sizes) and len(ranks) > 3
    errors = [found.error(rank) for rank in ranks]
    assert errors == sorted(errors, reverse=True)
    assert all(found.saves(rank) for rank in ranks[:-1])
    assert (32, 16) in ranks or (24, 24) in ranks  # one side whole: two layers


def test_text_of_ranks():
    for rank in ((7,), (32, 16)):
        assert parse_rank(rank_text(rank)) == rank
    assert parse_rank("full") is None and parse_rank("3.5") is None and parse_rank("-4") is None
