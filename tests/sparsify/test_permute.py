"""Permuting channels keeps the network and lets a pattern keep more of it."""

import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.passes.sparsify.base import Level, keep_best
from graphwright.passes.sparsify.permute import _best, _swapped, find_sites, kept, permutation
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import BLOCK, Block, ConvNet, prepared, run


class Chain(torch.nn.Module):
    """Two readers of one value, convolutions, and a value that a sum also reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = torch.nn.Conv2d(16, 8, 3, padding=1), torch.nn.Conv2d(16, 8, 1)
        self.last = torch.nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.left(x) + self.right(x)
        return self.last(x)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 6),
    pattern=st.sampled_from(["2:4", "4:8", "1:2", "3:4", "1:4"]),
    rows=st.integers(1, 20),
)
def test_the_order_is_a_permutation_that_keeps_no_less(seed, groups, pattern, rows):
    level, generator = Level.parse(pattern, "test"), torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(rows, groups * level.group, generator=generator)
    order = permutation(magnitudes, level, 20, generator)
    assert torch.equal(order.sort().values, torch.arange(groups * level.group))
    assert kept(magnitudes[:, order], level) >= kept(magnitudes, level) - 1e-5


@pytest.mark.parametrize(("size", "count"), [(4, 2), (4, 3), (2, 1), (8, 4)])
def test_gains_of_swaps_are_exact(size, count):
    a, b = torch.rand(2, 3, size, 5, generator=torch.Generator().manual_seed(0))
    for out in range(size):
        found = _swapped(a, b, out, count)
        for other in range(size):
            swapped = a.clone()
            swapped[:, out] = b[:, other]
            torch.testing.assert_close(found[:, other], _best(swapped, count))


def test_alternating_magnitudes_are_found():
    """All large channels in every other group: the pattern keeps half of them, a permutation all."""
    magnitudes = torch.tensor([[1.0] * 4 + [0.01] * 4] * 3).repeat(1, 4)
    level = Level.parse("2:4", "test")
    order = permutation(magnitudes, level, 100, torch.Generator().manual_seed(0))
    assert kept(magnitudes[:, order], level) == pytest.approx(3 * 16, rel=1e-3)


@pytest.mark.parametrize(("model", "shape", "sites"), [(Block, BLOCK, 1), (Chain, (1, 3, 8, 8), 1), (ConvNet, (1, 3, 16, 16), 0)])
def test_the_network_computes_what_it_did_and_keeps_more(model, shape, sites):
    program, context = prepared(model, shape)
    assert len(list(find_sites(program))) == sites
    result = run(program, "permute-channels", context)  # the manager compares outputs: the pass is exact
    row = result.certificate[-1]
    assert row.stats["sites"] == sites and row.modified == (sites > 0)
    if sites:
        assert row.stats["kept_after"] > row.stats["kept_before"]
        assert not torch.equal(*(next(find_sites(p)).producer.weight for p in (program, result.program)))


def test_kept_is_what_magnitude_pruning_keeps():
    rows, level = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)), Level.parse("2:4", "test")
    assert kept(rows, level) == pytest.approx(float((rows * keep_best(rows[None], level)[0]).sum()))


@pytest.mark.parametrize("options", ['pattern="0.5"', 'pattern="4:2"', "rounds=0"])
def test_bad_options_are_refused(options):
    program, context = prepared(Block, BLOCK)
    with pytest.raises(OptionError):
        run(program, f"permute-channels{{{options}}}", context)
