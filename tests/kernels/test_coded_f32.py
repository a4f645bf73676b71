"""Weights stored as codes of a table: decoding is bit-exact, a linear layer that decodes stays within its bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import coded_f32, linear_f32
from graphwright.backends.tvm.kernels.base import LANES
from graphwright.backends.tvm.kernels.float_base import FloatSpec, MatrixProduct
from graphwright.ir.dialect.codebook import values_of
from graphwright.passes.quantize.formats import CodebookFormat, parse_format
from hypothesis import given, settings
from hypothesis import strategies as st

from .float_cases import ACTIVATIONS, LEVELS, activated, assert_close, normal, run

EXAMPLES = settings(max_examples=10, deadline=None)
FORMATS = st.sampled_from(
    [
        "int2g8",
        "int3g24",
        "int4g8",
        "int4g64",
        "int5g5",
        "int6g16",
        "int7g9",
        "int8g16",
        "uint2g8",
        "uint3g12",
        "uint4g32",
        "uint8g8",
        "pot3",
        "pot4g8",
        "fp4e2m1",
        "fp5e2m2g16",
        "fp6e3m2g8",
        "fp8e4m3",
        "fp8e5m2g7",
        "pe4",
        "pe5g16",
    ]
)


def coded_weight(level: str, text: str, rng: np.random.Generator, rows: int, count: int, taps: int = 1):
    """The kernel's view of a random weight: (Coded, buffers, the decoded weight)."""
    form = parse_format(text)
    assert isinstance(form, CodebookFormat)
    weight = torch.from_numpy(normal(rng, rows, count) + 0.3)
    book = form.fit(weight)
    codes, table = book.quantize(weight), book.table.numpy()
    rule = coded_f32.rule_of(table, level)
    coded = coded_f32.Coded(rows, count, book.bits, book.group, len(table), rule, book.zero is not None, taps)
    buffers = [coded.pack_codes(codes.numpy()), coded.pack_groups(book.scale.numpy())]
    buffers += [] if book.zero is None else [coded.pack_groups(book.zero.numpy())]
    buffers += [] if rule is not None else [coded.pack_table(table)]
    return coded, buffers, values_of(codes, book.table, book.scale, book.group, book.zero).numpy()


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    text=FORMATS,
    rows=st.integers(1, 40),
    channels=st.integers(1, 40),
    taps=st.sampled_from([1, 1, 4, 9]),
    seed=st.integers(0, 2**31),
)
def test_decoding_gives_every_bit(level, text, rows, channels, taps, seed):
    rng = np.random.default_rng(seed)
    coded, buffers, weight = coded_weight(level, text, rng, rows, channels * taps, taps)
    panels = run(coded_f32.decode(coded, level), level, buffers, (coded.panels, coded.count, LANES))
    by_tap = weight.reshape(rows, channels, taps).transpose(0, 2, 1).reshape(rows, -1)
    want = linear_f32.pack_weight(by_tap)
    rows_of_lane = np.arange(coded.panels * LANES).reshape(coded.panels, 1, LANES) < rows
    np.testing.assert_array_equal(np.where(rows_of_lane, panels, 0), want)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    text=FORMATS.filter(lambda t: not t.endswith(("g5", "g9", "g12", "g7"))),
    rows=st.integers(1, coded_f32.FUSED_ROWS),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 70),
    activation=ACTIVATIONS,
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_linear_layer_decodes_as_it_multiplies(level, text, rows, inputs, outputs, activation, residual, seed):
    rng = np.random.default_rng(seed)
    coded, buffers, weight = coded_weight(level, text, rng, outputs, inputs)
    assert coded_f32.fuses(rows, coded)
    x, bias = normal(rng, rows, inputs), normal(rng, outputs)
    added = normal(rng, rows, outputs) if residual else np.zeros((rows, outputs), np.float32)
    function = coded_f32.linear(MatrixProduct(rows, inputs, outputs), coded, FloatSpec(activation, residual, level))
    operands = [x, *([added] if residual else []), *buffers, linear_f32.pack_bias(outputs, bias)]
    y = run(function, level, operands, (rows, outputs))
    wide = x.astype(np.float64) @ weight.T.astype(np.float64) + bias + added
    # A group with a zero sums x * (entry - zero), whose terms are those of the decoded weight.
    magnitude = np.abs(x) @ np.abs(weight).T + np.abs(bias) + np.abs(added)
    assert_close(y, activated(activation, wide), magnitude, inputs + 3, activation)


def test_groups_that_begin_within_a_block_are_not_fused():
    assert not coded_f32.fuses(1, coded_f32.Coded(16, 60, 4, 12, 15))
    assert not coded_f32.fuses(coded_f32.FUSED_ROWS + 1, coded_f32.Coded(16, 64, 4, 8, 15))


@pytest.mark.parametrize(
    "text", ["int4g8", "int8g8", "uint6g8", "pot3", "pot8", "fp4e2m1", "fp8e4m3", "fp8e5m2", "fp5e3m1", "fp6e2m3"]
)
def test_every_table_but_power_exponents_follows_a_rule(text):
    form = parse_format(text)
    assert isinstance(form, CodebookFormat)
    assert coded_f32.rule_of(form.table().numpy(), "portable") is not None
    assert (coded_f32.rule_of(form.table().numpy(), "avx512") is None) == (form.bits <= 5)


def test_a_power_exponent_table_is_looked_up():
    form = parse_format("pe6")
    assert isinstance(form, CodebookFormat)
    assert coded_f32.rule_of(form.table(0.5).numpy(), "portable") is None
