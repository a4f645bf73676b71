import pytest
import torch
from graphwright.ir.errors import CalibrationError, UnknownNameError
from graphwright.passes.quantize.encoding import for_range, symmetric
from graphwright.passes.quantize.histogram import Histogram
from graphwright.passes.quantize.observers import (
    ACTIVATION_OBSERVERS,
    Grid,
    activation_observer,
    weight_min_max,
    weight_mse,
    weight_observer,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def seen(*values: torch.Tensor) -> Histogram:
    histogram = Histogram("test")
    for value in values:
        histogram.observe(value)
    return histogram


def error(x: torch.Tensor, bounds: tuple[float, float], grid: Grid) -> float:
    encoding = for_range(*bounds, grid.bits, grid.signed)
    return float((encoding.dequantize(encoding.quantize(x)) - x).square().mean())


def heavy_tailed(seed: int, count: int = 20000) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=g) * torch.exp(0.8 * torch.randn(count, generator=g))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), shift=st.floats(-5, 5))
def test_histogram_counts_everything_while_its_range_grows(seed, sizes, shift):
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randn(97, generator=g) * size + shift for size in sizes]
    batches[0][:10] = 0
    histogram = seen(*batches)
    everything = torch.cat(batches)
    assert float(histogram.counts.sum()) + histogram.zeros == everything.numel() == histogram.total
    assert bool((histogram.counts >= 0).all()) and histogram.zeros == 10
    assert histogram.min == float(everything.min()) and histogram.max == float(everything.max())
    nonzero = everything[everything != 0].to(torch.float64)
    edge = histogram.low + histogram.width * 1024
    assert abs(float(histogram.counts[:1024].sum()) - int((nonzero < edge).sum())) <= 2
    median = float(everything.quantile(0.5))
    assert abs(histogram.quantile(0.5) - median) <= 2 * histogram.width + 0.02 * max(sizes)


def test_histogram_of_nothing_but_zeros_and_of_constants():
    assert seen(torch.zeros(5)).quantile(0.9) == 0.0
    assert seen(torch.full((5,), 3.0)).max == 3.0


def test_values_that_are_not_finite_name_the_node():
    with pytest.raises(CalibrationError, match="'conv1'"):
        Histogram("'conv1'").observe(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("name", sorted(ACTIVATION_OBSERVERS))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("value", [torch.zeros(64), torch.rand(500) + 1, -torch.rand(500), torch.tensor([2.0])])
def test_every_observer_gives_a_range_inside_what_was_seen(name, signed, value):
    low, high = activation_observer(name)(seen(value), Grid(signed=signed))
    largest = float(value.abs().max())
    assert -largest * 1.01 <= low <= high <= largest * 1.01


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), signed=st.booleans(), bits=st.sampled_from([4, 8]))
def test_mse_beats_min_max_on_heavy_tails(seed, signed, bits):
    x, grid = heavy_tailed(seed), Grid(bits, signed)
    histogram = seen(x)
    full = error(x, ACTIVATION_OBSERVERS["min-max"](histogram, grid), grid)
    best = error(x, ACTIVATION_OBSERVERS["mse"](histogram, grid), grid)
    assert best < full * (0.8 if bits == 4 else 1.0)


def test_mse_keeps_the_whole_range_of_a_uniform_value():
    low, high = ACTIVATION_OBSERVERS["mse"](seen(torch.rand(50000) * 4 - 1), Grid())
    assert low < -0.97 and high > 2.97


def test_mse_ignores_how_many_zeros_relu_made():
    x = torch.rand(20000) * 2
    dense, sparse = seen(x), seen(torch.cat([x, torch.zeros(500_000)]))
    assert ACTIVATION_OBSERVERS["mse"](dense, Grid()) == ACTIVATION_OBSERVERS["mse"](sparse, Grid())


def test_percentile_cuts_both_tails_and_one_where_nothing_is_negative():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    low, high = ACTIVATION_OBSERVERS["percentile"](seen(x), Grid(percentile=99.0))
    assert low == pytest.approx(float(x.quantile(0.005)), abs=0.02)
    assert high == pytest.approx(float(x.quantile(0.995)), abs=0.02)
    low, high = ACTIVATION_OBSERVERS["percentile"](seen(x.abs()), Grid(percentile=99.0))
    assert low == pytest.approx(0.0, abs=1e-3) and high == pytest.approx(float(x.abs().quantile(0.99)), abs=0.02)


def test_kl_clips_outliers_and_keeps_a_plain_range():
    g = torch.Generator().manual_seed(1)
    body = torch.randn(100_000, generator=g).abs()
    low, high = ACTIVATION_OBSERVERS["kl"](seen(torch.cat([body, torch.tensor([100.0])])), Grid())
    assert low >= 0 and high < 30
    low, high = ACTIVATION_OBSERVERS["kl"](seen(torch.rand(100_000, generator=g)), Grid())
    assert high > 0.95


@pytest.mark.parametrize(("find", "near"), [(activation_observer, "percentile"), (weight_observer, "min-max")])
def test_unknown_observers_name_the_nearest(find, near):
    with pytest.raises(UnknownNameError, match=f"did you mean '{near}'"):
        find(near[:-1])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(3, 8))
def test_weight_mse_never_loses_to_min_max(seed, bits):
    weight = heavy_tailed(seed, 4 * 60).reshape(4, 60)

    def loss(largest):
        encoding = symmetric(largest, bits, axis=0)
        return (encoding.dequantize(encoding.quantize(weight)) - weight).square().sum(1)

    assert bool((loss(weight_mse(weight, bits)) <= loss(weight_min_max(weight, bits)) * 1.0001).all())
