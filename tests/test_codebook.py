"""`gw::fake_codebook` and `gw::decode`: nearest entries, ties, gradients, packing."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.codebook import codes_of, nearest, pack, spread, unpack, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = settings(max_examples=25, deadline=None)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@EXAMPLES
@given(seed=st.integers(0, 2**31), entries=st.integers(2, 40), exact=st.booleans())
def test_nearest_is_the_entry_of_least_distance(seed, entries, exact):
    table = torch.unique(normal(seed, entries))
    x = normal(seed + 1, 300) * 2
    if exact:
        x[:entries] = table[torch.randint(len(table), (entries,), generator=torch.Generator().manual_seed(seed))]
    distance = (x.double()[:, None] - table.double()).abs()
    chosen = distance.gather(1, nearest(x, table)[:, None])[:, 0]
    assert torch.equal(chosen, distance.amin(1))


def test_a_tie_goes_to_the_even_place_from_zero():
    table = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0])
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 3.0, 6.0, -99.0, 99.0])
    assert table[nearest(x, table)].tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0, 8.0, -2.0, 8.0]


@EXAMPLES
@given(rows=st.integers(1, 9), count=st.integers(1, 50), group=st.integers(1, 60), zero=st.booleans(), seed=st.integers(0, 2**31))
def test_decoded_values_follow_the_definition(rows, count, group, zero, seed):
    group, rng = min(group, count), torch.Generator().manual_seed(seed)
    groups = -(-count // group)
    table = torch.arange(16.0) if zero else torch.unique(normal(seed, 16))
    scale = torch.rand(rows, groups, generator=rng) + 0.1
    zeros = torch.randint(0, 16, (rows, groups), generator=rng, dtype=torch.uint8) if zero else None
    codes = torch.randint(0, len(table), (rows, count), generator=rng, dtype=torch.uint8)
    got = gw.decode(pack(codes, 4), 4, [rows, count], table, scale, group, zeros)
    for r in range(rows):
        for c in range(count):
            entry = table[int(codes[r, c])] - (0.0 if zeros is None else float(zeros[r, c // group]))
            assert got[r, c] == entry * scale[r, c // group]


@EXAMPLES
@given(bits=st.integers(2, 8), rows=st.integers(1, 9), count=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_packing_round_trips(bits, rows, count, seed):
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_chosen_codes_stand_for_the_nearest():
    x, table, scale = normal(0, 4, 6), torch.arange(-3.0, 4.0), torch.full((4, 2), 0.5)
    codes = torch.full((4, 6), 5, dtype=torch.uint8)
    assert torch.equal(gw.fake_codebook(x, table, scale, 3, None, codes), torch.full((4, 6), 1.0))
    nearest_values = values_of(codes_of(x, table, scale, 3), table, scale, 3)
    assert torch.equal(gw.fake_codebook(x, table, scale, 3), nearest_values)


def test_the_gradient_passes_where_the_table_reaches():
    x = torch.tensor([[-9.0, -1.2, 0.3, 9.0]], requires_grad=True)
    gw.fake_codebook(x, torch.tensor([-1.0, 0.0, 2.0]), torch.full((1, 1), 2.0), 4).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_spread_gives_each_weight_its_group():
    grid = torch.tensor([[1, 2], [3, 4]])
    assert spread(grid, (2, 3, 1), 2).flatten().tolist() == [1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("packed", "bits", "scale", "entries", "why"),
    [((2, 5), 4, (2, 2), 15, "packed"), ((2, 4), 4, (2, 1), 15, "scale"), ((2, 4), 4, (2, 2), 17, "17 entries")],
)
def test_operands_that_do_not_fit_are_refused(packed, bits, scale, entries, why):
    with pytest.raises(ValueError, match=why):
        gw.decode(torch.zeros(packed, dtype=torch.uint8), bits, [2, 8], torch.zeros(entries), torch.ones(scale), 4)
