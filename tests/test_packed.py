"""`gw::unpack` and the pack function beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.packed import pack, row_bytes
from graphwright.ir.errors import VerificationError
from graphwright.ir.program import Program, Stage
from graphwright.ir.verify import verify
from hypothesis import given, settings
from hypothesis import strategies as st

BITS = st.integers(2, 7)


@st.composite
def weights(draw):
    """(bits, codes (rows, ...)): shapes of linear, convolution and depthwise weights, odd sizes included."""
    bits = draw(BITS)
    shape = draw(st.sampled_from([(3, 7), (1, 1), (5, 3, 3, 3), (6, 1, 5, 5), (2, 4, 1, 1), (4, 33), (7, 2, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return bits, torch.from_numpy(rng.integers(0, 1 << bits, shape).astype(np.uint8))


@settings(max_examples=60, deadline=None)
@given(weights())
def test_symmetric_round_trip(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.shape == (codes.shape[0], row_bytes(codes[0].numel(), bits)) and packed.dtype is torch.uint8
    values = gw.unpack(packed, bits, list(codes.shape))
    assert values.dtype is torch.int8 and torch.equal(values.to(torch.int16), codes.to(torch.int16) - (1 << (bits - 1)))


@settings(max_examples=40, deadline=None)
@given(weights(), st.data())
def test_a_zero_point_a_row_is_taken_off(case, data):
    bits, codes = case
    rows = codes.shape[0]
    zero = torch.tensor(data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=rows, max_size=rows)), dtype=torch.int16)
    values = gw.unpack(pack(codes, bits), bits, list(codes.shape), zero)
    assert torch.equal(values.to(torch.int16), codes.to(torch.int16) - zero.reshape(-1, *[1] * (codes.dim() - 1)))


@settings(max_examples=40, deadline=None)
@given(weights())
def test_the_stream_is_little_endian(case):
    """The definition itself, bit by bit: bit b of code k of a row is bit (k * bits + b) of the row's stream."""
    bits, codes = case
    stream = np.unpackbits(pack(codes, bits).numpy(), axis=1, bitorder="little")
    expected = np.unpackbits(codes.reshape(codes.shape[0], -1, 1).numpy(), axis=2, bitorder="little")[..., :bits]
    flat = expected.reshape(codes.shape[0], -1)
    assert np.array_equal(stream[:, : flat.shape[1]], flat) and not stream[:, flat.shape[1] :].any()


@pytest.mark.parametrize(("codes", "bits"), [([[4]], 2), ([[-1]], 3), ([[1]], 8), ([[1]], 1)])
def test_what_does_not_fit_is_refused(codes, bits):
    with pytest.raises(ValueError, match="fit|packed"):
        pack(torch.tensor(codes), bits)


@pytest.mark.parametrize(
    ("packed", "zero"), [((4, 3), None), ((4, 4), (3,)), ((3, 4), None)], ids=["short rows", "zero points", "rows"]
)
def test_shapes_are_checked(packed, zero):
    with pytest.raises(ValueError, match="packed as|zero point each"):
        gw.unpack(
            torch.zeros(packed, dtype=torch.uint8), 3, [4, 10], None if zero is None else torch.zeros(zero, dtype=torch.int16)
        )


class Unpacked(torch.nn.Module):
    def __init__(self, computed: bool):
        super().__init__()
        self.computed = computed
        self.register_buffer("packed", pack(torch.arange(30).reshape(3, 10) % 8, 3))

    def forward(self, x):
        packed: Any = self.packed
        return gw.linear(x, gw.unpack(packed + 1 if self.computed else packed, 3, [3, 10]), None, 0)


@pytest.mark.parametrize("computed", [False, True])
def test_only_parameters_are_packed(computed):
    captured = capture(Unpacked(computed), torch.zeros(2, 10, dtype=torch.uint8))
    program = Program(captured.graph_module, Stage.INTEGER)
    if computed:
        with pytest.raises(VerificationError, match="only parameters are packed"):
            verify(program)
    else:
        verify(program)
