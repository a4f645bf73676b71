"""Half-precision kernels of the float families against float64: the float32 bound and one rounding, on odd sizes.

Convolutions have theirs in `test_convolution_f32`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from graphwright.backends.tvm.kernels import linear_f32, matmul_f32, pooling_f32
from graphwright.backends.tvm.kernels.activation_f32 import activation as map_values
from graphwright.backends.tvm.kernels.attention_f32 import Attention, Rows, attention
from graphwright.backends.tvm.kernels.base import Convolution, padded
from graphwright.backends.tvm.kernels.float_base import NO_ACTIVATION, Activation, FloatSpec, MatrixProduct
from graphwright.backends.tvm.kernels.half import NATIVE, NUMPY
from graphwright.backends.tvm.kernels.layer_norm_f32 import layer_norm
from graphwright.backends.tvm.kernels.softmax_f32 import softmax
from graphwright.backends.tvm.pipeline import flatten
from graphwright.backends.tvm.tasks import split_tasks
from graphwright.ir.errors import OptionError, UnknownNameError
from hypothesis import given, settings
from hypothesis import strategies as st

from .float_cases import ACTIVATIONS, BF16, HALF_FORMS, ROUNDOFF, activated, assembly, assert_close, normal, run, to_physical

EXAMPLES = settings(max_examples=4, deadline=None)
FORMS = [form for form in HALF_FORMS if not getattr(form, "values", form)[2]]
SEEDS = st.integers(0, 2**31)


def half(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(NUMPY[dtype])


def assert_rounded(y: np.ndarray, exact: np.ndarray, limit: np.ndarray | float, dtype: str) -> None:
    relative, absolute = ROUNDOFF[dtype]
    error = np.abs(y.astype(np.float64) - exact)
    assert (error <= limit * (1 + relative) + relative * np.abs(exact) + absolute).all(), f"error {error.max():.3g}"


@pytest.mark.parametrize(("dtype", "level", "dot"), HALF_FORMS)
@EXAMPLES
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 80), st.integers(1, 150)),
    activation=ACTIVATIONS,
    residual=st.booleans(),
    seed=SEEDS,
)
def test_linear(dtype, level, dot, sizes, activation, residual, seed):
    rng, (rows, inputs, outputs) = np.random.default_rng(seed), sizes
    x, w = normal(rng, rows, inputs, dtype=dtype), normal(rng, outputs, inputs, dtype=dtype)
    bias, added = normal(rng, outputs), normal(rng, rows, outputs, dtype=dtype) * np.float32(residual)
    function = linear_f32.linear(MatrixProduct(*sizes), FloatSpec(activation, residual, level, dtype=dtype, dot=dot))
    weight = linear_f32.pack_weight(w, dtype)
    operands = (half(x, dtype), *([half(added, dtype)] if residual else []), weight, linear_f32.pack_bias(outputs, bias))
    y = run(function, level, operands, (rows, outputs), dtype)
    wide = x.astype(np.float64) @ w.T.astype(np.float64) + bias + added
    magnitude = np.abs(x) @ np.abs(w).T + np.abs(bias) + np.abs(added)
    assert_close(y, activated(activation, wide), magnitude, inputs + 1, activation, dtype)


@pytest.mark.parametrize(("dtype", "level", "dot"), FORMS)
def test_a_long_sum_is_read_in_chunks(dtype, level, dot):
    rng, (rows, inputs, outputs) = np.random.default_rng(7), (17, 3001, 33)
    x, w = normal(rng, rows, inputs, dtype=dtype), normal(rng, outputs, inputs, dtype=dtype)
    function = linear_f32.linear(MatrixProduct(rows, inputs, outputs), FloatSpec(level=level, dtype=dtype, dot=dot))
    operands = (half(x, dtype), linear_f32.pack_weight(w, dtype), linear_f32.pack_bias(outputs, None))
    y = run(function, level, operands, (rows, outputs), dtype)
    assert_close(y, x.astype(np.float64) @ w.T.astype(np.float64), np.abs(x) @ np.abs(w).T, inputs, NO_ACTIVATION, dtype)


@pytest.mark.parametrize(("dtype", "level", "dot"), HALF_FORMS)
@EXAMPLES
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(1, 6), st.booleans()),
    residual=st.booleans(),
    seed=SEEDS,
)
def test_matmul(dtype, level, dot, sizes, residual, seed):
    rng, (rows, inner, columns, batch, transposed) = np.random.default_rng(seed), sizes
    a, b = normal(rng, batch, rows, inner, dtype=dtype), normal(rng, batch, inner, columns, dtype=dtype)
    added = normal(rng, batch, rows, columns, dtype=dtype) * np.float32(residual)
    right = np.swapaxes(b, -1, -2) if transposed else b
    function = matmul_f32.matmul(MatrixProduct(*sizes), FloatSpec(residual=residual, level=level, dtype=dtype, dot=dot))
    operands = [half(v, dtype) for v in (a, *([added] if residual else []), right)]
    y = run(function, level, operands, (batch, rows, columns), dtype)
    exact = a.astype(np.float64) @ b.astype(np.float64) + added
    assert_close(y, exact, np.abs(a) @ np.abs(b) + np.abs(added), inner + 1, NO_ACTIVATION, dtype)


@pytest.mark.parametrize(("dtype", "level", "dot"), FORMS)
@EXAMPLES
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 3, 40, 70, 40, 70))),
    masked=st.booleans(),
    merged=st.booleans(),
    seed=SEEDS,
)
def test_attention(dtype, level, dot, sizes, masked, merged, seed):
    rng, (batch, heads, queries, keys, width, value_width) = np.random.default_rng(seed), sizes
    shapes = [(batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, value_width)]
    q, k, v = (normal(rng, *shape, dtype=dtype) for shape in shapes)
    hidden = np.where(rng.random((keys,)) < 0.3, -10000.0, 0.0).astype(np.float32) * np.float32(masked)
    scale = 1 / np.sqrt(width)
    places = [Rows(int(np.prod(s)), 0, s[1] * s[2] * s[3], s[2] * s[3], s[3]) for s in shapes]
    mask = Rows(keys, 0, 0, 0, 0) if masked else None
    fields: Any = (*sizes, scale, *places, mask, merged, dtype)
    shape = Attention(*fields)
    operands = [half(value.reshape(-1), dtype) for value in (q, k, v, *([hidden] if masked else []))]
    y = run(attention(shape, level), level, operands, shape.out, dtype)
    added = half(hidden, dtype).astype(np.float64)
    scores = scale * q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) + added
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    exact = p @ v
    y = y.swapaxes(1, 2) if merged else y
    spread = 1e-5 * (1 + np.abs(added).max()) * (p @ np.abs(v)) + 1e-27
    assert_rounded(y, exact, spread, dtype)


@pytest.mark.parametrize(("dtype", "level", "dot"), FORMS)
@EXAMPLES
@given(rows=st.integers(1, 9), length=st.one_of(st.integers(1, 70), st.sampled_from([197, 1000])), seed=SEEDS)
def test_rows(dtype, level, dot, rows, length, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = normal(rng, rows, length, dtype=dtype), normal(rng, length), normal(rng, length)
    wide = x.astype(np.float64)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    y = run(softmax(rows, length, dtype, level), level, [half(x, dtype)], x.shape, dtype)
    assert_rounded(y, e / e.sum(-1, keepdims=True), 1e-5, dtype)
    y = run(layer_norm(rows, length, 1e-5, dtype, level), level, [half(x, dtype), weight, bias], x.shape, dtype)
    deviation = np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    exact = (wide - wide.mean(-1, keepdims=True)) / deviation * weight + bias
    assert_rounded(y, exact, 1e-5 * (1 + np.abs(exact) + np.abs(wide).max(-1, keepdims=True) / deviation * np.abs(weight)), dtype)


@pytest.mark.parametrize(("dtype", "level", "dot"), FORMS)
@EXAMPLES
@given(size=st.integers(1, 300), seed=SEEDS)
def test_casts_and_activations(dtype, level, dot, size, seed):
    x = (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)
    y = run(map_values(size, NO_ACTIVATION, ("float32", dtype), level), level, [x], (size,), dtype)
    assert (y == half(x, dtype)).all()  # to nearest even, as numpy and torch round
    back = run(map_values(size, NO_ACTIVATION, (dtype, "float32"), level), level, [y], (size,))
    assert (back == y.astype(np.float32)).all()
    gelu = Activation(function="gelu")
    z = run(map_values(size, gelu, (dtype, dtype), level), level, [y], (size,), dtype)
    assert_rounded(z, activated(gelu, y.astype(np.float64)), 2e-6, dtype)


@pytest.mark.parametrize(("dtype", "level", "dot"), FORMS)
def test_ties_round_to_even(dtype, level, dot):
    step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    x = np.array([1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, 0.0, -0.0, 2.0, np.inf, -np.inf], np.float32)
    y = run(map_values(x.size, NO_ACTIVATION, ("float32", dtype), level), level, [x], x.shape, dtype)
    assert y.tobytes() == half(np.array([1, 1 + 2 * step, -1, 0.0, -0.0, 2.0, np.inf, -np.inf]), dtype).tobytes()


@pytest.mark.parametrize(("dtype", "level", "dot"), FORMS)
def test_pools(dtype, level, dot):
    rng = np.random.default_rng(5)
    shape = Convolution(1, 19, 7, 9, 19, (3, 2), (2, 2), (1, 1), groups=19)
    x = normal(rng, 1, 19, 7, 9, dtype=dtype)
    out = (1, shape.out_height, shape.out_width, padded(19))
    physical = half(np.clip(to_physical(x, rng), -1e4, 1e4), dtype)
    wide = torch.from_numpy(x).double()
    largest = run(pooling_f32.max_pool(shape, level, dtype), level, [physical], out, dtype)
    expected = F.max_pool2d(wide, (3, 2), (2, 2), (1, 1)).numpy()
    assert (largest.transpose(0, 3, 1, 2)[:, :19].astype(np.float64) == expected).all()
    mean = run(pooling_f32.mean_pool(shape, level, dtype), level, [physical], out, dtype)
    assert_rounded(mean.transpose(0, 3, 1, 2)[:, :19], F.avg_pool2d(wide, (3, 2), (2, 2), (1, 1)).numpy(), 1e-5, dtype)


def test_a_parallel_loop_takes_its_ragged_end_in():
    """A region runs parallel loops alone, or what stands between them without names: see `split_tasks`."""
    function = map_values(100_003, Activation(function="gelu"))
    flat = flatten(tvm.IRModule({"main": function}))["main"]
    assert [phase.parallel for phase in split_tasks("main", flat).phases] == [True]


def test_the_level_uses_its_instructions():
    """Compiled, not run: any processor can check it."""
    for dot in (False, True):
        spec = FloatSpec(level=NATIVE, dtype="bfloat16", dot=dot)
        code = assembly(linear_f32.linear(MatrixProduct(14, 64, 32), spec), BF16)
        assert ("vdpbf16ps" in code) == dot and ("vfmadd" in code) != dot
        assert "vcvtneps2bf16" in code


@pytest.mark.parametrize("dot", (False, True))
def test_sums_stay_in_registers(dot):
    """Two vectors of weights live at once where a pair is widened: no sum of the chosen tile goes through the stack."""
    spec = FloatSpec(level=NATIVE, dtype="bfloat16", dot=dot)
    lines = assembly(linear_f32.linear(MatrixProduct(128, 384, 1536), spec), BF16).splitlines()
    products = [index for index, line in enumerate(lines) if re.search(r"\s(?:vfmadd\w+ps|vdpbf16ps)\s", line)]
    assert not [line for line in lines[products[0] : products[-1]] if re.search(r"%rsp|%rbp", line)]


def test_bad_options():
    with pytest.raises(UnknownNameError, match="float8"):
        FloatSpec(dtype="float8")
    with pytest.raises(OptionError, match="vdpbf16ps multiplies bfloat16"):
        FloatSpec(level="avx512", dtype="bfloat16", dot=True)
