"""The gw ops against straightforward integer and rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.exact import exp_reference, lane_sum
from graphwright.ir.dialect.integer import accumulator_bound
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.uint8, torch.int8])


def random_codes(generator, shape, dtype):
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(dtype)


def convolution_by_loops(x, weight, stride, padding, dilation, groups, zero_point):
    """Direct 2-D convolution of (x - zero_point) in int64; positions outside the image count as zero."""
    x, weight = x.astype(np.int64) - zero_point, weight.astype(np.int64)
    x = np.pad(x, [(0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2])
    filters, per_group, kernel_h, kernel_w = weight.shape
    height = (x.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    out = np.zeros((x.shape[0], filters, height, width), np.int64)
    for f in range(filters):
        first = f // (filters // groups) * per_group
        for i in range(height):
            for j in range(width):
                rows = slice(i * stride[0], i * stride[0] + dilation[0] * (kernel_h - 1) + 1, dilation[0])
                columns = slice(j * stride[1], j * stride[1] + dilation[1] * (kernel_w - 1) + 1, dilation[1])
                out[:, f, i, j] = (x[:, first : first + per_group, rows, columns] * weight[f]).sum((1, 2, 3))
    return out


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    dtype=DTYPES,
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.sampled_from([1, 2, 6]),
)
def test_convolution(seed, dtype, size, kernel, stride, padding, groups):
    g = torch.Generator().manual_seed(seed)
    zero = int(random_codes(g, (1,), dtype))
    x = random_codes(g, (2, 6, *size), dtype)
    weight = random_codes(g, (12, 6 // groups, *kernel), torch.int8)
    bias = torch.randint(-(2**20), 2**20, (12,), generator=g, dtype=torch.int32)
    got = gw.convolution(x, weight, bias, stride, padding, (1, 1), groups, zero)
    expected = convolution_by_loops(x.numpy(), weight.numpy(), stride, padding, (1, 1), groups, zero)
    assert got.dtype == torch.int32
    assert np.array_equal(got.numpy(), expected + bias.numpy()[:, None, None])


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, dtype=DTYPES, rows=st.integers(1, 7), inner=st.integers(1, 700), columns=st.integers(1, 9))
def test_linear_and_matmul(seed, dtype, rows, inner, columns):
    g = torch.Generator().manual_seed(seed)
    zero = int(random_codes(g, (1,), dtype))
    x, weight = random_codes(g, (2, rows, inner), dtype), random_codes(g, (columns, inner), torch.int8)
    expected = (x.to(torch.int64) - zero) @ weight.to(torch.int64).T
    assert torch.equal(gw.linear(x, weight, None, zero).to(torch.int64), expected)
    y = random_codes(g, (2, inner, columns), torch.int8)
    expected = (x.to(torch.int64) - zero) @ (y.to(torch.int64) - 3)
    assert torch.equal(gw.matmul(x, y, zero, 3).to(torch.int64), expected)


def test_sums_beyond_float32_stay_exact():
    x = torch.full((1, 4099), 255, dtype=torch.uint8)
    weight = torch.full((1, 4099), 127, dtype=torch.int8)
    weight[0, ::2] = 126
    expected = int((x.to(torch.int64) * weight.to(torch.int64)).sum())
    assert expected % 2 == 1 and expected > 2**26, "a float32 sum would lose the last bit"
    assert int(gw.linear(x, weight, None, 0)) == expected


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, dtype=DTYPES, channels=st.integers(1, 5))
def test_accumulator_bound_holds_and_is_reached(seed, dtype, channels):
    g = torch.Generator().manual_seed(seed)
    weight, zero = random_codes(g, (channels, 11), torch.int8), int(random_codes(g, (1,), dtype))
    bound = accumulator_bound(weight, None, dtype, zero)
    info = torch.iinfo(dtype)
    extreme = info.max if info.max - zero >= zero - info.min else info.min
    worst = weight.to(torch.int64).abs().sum(1).max() * abs(extreme - zero)
    assert bound == int(worst)
    x = random_codes(g, (64, 11), dtype)
    assert int(gw.linear(x, weight, None, zero).abs().max()) <= bound


@settings(max_examples=100, deadline=None)
@given(
    acc=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3),
    multiplier=st.integers(2**30, 2**31 - 1),
    shift=st.integers(1, 62),
    zero=st.integers(0, 255),
)
def test_dyadic_rescale_is_rational_arithmetic_rounded_half_up(acc, multiplier, shift, zero):
    got = gw.rescale_dyadic(
        torch.tensor(acc, dtype=torch.int32), torch.tensor([multiplier], dtype=torch.int32),
        torch.tensor([shift], dtype=torch.int32), zero, 0, 255, torch.uint8, 0,
    )  # fmt: skip
    for value, code in zip(acc, got.tolist(), strict=True):
        real = Fraction(value * multiplier, 1 << shift)
        rounded = (real + Fraction(1, 2)).__floor__()
        assert code == min(max(rounded + zero, 0), 255)


def test_dyadic_rescale_per_channel_follows_the_axis():
    acc = torch.full((1, 2, 2), 1000, dtype=torch.int32)
    multiplier = torch.tensor([2**30, 2**30], dtype=torch.int32)
    shift = torch.tensor([34, 36], dtype=torch.int32)
    got = gw.rescale_dyadic(acc, multiplier, shift, 0, 0, 255, torch.uint8, 1)
    assert got.tolist() == [[[63, 63], [16, 16]]]  # 62.5 and 15.625, halves upwards


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, zero=st.integers(-128, 127))
def test_float_rescale_rounds_half_to_even_and_saturates(seed, zero):
    g = torch.Generator().manual_seed(seed)
    acc = torch.randint(-(2**24), 2**24, (5, 3), generator=g, dtype=torch.int32)
    scale = torch.tensor([2.0**-16, 2.0**-17, 2.0**-18])
    got = gw.rescale(acc, scale, zero, -128, 127, torch.int8, 1)
    for i in range(5):
        for j in range(3):
            real = Fraction(int(acc[i, j])) * Fraction(float(scale[j]))
            assert int(got[i, j]) == min(max(round(real) + zero, -128), 127)


def test_float_rescale_ties():
    acc = torch.tensor([1, 3, 5, -1, -3], dtype=torch.int32)
    assert gw.rescale(acc, torch.tensor([0.5]), 10, 0, 255, torch.uint8, 0).tolist() == [10, 12, 12, 10, 8]


@settings(max_examples=50, deadline=None)
@given(
    a=st.integers(0, 255), b=st.integers(-128, 127), ma=st.integers(-(2**21), 2**21), mb=st.integers(-(2**21), 2**21),
    shift=st.integers(1, 30), za=st.integers(0, 255), zb=st.integers(-128, 127),
)  # fmt: skip
def test_add_never_leaves_s32(a, b, ma, mb, shift, za, zb):
    got = gw.add(
        torch.tensor([a], dtype=torch.uint8), torch.tensor([b], dtype=torch.int8), ma, mb, shift, za, zb, 7, 0, 255, torch.uint8
    )
    total = (a - za) * ma + (b - zb) * mb + (1 << (shift - 1))
    assert abs(total) < 2**31
    assert int(got) == min(max((total >> shift) + 7, 0), 255)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, dtype=DTYPES)
def test_multiply_lookup_and_sums(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    a, b = random_codes(g, (2, 3, 5, 7), dtype), random_codes(g, (2, 3, 1, 1), torch.uint8)
    assert torch.equal(gw.multiply(a, b, 9, 200).to(torch.int64), (a.to(torch.int64) - 9) * (b.to(torch.int64) - 200))
    table = random_codes(g, (256,), torch.uint8)
    assert torch.equal(gw.lookup(a, table), table[a.to(torch.int64) - torch.iinfo(dtype).min])
    assert torch.equal(gw.sum(a, [2, 3], True, 9).to(torch.int64), (a.to(torch.int64) - 9).sum((2, 3), True))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, dtype=DTYPES, height=st.integers(3, 8), width=st.integers(3, 8), padding=st.integers(0, 1))
def test_pools(seed, dtype, height, width, padding):
    g = torch.Generator().manual_seed(seed)
    x = random_codes(g, (1, 2, height, width), dtype)
    inner = x.to(torch.int64).numpy()
    for stride in (1, 2):
        rows, columns = (range(0, n + 2 * padding - 2, stride) for n in (height, width))
        windows = [
            [inner[:, :, max(i - padding, 0) : i - padding + 3, max(j - padding, 0) : j - padding + 3] for j in columns]
            for i in rows
        ]
        largest = np.array([[w.max((2, 3)) for w in row] for row in windows]).transpose(2, 3, 0, 1)
        total = np.array([[(w - 5).sum((2, 3)) for w in row] for row in windows]).transpose(2, 3, 0, 1)
        arguments = [3, 3], [stride, stride], [padding, padding]
        assert np.array_equal(gw.max_pool2d(x, *arguments, [1, 1], False).numpy().astype(np.int64), largest)
        assert np.array_equal(gw.sum_pool2d(x, *arguments, 5).numpy().astype(np.int64), total)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, scale=st.floats(1e-4, 10), zero=st.integers(0, 255), size=st.floats(1e-3, 1e4))
def test_quantize_agrees_with_fake_quantize(seed, scale, zero, size):
    x = torch.randn(33, generator=torch.Generator().manual_seed(seed)) * size
    step = torch.tensor([scale], dtype=torch.float32)
    codes = gw.quantize(x, float(step), zero, 0, 255, torch.uint8)
    fake = gw.fake_quantize(x, step, torch.tensor([zero], dtype=torch.int32), 0, 255)
    assert torch.equal(gw.dequantize(codes, float(step), zero), fake)


def test_fake_quantize_gradient_is_cut_where_it_saturates():
    x = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
    gw.fake_quantize(x, torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32), -10, 10).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 0.0]


def test_exp_reference_is_within_two_units_in_the_last_place():
    x = -torch.rand(20000, generator=torch.Generator().manual_seed(0)) * 64
    exact = torch.exp(x.to(torch.float64))
    error = ((exp_reference(x).to(torch.float64) - exact) / exact).abs().max()
    assert float(error) < 2e-7


@pytest.mark.parametrize("keys", [2, 128, 4096])
def test_softmax_of_masked_keys_stays_clear_of_denormal_numbers(keys):
    x = torch.randn(3, keys, generator=torch.Generator().manual_seed(0))
    x[:, 1 + keys // 3 :] = torch.finfo(torch.float32).min
    smallest = float(gw.softmax(x).min())
    assert torch.finfo(torch.float32).tiny * 1e6 < smallest < 1e-25


def test_square_root_is_rounded_correctly():
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(3)) * 4
    root = gw.square_root(x).to(torch.float64)
    step = torch.nextafter(gw.square_root(x), torch.tensor(torch.inf)).to(torch.float64) - root
    assert bool(((root - x.to(torch.float64).sqrt()).abs() <= step / 2).all())


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 70), size=st.floats(0.01, 50))
def test_exact_reductions_are_close_to_float64(seed, length, size):
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(seed)) * size
    wide = x.to(torch.float64)
    magnitude = wide.abs().sum(-1, keepdim=True)
    assert bool(((lane_sum(x).to(torch.float64) - wide.sum(-1, keepdim=True)).abs() <= 1e-6 * magnitude).all())
    assert torch.equal(gw.reduce_sum(x, 1, False), lane_sum(x)[:, 0])
    assert float((gw.softmax(x).to(torch.float64) - wide.softmax(-1)).abs().max()) < 1e-6
    weight, bias = torch.rand(length), torch.rand(length)
    got = gw.layer_norm(x, weight, bias, 1e-3)
    expected = torch.nn.functional.layer_norm(wide, (length,), weight.to(torch.float64), bias.to(torch.float64), 1e-3)
    assert float((got.to(torch.float64) - expected).abs().max()) < 1e-3 * max(1.0, size / 10)


@pytest.mark.parametrize("x", [torch.zeros(2, 9), torch.full((2, 9), -1e30)])
def test_softmax_of_equal_scores_is_uniform(x):
    assert torch.allclose(gw.softmax(x), torch.full((2, 9), 1 / 9), atol=1e-7)


def test_fake_quantize_runs_over_samples_with_gradients():
    """`torch.func.vmap` gives the values and gradients of one sample after the other, for one scale and for one a channel."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(5, 2, 3, generator=generator).requires_grad_()
    for scale, axis in ((torch.tensor([0.3]), None), (torch.tensor([0.1, 0.4]), 0), (torch.tensor([0.1, 0.4, 0.2]), 1)):
        zero = torch.zeros_like(scale, dtype=torch.int32)

        def one(x, scale=scale, zero=zero, axis=axis):
            return torch.ops.gw.fake_quantize(x, scale, zero, -3, 3, axis)

        expected = torch.stack([one(x) for x in samples])
        actual = torch.func.vmap(one)(samples)
        assert torch.equal(actual, expected)
        gradients = [torch.autograd.grad(y.square().sum(), samples)[0] for y in (actual, expected)]
        assert torch.equal(*gradients)
        assert bool((gradients[0] == 0).any()) and bool((gradients[0] != 0).any())
