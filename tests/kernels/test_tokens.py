"""Token ops: kernels bit-equal to the torch definitions, which are checked against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import tokens
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.tokens import mergeable
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, run

seeds = st.integers(0, 2**31)


def drawn(seed: int, *shape: int, ties: bool = False) -> np.ndarray:
    """Normal values; with `ties` few distinct ones, so that scores are equal often."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-1, 2, shape) if ties else rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 13),
    st.integers(1, 37),
    st.integers(0, 3),
    st.booleans(),
    seeds,
    st.data(),
)
def test_match_tokens(level, batch, heads, count, depth, protected, ties, seed, data):
    most = mergeable(count, protected)
    merged = data.draw(st.integers(0, most))
    keys = drawn(seed, batch, heads, count, depth, ties=ties)
    expected = gw.match_tokens(torch.from_numpy(keys), merged, protected).numpy()
    actual = run(tokens.match_tokens(batch, heads, count, depth, merged, protected), level, [keys], np.full_like(expected, -9))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 3), st.booleans(), seeds, st.data())
def test_keep_tokens(level, batch, count, protected, ties, seed, data):
    protected = min(protected, count)
    kept = data.draw(st.integers(max(protected, 1), count))
    score = drawn(seed, batch, count, ties=ties)
    expected = gw.keep_tokens(torch.from_numpy(score), kept, protected).numpy()
    actual = run(tokens.keep_tokens(batch, count, kept, protected), level, [score], np.full_like(expected, -9))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 14), st.integers(1, 40), st.integers(1, 14), seeds)
def test_sum_tokens(level, batch, count, width, kept, seed):
    x = drawn(seed, batch, count, width)
    place = np.random.default_rng(seed).integers(-1, kept, (batch, count)).astype(np.int32)
    expected = gw.sum_tokens(torch.from_numpy(x), torch.from_numpy(place), kept).numpy()
    actual = run(tokens.sum_tokens(batch, count, width, kept), level, [x, place], np.full_like(expected, 9.0))
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.integers(3, 9), st.integers(0, 2), seeds, st.data())
def test_the_definition_is_bipartite_matching(count, depth, protected, seed, data):
    merged = data.draw(st.integers(0, mergeable(count, protected)))
    keys = torch.from_numpy(drawn(seed, 1, 2, count, depth))
    unit = torch.nn.functional.normalize(keys.double().sum(1)[0], dim=-1)
    edges = []
    for a in range(0, count, 2):
        best = max(((float(unit[a] @ unit[b]), -b) for b in range(1, count, 2) if b >= protected), default=None)
        if a >= protected and best is not None:
            edges.append((best[0], -a, -best[1]))
    into = {-a: b for _, a, b in sorted(edges, reverse=True)[:merged]}
    stays = [t for t in range(count) if t not in into]
    expected = [stays.index(into.get(t, t)) for t in range(count)]
    assert gw.match_tokens(keys, merged, protected)[0].tolist() == expected
    assert len(stays) == count - merged


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(0, 2), seeds, st.data())
def test_the_definition_keeps_the_largest(count, protected, seed, data):
    protected = min(protected, count)
    kept = data.draw(st.integers(max(protected, 1), count))
    score = torch.from_numpy(drawn(seed, 1, count))
    rest = sorted(range(protected, count), key=lambda t: -float(score[0, t]))[: kept - protected]
    stays = sorted([*range(protected), *rest])
    assert gw.keep_tokens(score, kept, protected)[0].tolist() == [stays.index(t) if t in stays else -1 for t in range(count)]


def test_sums_can_be_differentiated_and_batched():
    x = torch.randn(2, 5, 3, requires_grad=True)
    place = torch.tensor([[0, 1, 1, -1, 0], [2, -1, 0, 1, 2]], dtype=torch.int32)
    gw.sum_tokens(x, place, 3).square().sum().backward()
    assert x.grad is not None and bool((x.grad[0, 3] == 0).all()) and bool((x.grad[0, 0] != 0).all())
    again = torch.func.vmap(lambda v, p: gw.sum_tokens(v[None], p[None], 3)[0])(x, place)
    assert torch.equal(again, gw.sum_tokens(x, place, 3))
    keys = torch.randn(3, 1, 2, 6, 4)
    assert torch.equal(
        torch.func.vmap(lambda k: gw.match_tokens(k, 2, 0))(keys), torch.stack([gw.match_tokens(k, 2, 0) for k in keys])
    )
