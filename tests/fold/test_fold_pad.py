"""fold-pad: symmetric zero pads only, of spatial dimensions only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten


@given(st.data())
def test_symmetric_pads_fold_into_plain_convolutions(build, rewrite, ops, convolutions, data):
    shape, weight, _, options = data.draw(convolutions())
    rank = len(shape) - 2
    sides = [data.draw(st.integers(0, 3)) for _ in range(data.draw(st.integers(1, rank)))]
    sides[0] += 1
    b = build(shape)
    flat = [s for side in sides for s in (side, side)]
    kind = data.draw(st.booleans())
    pad = b(aten.constant_pad_nd.default, b.x, flat) if kind else b(aten.pad.default, b.x, flat, "constant", 0.0)
    after, row = rewrite(b.returns(b.conv(pad, weight, **options)), "fold-pad")
    assert row.modified != options["transposed"]
    if row.modified:
        assert ops(after) == {"convolution": 1}


PADS = {
    "asymmetric": lambda b: b(aten.constant_pad_nd.default, b.x, [0, 1, 0, 1]),
    "one side of one dimension": lambda b: b(aten.constant_pad_nd.default, b.x, [1, 1, 0, 1]),
    "channels": lambda b: b(aten.constant_pad_nd.default, b.x, [0, 0, 0, 0, 1, 1]),
    "crop": lambda b: b(aten.constant_pad_nd.default, b.x, [-1, -1, -1, -1]),
    "other value": lambda b: b(aten.constant_pad_nd.default, b.x, [1, 1, 1, 1], 1.0),
    "reflect": lambda b: b(aten.pad.default, b.x, [1, 1, 1, 1], "reflect"),
}


@pytest.mark.parametrize("case", sorted(PADS))
def test_other_pads_stay(build, rewrite, case):
    b = build((1, 3, 6, 6))
    pad = PADS[case](b)
    channels = pad.meta["val"].shape[1]
    _, row = rewrite(b.returns(b.conv(pad, (2, channels, 3, 3))), "fold-pad")
    assert not row.modified


def test_each_reader_folds_and_the_pad_stays_for_the_others(build, rewrite, ops):
    b = build((1, 3, 6, 6))
    pad = b(aten.constant_pad_nd.default, b.x, [1, 1, 2, 2])
    outputs = [b.conv(pad, (2, 3, 3, 3), padding=[1, 0]), b(aten.relu.default, pad)]
    after, row = rewrite(b.returns(*outputs), "fold-pad")
    assert row.stats == {"folded": 1}
    assert ops(after) == {"convolution": 1, "constant_pad_nd": 1, "relu": 1}
    conv = next(n for n in after.nodes if n.target is aten.convolution.default)
    assert conv.args[4] == [3, 1]
    assert conv.args[0] is after.inputs[0]


def test_a_pad_of_a_pad_folds_whole(build, rewrite, ops):
    b = build((1, 3, 6, 6))
    pad = b(aten.constant_pad_nd.default, b(aten.constant_pad_nd.default, b.x, [1, 1, 1, 1]), [2, 2, 0, 0])
    after, _ = rewrite(b.returns(b.conv(pad, (2, 3, 3, 3))), "fold-pad")
    assert ops(after) == {"convolution": 1}


def test_a_padded_weight_is_no_pad(build, rewrite):
    b = build((1, 3, 6, 6))
    weight = b(aten.constant_pad_nd.default, b.random(2, 3, 1, 1), [1, 1, 1, 1])
    conv = b(aten.convolution.default, b.x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    _, row = rewrite(b.returns(conv), "fold-pad")
    assert not row.modified
