"""Element-wise, pooling and layout kernels against the gw ops, over shapes that fill vectors and shapes that do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from graphwright.backends.host import X86_FLAGS, host_arch, host_flags
from graphwright.backends.target import Target
from graphwright.backends.tvm.kernels import elementwise_int8, layout, lookup_int8, pooling_int8, quantize_image
from graphwright.backends.tvm.kernels.base import Tail, padded
from graphwright.backends.tvm.strided import Strided
from graphwright.backends.tvm.target import tvm_target
from graphwright.ir.dialect import gw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SHAPES = [(1,), (3, 5, 7), (2, 64), (2, 3, 3, 48)]
RANDOM = np.random.default_rng(3)
TARGET = tvm_target(Target.parse("cpu"))
few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def run(function: tvm.tirx.PrimFunc, *inputs: np.ndarray) -> np.ndarray:
    library = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=TARGET)
    out = function.params[-1]
    # Filled, so that an element the kernel leaves out shows.
    result = tvm.runtime.tensor(np.full([int(d) for d in out.shape], 99, str(out.dtype)))
    library["main"](*(tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs), result)
    return result.numpy()


def codes(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


def channels_last(x: np.ndarray, fill: int = 0) -> np.ndarray:
    """[N, C, H, W] -> [N, H, W, Cp]."""
    n, c, h, w = x.shape
    out = np.full((n, h, w, padded(c)), fill, x.dtype)
    out[..., :c] = x.transpose(0, 2, 3, 1)
    return out


def torch_of(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_dequantize_lookup(shape):
    x = (RANDOM.standard_normal(shape) * 3).astype(np.float32)
    expected = gw.quantize(torch_of(x), 0.03, 7, -128, 127, torch.int8).numpy()
    np.testing.assert_array_equal(run(elementwise_int8.quantize(shape, 0.03, 7, -128, 127, "int8"), x), expected)
    q = codes(shape)
    np.testing.assert_array_equal(
        run(elementwise_int8.dequantize(shape, "uint8", 0.03, 7), q), gw.dequantize(torch_of(q), 0.03, 7).numpy()
    )
    for dtype in ("uint8", "int8"):
        q, table = codes(shape, dtype), codes((256,), "int8")
        expected = gw.lookup(torch_of(q), torch_of(table)).numpy()
        np.testing.assert_array_equal(run(elementwise_int8.lookup(shape, dtype, "int8"), q, table), expected)


@pytest.mark.skipif(host_arch() != "x86" or not X86_FLAGS["avx512"] <= host_flags(), reason="this processor has no AVX-512 BW")
@pytest.mark.parametrize("shape", [(32,), (2, 37), (256,), (7,)])
@pytest.mark.parametrize("x_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("table_dtype", ["uint8", "int8"])
def test_vector_lookup(shape, x_dtype, table_dtype):
    x, table = codes(shape, x_dtype), codes((256,), table_dtype)
    if shape == (256,):
        x = np.arange(256, dtype=np.uint8).view(x_dtype)
    expected = gw.lookup(torch_of(x), torch_of(table)).numpy()
    np.testing.assert_array_equal(run(lookup_int8.lookup(shape, x_dtype, table_dtype, "avx512"), x, table), expected)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 6, 4, 4), (1, 16, 3, 33)])
@pytest.mark.parametrize(("dtype", "zero_point"), [("uint8", 118), ("int8", -3)])
def test_quantize_image(shape, dtype, zero_point):
    limits = (-128, 127) if dtype == "int8" else (0, 255)
    x = (RANDOM.standard_normal(shape) * 10).astype(np.float32)
    got = run(quantize_image.quantize_image(shape, quantize_image.Quantize(0.1, zero_point, *limits, dtype), "portable"), x)
    expected = gw.quantize(torch_of(x), 0.1, zero_point, *limits, getattr(torch, dtype)).numpy()
    np.testing.assert_array_equal(got[..., : shape[1]], channels_last(expected)[..., : shape[1]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [True, False])
def test_rescale_each_kind(shape, last):
    axis = len(shape) - 1 if last else 0
    acc = RANDOM.integers(-(1 << 24), 1 << 24, shape).astype(np.int32)
    scale = (RANDOM.random(shape[axis]) * 1e-5).astype(np.float32)
    multiplier = RANDOM.integers(-(1 << 31), (1 << 31) - 1, shape[axis]).astype(np.int32)
    shift = RANDOM.integers(30, 63, shape[axis]).astype(np.int32)
    a, s, m, h = (torch_of(v) for v in (acc, scale, multiplier, shift))
    cases = {
        Tail("rescale", "uint8", 3, 0, 255): ((scale,), gw.rescale(a, s, 3, 0, 255, torch.uint8, axis)),
        Tail("scale", "float32"): ((scale,), gw.scale(a, s, axis)),
        Tail("dyadic", "int8", -3, -128, 127): (
            (multiplier, shift),
            gw.rescale_dyadic(a, m, h, -3, -128, 127, torch.int8, axis),
        ),
    }
    for tail, (parameters, expected) in cases.items():
        got = run(elementwise_int8.rescale(shape, axis, tail), acc, *parameters)
        np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((2, 5, 5, 16), (2, 5, 5, 16)), ((2, 5, 5, 16), (2, 1, 1, 16)), ((3, 4), (4,)), ((2, 3, 7), (1, 3, 1)), ((4,), (2, 1))],
)
def test_add_and_multiply_broadcast(a_shape, b_shape):
    a, b = codes(a_shape), codes(b_shape, "int8")
    tail = Tail("none", "uint8", 4, 0, 200)
    function = elementwise_int8.add(a_shape, b_shape, "uint8", "int8", (1 << 21, -(1 << 21)), 21, (3, -5), tail)
    expected = gw.add(torch_of(a), torch_of(b), 1 << 21, -(1 << 21), 21, 3, -5, 4, 0, 200, torch.uint8)
    np.testing.assert_array_equal(run(function, a, b), expected.numpy())
    axis = len(expected.shape) - 1
    scale = (RANDOM.random(expected.shape[axis]) * 1e-2).astype(np.float32)
    tail = Tail("rescale", "uint8", 4, 0, 200)
    function = elementwise_int8.multiply(a_shape, b_shape, "uint8", "int8", (3, -5), axis, tail)
    product = gw.multiply(torch_of(a), torch_of(b), 3, -5)
    expected = gw.rescale(product, torch_of(scale), 4, 0, 200, torch.uint8, axis)
    np.testing.assert_array_equal(run(function, a, b, scale), expected.numpy())


@given(
    channels=st.sampled_from([1, 16, 21]),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(2, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padded_by=st.booleans(),
    ceil_mode=st.booleans(),
)
@few
def test_pools(channels, size, kernel, stride, padded_by, ceil_mode):
    padding = (kernel[0] // 2, kernel[1] // 2) if padded_by else (0, 0)
    x = codes((2, channels, *size), "int8")
    expected = gw.max_pool2d(torch_of(x), kernel, stride, padding, (1, 1), ceil_mode).numpy()
    pool = pooling_int8.Pool(2, channels, *size, kernel, stride, padding, (1, 1), *expected.shape[2:])
    got = run(pooling_int8.max_pool2d(pool, "int8"), channels_last(x, 77))
    np.testing.assert_array_equal(got[..., :channels], channels_last(expected)[..., :channels])
    if not ceil_mode:
        expected = gw.sum_pool2d(torch_of(x), kernel, stride, padding, 5).numpy()
        got = run(pooling_int8.sum_pool2d(pool, "int8", 5, Tail("none", "int32")), channels_last(x, 77))
        np.testing.assert_array_equal(got[..., :channels], channels_last(expected)[..., :channels])


@pytest.mark.parametrize("dims", [(1,), (3,), (0, 3), (0, 1, 2, 3)])
def test_dense_sum(dims):
    x = codes((3, 5, 7, 4), "int8")
    expected = gw.sum(torch_of(x), dims, True, 5).numpy()
    np.testing.assert_array_equal(run(pooling_int8.dense_sum(x.shape, dims, "int8", 5, 0, Tail("none", "int32")), x), expected)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 16, 4, 16), (1, 40, 3, 33)])
def test_layout_changes(shape):
    x, c = codes(shape, "int8"), shape[1]
    np.testing.assert_array_equal(run(layout.to_channels(shape, "int8"), x), channels_last(x))
    np.testing.assert_array_equal(run(layout.from_channels(shape, "int8"), channels_last(x, 77)), x)
    real = x.astype(np.float32) / 7
    got = run(layout.quantize_to_channels(shape, 0.1, 3, 0, 255, "uint8"), real)
    expected = channels_last(gw.quantize(torch_of(real), 0.1, 3, 0, 255, torch.uint8).numpy())
    np.testing.assert_array_equal(got[..., :c], expected[..., :c])
    rows = shape[0] * shape[2] * shape[3]
    packed = channels_last(x, 77).reshape(rows, -1)
    np.testing.assert_array_equal(run(layout.drop_lanes(rows, c, "int8"), packed), packed[:, :c])
    np.testing.assert_array_equal(run(layout.add_lanes(rows, c, "int8"), packed[:, :c])[:, :c], packed[:, :c])


@pytest.mark.parametrize("channels", [(16, 32), (3, 5, 20), (17,)])
def test_concatenate(channels):
    parts = [codes((2, c, 3, 5)) for c in channels]
    got = run(layout.concatenate_channels(30, channels, "uint8"), *(channels_last(p, 77).reshape(30, -1) for p in parts))
    np.testing.assert_array_equal(got.reshape(2, 3, 5, -1), channels_last(np.concatenate(parts, 1)))


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (5, 21), (8, 40), (3, 6)])
def test_slice_of_channels(start, stop):
    x = codes((2, 40, 3, 5))
    got = run(layout.slice_channels(30, 40, start, stop, "uint8"), channels_last(x, 77).reshape(30, -1))
    np.testing.assert_array_equal(got.reshape(2, 3, 5, -1), channels_last(x[:, start:stop]))


def test_pad():
    x = codes((2, 40, 3, 5))
    got = run(layout.pad_channels((2, 3, 5, 48), (1, 0), (2, 3), 9, "uint8"), channels_last(x))
    expected = np.pad(x, ((0, 0), (0, 0), (1, 2), (0, 3)), constant_values=9)
    np.testing.assert_array_equal(got[..., :40].transpose(0, 3, 1, 2), expected)


MOVES = ("permute", "slice", "select", "squeeze", "unsqueeze", "expand")


def apply_move(kind: str, choice: int, x: torch.Tensor, moved: Strided) -> tuple[torch.Tensor, Strided]:
    """One random movement, done by torch and composed on the map; a move that does not apply changes nothing."""
    rank = x.dim()
    dim = choice % max(rank, 1)
    if kind == "permute" and rank > 1:
        order = [*range(dim, rank), *range(dim)][::-1]
        return x.permute(order), moved.permute(order)
    if kind == "slice" and rank and x.shape[dim] > 1:
        return x.narrow(dim, 1, x.shape[dim] - 1).contiguous(), moved.slice(dim, 1, 1, x.shape[dim] - 1)
    if kind == "select" and rank > 1:
        return x.select(dim, x.shape[dim] - 1), moved.select(dim, x.shape[dim] - 1)
    if kind == "squeeze" and rank > 1 and x.shape[dim] == 1:
        return x.squeeze(dim), moved.squeeze([dim])
    if kind == "unsqueeze" and rank < 5:
        return x.unsqueeze(dim), moved.unsqueeze(dim)
    if kind == "expand" and rank < 5:
        shape = [2, *(3 if size == 1 else size for size in x.shape)]
        return x.expand(shape), moved.expand(shape)
    return x, moved


@given(moves=st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 4)), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_chains_of_moves_compose(moves):
    x = torch.arange(2 * 3 * 1 * 4).reshape(2, 3, 1, 4)
    expected, moved = x, Strided.whole(x.shape)
    for kind, choice in moves:
        expected, moved = apply_move(kind, choice, expected, moved)
    assert moved.shape == tuple(expected.shape)
    index = np.indices(moved.shape) if moved.shape else np.zeros((0,), int)
    at = tuple(start if axis is None else index[axis] * step + start for axis, start, step in moved.axes)
    got = np.broadcast_to(x.numpy()[at], moved.shape)
    np.testing.assert_array_equal(got, expected.numpy())
    if moved.moves_nothing:
        np.testing.assert_array_equal(x.numpy().reshape(-1), expected.numpy().reshape(-1))


def test_copy_strided():
    x = codes((3, 4, 16), "int8")
    turned = Strided.whole(x.shape).permute([2, 0, 1]).slice(0, 1, 3, 5)
    np.testing.assert_array_equal(run(layout.copy_strided(turned, "int8"), x), x.transpose(2, 0, 1)[1::3])
    rows = Strided.whole(x.shape).select(0, 2).expand((5, 4, 16))
    np.testing.assert_array_equal(run(layout.copy_strided(rows, "int8"), x), np.broadcast_to(x[2], (5, 4, 16)))
