"""fold-scale-shift: per-channel constants fold into the layer before, else into every layer after, else not at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten
FORMS = {
    "mul": lambda b, x, c: b(aten.mul.Tensor, x, c),
    "lum": lambda b, x, c: b(aten.mul.Tensor, c, x),
    "div": lambda b, x, c: b(aten.div.Tensor, x, c),
    "add": lambda b, x, c: b(aten.add.Tensor, x, c),
    "dda": lambda b, x, c: b(aten.add.Tensor, c, x, alpha=2),
    "sub": lambda b, x, c: b(aten.sub.Tensor, x, c),
    "bus": lambda b, x, c: b(aten.sub.Tensor, c, x),
    "alpha": lambda b, x, c: b(aten.sub.Tensor, x, c, alpha=3),
}
SHIFTS = ("add", "dda", "sub", "bus", "alpha")


def constant(data, b, channels: int, rank: int):
    """A number, or a parameter that broadcasts along the channels of a convolution."""
    kind = data.draw(st.sampled_from(["number", "scalar", "channel", "full"]))
    if kind == "number":
        return data.draw(st.sampled_from([-2, 0.5, 3.0]))
    shape = {"scalar": (), "channel": (channels, *[1] * (rank - 2)), "full": (1, channels, *[1] * (rank - 2))}[kind]
    return b.parameter(torch.rand(shape) + 0.5)


@given(st.data(), st.sampled_from(sorted(FORMS)))
def test_folds_into_any_convolution_before(build, rewrite, ops, convolutions, data, form):
    shape, weight, outputs, options = data.draw(convolutions())
    b = build(shape)
    conv = b.conv(b.x, weight, **options)
    after, row = rewrite(b.returns(FORMS[form](b, conv, constant(data, b, outputs, len(shape)))), "fold-scale-shift")
    assert row.stats == {"into_producer": 1, "into_readers": 0}
    assert ops(after) == {"convolution": 1}


@given(st.data(), st.sampled_from(sorted(FORMS)))
def test_folds_into_a_convolution_after_unless_a_shift_meets_padding(build, rewrite, ops, convolutions, data, form):
    shape, weight, _, options = data.draw(convolutions())
    b = build(shape)
    value = FORMS[form](b, b.x, constant(data, b, shape[1], len(shape)))
    after, row = rewrite(b.returns(b.conv(value, weight, **options)), "fold-scale-shift")
    blocked = form in SHIFTS and (options["transposed"] or any(options["padding"]))
    assert row.modified != blocked
    assert sum(ops(after).values()) == 1 + blocked


@given(st.sampled_from(sorted(FORMS)), st.booleans(), st.booleans())
def test_folds_into_linear(build, rewrite, ops, form, bias, before):
    b = build((2, 3, 4))
    c = b.parameter(torch.rand(4) + 0.5)
    y = b.linear(FORMS[form](b, b.x, c), 4, 4, bias) if before else FORMS[form](b, b.linear(b.x, 4, 4, bias), c)
    after, row = rewrite(b.returns(y), "fold-scale-shift")
    assert row.stats == {"into_producer": int(not before), "into_readers": int(before)}
    assert ops(after) == {"linear": 1}


def test_the_query_scale_folds_through_reshape_and_permute(build, rewrite, ops):
    b = build((2, 5, 8))
    heads = b(aten.permute.default, b(aten.reshape.default, b.linear(b.x, 8, 8), [2, 5, 2, 4]), [0, 2, 1, 3])
    after, row = rewrite(b.returns(b(aten.mul.Tensor, heads, 0.5)), "fold-scale-shift")
    assert row.stats["into_producer"] == 1
    assert ops(after) == {"linear": 1, "reshape": 1, "permute": 1}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_number_means_the_same_behind_a_permute(build, rewrite, ops, form):
    b = build((2, 5, 8))
    moved = b(aten.permute.default, b.linear(b.x, 8, 6), [0, 2, 1])
    after, _ = rewrite(b.returns(FORMS[form](b, moved, 0.25)), "fold-scale-shift")
    assert ops(after) == {"linear": 1, "permute": 1}


def test_a_vector_does_not_fold_through_a_permute(build, rewrite):
    b = build((2, 4, 4))
    moved = b(aten.permute.default, b.linear(b.x, 4, 4), [0, 2, 1])
    _, row = rewrite(b.returns(b(aten.mul.Tensor, moved, b.random(4))), "fold-scale-shift")
    assert not row.modified


def test_a_shift_keeps_a_shared_weight_shared(build, rewrite):
    b = build((2, 4))
    weight = b.random(4, 4)
    y = b(aten.add.Tensor, b(aten.linear.default, b.x, weight, None), b.random(4))
    z = b(aten.linear.default, b.x, weight, None)
    after, row = rewrite(b.returns(y, z), "fold-scale-shift")
    assert row.modified
    assert len([t for t in after.parameters().values() if t.dim() == 2]) == 1


def must_not_fire(b, case):
    conv = b.conv(b.x, (4, 4, 3, 3), 4, padding=1)
    if case == "several readers":
        return [b(aten.mul.Tensor, conv, 2.0), conv]
    if case == "wrong axis":
        return [b(aten.mul.Tensor, conv, b.random(4))]  # along the width
    if case == "along the batch":
        return [b(aten.mul.Tensor, conv, b.random(4, 1, 1, 1))]
    if case == "larger result":
        return [b(aten.mul.Tensor, conv, b.random(2, 1, 1, 1, 1))]
    if case == "reciprocal":
        return [b(aten.div.Tensor, b.random(4, 1, 1), conv)]
    if case == "two values":
        return [b(aten.mul.Tensor, conv, b(aten.relu.default, b.x))]
    if case == "squared":
        return [b(aten.mul.Tensor, conv, conv)]
    if case == "only one of two readers":
        scaled = b(aten.mul.Tensor, b(aten.relu.default, b.x), 2.0)
        return [b.conv(scaled, (4, 4, 1, 1)), scaled]
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "several readers",
        "wrong axis",
        "along the batch",
        "larger result",
        "reciprocal",
        "two values",
        "squared",
        "only one of two readers",
    ],
)
def test_must_not_fire(build, rewrite, case):
    b = build((4, 4, 4, 4))
    _, row = rewrite(b.returns(*must_not_fire(b, case)), "fold-scale-shift")
    assert not row.modified


def test_integers_are_left_alone(build, rewrite):
    b = build((2, 3))
    whole = b(aten._to_copy.default, b.x, dtype=torch.int64)
    _, row = rewrite(b.returns(b(aten.mul.Tensor, whole, 2)), "fold-scale-shift")
    assert not row.modified
