"""fold-batch-norm: exact against conv, transposed conv and linear, before and after; never across readers or padding."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.errors import PassError
from graphwright.ir.program import origin_of
from graphwright.ir.verify import verify
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten


@given(st.data(), st.booleans())
def test_folds_after_any_convolution(build, rewrite, ops, convolutions, data, affine):
    shape, weight, outputs, options = data.draw(convolutions())
    b = build(shape)
    program = b.returns(b.batch_norm(b.conv(b.x, weight, **options), outputs, affine))
    after, row = rewrite(program, "fold-batch-norm")
    assert row.modified
    assert row.stats == {"after_layer": 1, "before_layer": 0, "scale_and_shift": 0}
    assert ops(after) == {"convolution": 1}


@given(st.data(), st.booleans())
def test_folds_before_an_unpadded_convolution(build, rewrite, ops, convolutions, data, shift):
    shape, weight, _, options = data.draw(convolutions(padded=False))
    b = build(shape)
    program = b.returns(b.conv(b.batch_norm(b.x, shape[1], shift=shift), weight, **options))
    after, row = rewrite(program, "fold-batch-norm")
    fits = not (options["transposed"] and shift)
    assert row.stats["before_layer"] == fits
    assert ops(after) == ({"convolution": 1} if fits else {"convolution": 1, "mul": 1, "add": 1})


@given(st.data())
def test_before_padding_only_without_shift(build, rewrite, convolutions, data):
    shape, weight, _, options = data.draw(convolutions())
    for shift in (False, True):
        b = build(shape)
        program = b.returns(b.conv(b.batch_norm(b.x, shape[1], shift=shift), weight, **options))
        _, row = rewrite(program, "fold-batch-norm")
        inexact = shift and (options["transposed"] or any(options["padding"]))
        assert row.stats["scale_and_shift"] == inexact


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_folds_after_and_before_linear(build, rewrite, ops, inputs, outputs, bias, before):
    b = build((3, inputs))
    x = b.batch_norm(b.x, inputs) if before else b.x
    y = b.linear(x, inputs, outputs, bias)
    after, row = rewrite(b.returns(y if before else b.batch_norm(y, outputs)), "fold-batch-norm")
    assert row.stats["before_layer" if before else "after_layer"] == 1
    assert ops(after) == {"linear": 1}


def test_several_readers_of_the_convolution_fall_back(build, rewrite, ops):
    b = build((1, 3, 5, 5))
    conv = b.conv(b.x, (4, 3, 3, 3), 4)
    after, row = rewrite(b.returns(b.batch_norm(conv, 4), conv), "fold-batch-norm")
    assert row.stats == {"after_layer": 0, "before_layer": 0, "scale_and_shift": 1}
    assert ops(after) == {"convolution": 1, "mul": 1, "add": 1}
    shapes = {tuple(t.shape) for t in after.parameters().values()}
    assert (1, 4, 1, 1) in shapes
    verify(after)


def test_a_weight_shared_by_two_convolutions_stays_for_the_other(build, rewrite, ops):
    b = build((1, 3, 5, 5))
    weight = b.random(3, 3, 3, 3)
    normed, plain = b.batch_norm(b.conv(b.x, weight), 3), b.conv(b.x, weight, padding=1)
    after, row = rewrite(b.returns(normed, plain), "fold-batch-norm")
    assert row.stats["after_layer"] == 1
    assert len([t for t in after.parameters().values() if t.dim() == 4]) == 2


def test_folds_before_every_reader_or_none(build, rewrite, ops):
    b = build((1, 3, 5, 5))
    norm = b.batch_norm(b.x, 3)
    after, row = rewrite(b.returns(b.conv(norm, (4, 3, 3, 3), 4), b.conv(norm, (2, 3, 1, 1))), "fold-batch-norm")
    assert row.stats["before_layer"] == 1
    assert ops(after) == {"convolution": 2}

    for other in ("relu", "padded", "output"):
        b = build((1, 3, 5, 5))
        norm = b.batch_norm(b.x, 3)
        second = {"relu": lambda: b(aten.relu.default, norm), "padded": lambda: b.conv(norm, (2, 3, 3, 3), padding=1)}  # noqa: B023
        outputs = [b.conv(norm, (4, 3, 3, 3), 4), second[other]() if other in second else norm]
        _, row = rewrite(b.returns(*outputs), "fold-batch-norm")
        assert row.stats["scale_and_shift"] == 1


def test_the_wrong_axis_falls_back(build, rewrite, ops):
    b = build((2, 4, 4))
    after, row = rewrite(b.returns(b.batch_norm(b.linear(b.x, 4, 4), 4)), "fold-batch-norm")
    assert row.stats["scale_and_shift"] == 1
    assert ops(after)["mul"] == 1

    b = build((2, 4, 4))
    after, row = rewrite(b.returns(b.linear(b.batch_norm(b.x, 4), 4, 4)), "fold-batch-norm")
    assert row.stats["scale_and_shift"] == 1


def test_origin_is_that_of_the_layer(build, rewrite):
    b = build((1, 3, 5, 5))
    conv = b.conv(b.x, (4, 3, 3, 3), 4)
    origin = origin_of(conv)
    after, _ = rewrite(b.returns(b.batch_norm(conv, 4)), "fold-batch-norm")
    nodes = [n for n in after.nodes if n.op in ("call_function", "get_attr")]
    assert {origin_of(n) for n in nodes} == {origin}


def test_nothing_to_do(build, rewrite):
    b = build((1, 3))
    _, row = rewrite(b.returns(b(aten.relu.default, b.x)), "fold-batch-norm")
    assert not row.modified


def test_batch_statistics_are_refused(build, rewrite):
    b = build((2, 3, 5, 5))
    y = b(aten.batch_norm.default, b.x, None, None, None, None, True, 0.1, 1e-5, False)
    with pytest.raises(PassError, match=r"depends on its input batch.*track_running_stats=True"):
        rewrite(b.returns(y), "fold-batch-norm")
