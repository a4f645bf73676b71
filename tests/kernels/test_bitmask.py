"""Decoding of weights whose zeros are not stored, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.backends.tvm.kernels import bitmask
from hypothesis import given, settings
from hypothesis import strategies as st

from . import float_cases, kernel_cases


def check(level: str, array: np.ndarray) -> None:
    stored, buffers = bitmask.pack(array)
    function = bitmask.expand(stored, level)
    where = level if level == "portable" else "avx512-vnni"
    got = kernel_cases.run(function, where, buffers, np.full(array.shape, 77, array.dtype))
    np.testing.assert_array_equal(got.view(np.uint8), array.view(np.uint8))


def sparse(seed: int, shape: tuple[int, ...], dtype: str, share: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = kernel_cases.random_values(rng, dtype, shape)
    return np.where(rng.random(shape) < share, values, 0).astype(dtype)


@pytest.mark.parametrize("level", float_cases.LEVELS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.one_of(st.integers(1, 70), st.integers(4000, 13_000), st.sampled_from([4096, 8192, 8208])),
    dtype=st.sampled_from(["int8", "float32"]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_every_element_comes_back(level, seed, size, dtype, share):
    check(level, sparse(seed, (size,), dtype, share))


@pytest.mark.parametrize("level", float_cases.LEVELS)
def test_a_large_weight_is_decoded_in_parallel(level):
    check(level, sparse(1, (8, 300, 16), "float32", 0.3))
    check(level, sparse(2, (7, 11, 991), "int8", 0.5))


def test_half_of_the_values_take_a_bit_each_and_half_the_bytes():
    array = sparse(3, (64, 1024), "int8", 0.5)
    _, (starts, bits, values) = bitmask.pack(array)
    assert bits.nbytes == array.size // 8 and starts.nbytes == 4 * array.size // 4096
    assert 0 <= values.nbytes - np.count_nonzero(array) < array.size / 64
