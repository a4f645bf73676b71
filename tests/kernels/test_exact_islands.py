"""The float islands against torch.ops.gw.*: every bit, on every level; and no fused multiply-add on any target."""

from __future__ import annotations

import re
from fractions import Fraction

import graphwright.ir.dialect.exact
import graphwright.ir.dialect.integer
import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels.emit import splat
from graphwright.backends.tvm.kernels.exact_elementwise import elementwise
from graphwright.backends.tvm.kernels.exact_float import constant, product, round_even
from graphwright.backends.tvm.kernels.layer_norm_exact import layer_norm
from graphwright.backends.tvm.kernels.reduce_exact import reduce_sum
from graphwright.backends.tvm.kernels.softmax_exact import softmax
from graphwright.ir.dialect import exact
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.tirx.script.builder import ir as T

from .float_cases import AARCH64, AVX2, AVX512, LEVELS, assembly, run

#: Fused multiply-adds in assembly.
FUSED = r"\b(?:vfn?m(?:add|sub)\w*|fn?m(?:la|ls|add|sub))\b"

EXAMPLES = settings(max_examples=10, deadline=None)
LENGTHS = st.one_of(st.integers(1, 50), st.sampled_from([64, 128, 197, 384, 1000]))


def values(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Finite float32 values of a kind that could upset a kernel."""
    if kind == "constant rows":
        return np.broadcast_to(rng.standard_normal((*shape[:-1], 1)), shape).astype(np.float32)
    if kind == "negative zeros":
        return np.where(rng.random(shape) < 0.9, -0.0, rng.standard_normal(shape)).astype(np.float32)
    scale = {"normal": 1.0, "large": 1e6, "huge": 1e18, "tiny": 1e-30, "subnormal": 1e-41}[kind]
    return (rng.standard_normal(shape) * scale).astype(np.float32)


KINDS = st.sampled_from(["normal", "normal", "constant rows", "negative zeros", "large", "huge", "tiny", "subnormal"])


def assert_same_bits(y: np.ndarray, reference: torch.Tensor) -> None:
    expected = reference.numpy()
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    bits = {4: np.int32, 1: np.int8}[y.dtype.itemsize]
    different = np.flatnonzero(y.reshape(-1).view(bits) != np.ascontiguousarray(expected).reshape(-1).view(bits))
    assert different.size == 0, (
        f"{different.size} of {y.size} differ, first at {different[0]}: "
        f"{y.reshape(-1)[different[0]]!r} instead of {expected.reshape(-1)[different[0]]!r}"
    )


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(rows=st.integers(1, 9), length=LENGTHS, kind=KINDS, spread=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 2**31))
def test_softmax(level, rows, length, kind, spread, seed):
    x = values(kind, np.random.default_rng(seed), (rows, length)) * np.float32(spread)
    assert_same_bits(run(softmax(rows, length), level, [x], x.shape), torch.ops.gw.softmax(torch.from_numpy(x)))


@pytest.mark.parametrize("level", LEVELS)
def test_softmax_takes_masked_elements(level):
    x = np.random.default_rng(0).standard_normal((4, 37)).astype(np.float32)
    x[:, 20:] = -np.inf
    assert_same_bits(run(softmax(4, 37), level, [x], x.shape), torch.ops.gw.softmax(torch.from_numpy(x)))


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(rows=st.integers(1, 9), length=LENGTHS, kind=KINDS, eps=st.sampled_from([1e-5, 1e-6, 1e-12]), seed=st.integers(0, 2**31))
def test_layer_norm(level, rows, length, kind, eps, seed):
    rng = np.random.default_rng(seed)
    x = values(kind, rng, (rows, length))
    weight, bias = (rng.standard_normal(length).astype(np.float32) for _ in range(2))
    reference = torch.ops.gw.layer_norm(*(torch.from_numpy(v) for v in (x, weight, bias)), eps)
    assert_same_bits(run(layer_norm(rows, length, eps), level, [x, weight, bias], x.shape), reference)


def test_the_square_root_of_the_definition_is_correctly_rounded():
    """In rational numbers: x lies between the squares of the midpoints to the neighbours of its root."""
    x = np.exp(np.random.default_rng(0).uniform(-80, 85, 3000)).astype(np.float32)
    roots = graphwright.ir.dialect.exact.square_root(torch.from_numpy(x)).numpy()
    for value, root in zip(x, roots, strict=True):
        below, above = (Fraction(float(np.nextafter(root, np.float32(end)))) for end in (0, np.inf))
        low, high = ((Fraction(float(root)) + neighbour) / 2 for neighbour in (below, above))
        assert low**2 <= Fraction(float(value)) <= high**2


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    data=st.data(),
    keepdim=st.booleans(),
    kind=KINDS,
    seed=st.integers(0, 2**31),
)
def test_reduce_sum(level, shape, data, keepdim, kind, seed):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = values(kind, np.random.default_rng(seed), shape)
    reference = torch.ops.gw.reduce_sum(torch.from_numpy(x), axis, keepdim)
    assert_same_bits(run(reduce_sum(shape, axis, keepdim), level, [x], tuple(reference.shape)), reference)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [1, 15, 16, 100])
def test_elementwise_quantize(level, size):
    """An expression of its own: the definition of gw.quantize."""
    x = (np.random.default_rng(size).standard_normal(size) * 3).astype(np.float32)
    inverse = float(np.float32(1.0) / np.float32(0.037))

    def quantize(v):
        steps = T.Cast("int32x16", round_even(T.max(T.min(v * constant(inverse), constant(250.0)), constant(-5.0))))
        return T.Cast("uint8x16", steps + splat(T.int32(5)))

    y = run(elementwise((size,), ("float32",), "uint8", quantize), level, [x], x.shape, "uint8")
    assert_same_bits(y, torch.ops.gw.quantize(torch.from_numpy(x), 0.037, 5, 0, 255, torch.uint8))


def multiply_add():
    return elementwise((64,), ("float32",) * 3, "float32", lambda a, b, c: product(a, b) + c)


@pytest.mark.parametrize("level", LEVELS)
def test_a_product_rounds_before_the_addition(level):
    a = np.full(64, 1 + 2**-12, np.float32)  # a * a = 1 + 2^-11 + 2^-24, which rounds to 1 + 2^-11
    y = run(multiply_add(), level, [a, a, np.full(64, -(1 + 2**-11), np.float32)], a.shape)
    assert (y == 0).all()


@pytest.mark.parametrize("options", [AVX512, AVX2, AARCH64], ids=["avx512", "avx2", "aarch64"])
@pytest.mark.parametrize(
    "function",
    [layer_norm(7, 197, 1e-6), reduce_sum((7, 33, 40), 1), reduce_sum((7, 197), 1), multiply_add()],
    ids=["layer_norm", "reduce columns", "reduce rows", "a * b + c"],
)
def test_no_fused_multiply_add(function, options):
    assert not re.findall(FUSED, assembly(function, options))


@pytest.mark.parametrize("options", [AVX512, AVX2, AARCH64], ids=["avx512", "avx2", "aarch64"])
def test_softmax_fuses_exact_products_alone(options):
    """Two an exponential, those of its reduction by ln 2. Each has one shift by 23, of n to its place in a float."""
    text = assembly(softmax(7, 197), options)
    fused = re.findall(FUSED, text)
    assert fused
    assert len(fused) == 2 * len(re.findall(r"\b(?:vpslld\s+\$23|shl\s+v\S+, v\S+, #23)\b", text))


def test_the_products_of_the_reduction_by_ln_2_are_exact():
    n = np.arange(-128, 129, dtype=np.float32)
    for constant_of_ln_2 in map(np.float32, (exact.LN2_HIGH, exact.LN2_LOW)):
        assert (n * constant_of_ln_2 == n.astype(np.float64) * float(constant_of_ln_2)).all()


def test_the_search_for_fused_instructions_finds_them():
    plain = elementwise((64,), ("float32",) * 3, "float32", lambda a, b, c: a * b + c)
    assert re.search(r"vfmadd\w+ps", assembly(plain, AVX512))
    assert re.search(r"\bfmla\b", assembly(plain, AARCH64))


def test_bad_arguments():
    with pytest.raises(OptionError, match="at least 1"):
        softmax(0, 4)
    with pytest.raises(OptionError, match="at least 1"):
        layer_norm(4, 0, 1e-5)
    with pytest.raises(OptionError, match="beside a value that is kept"):
        layer_norm(4, 4, 1e-5, twin=True)
    with pytest.raises(OptionError, match="axis 2"):
        reduce_sum((3, 4), 2)
    with pytest.raises(OptionError, match="expected uint8x16"):
        elementwise((4,), ("float32",), "uint8", lambda x: x)
