"""raise-idioms: every written-out form becomes its layer; a reader inside the pattern, or another literal, stops it."""

from __future__ import annotations

import math
import operator

import pytest
import torch

aten = torch.ops.aten


def mul(b, x, y):
    return b(aten.mul.Tensor, x, y)


def div(b, x, y):
    return b(aten.div.Tensor, x, y)


def add(b, x, y):
    return b(aten.add.Tensor, x, y)


def number(b, value):
    """A literal as ONNX has it: a float32 tensor of one element."""
    return b.parameter(torch.tensor(value))


def erf_half(b, x, root=2**0.5):
    return add(b, b(aten.erf.default, div(b, x, root)), 1)


def tanh_half(b, cubic):
    return add(b, b(aten.tanh.default, mul(b, add(b, b.x, mul(b, cubic, 0.044715)), math.sqrt(2 / math.pi))), 1.0)


def relu6_of_plus_three(b, x):
    return b(aten.clamp.default, add(b, x, 3.0), 0.0, 6.0)


ACTIVATIONS = {
    "silu": ("silu", lambda b: mul(b, b.x, b(aten.sigmoid.default, b.x))),
    "silu from the left": ("silu", lambda b: mul(b, b(aten.sigmoid.default, b.x), b.x)),
    "mish": ("mish", lambda b: mul(b, b.x, b(aten.tanh.default, b(aten.softplus.default, b.x)))),
    "hardswish": ("hardswish", lambda b: div(b, mul(b, b.x, b(aten.relu6.default, add(b, b.x, 3))), 6)),
    "hardswish, gate divided": ("hardswish", lambda b: mul(b, b.x, div(b, relu6_of_plus_three(b, b.x), number(b, 6.0)))),
    "hardswish, multiplied by 1/6": ("hardswish", lambda b: mul(b, mul(b, b.x, relu6_of_plus_three(b, b.x)), number(b, 1 / 6))),
    "hardswish of hardsigmoid": ("hardswish", lambda b: mul(b, b.x, b(aten.hardsigmoid.default, b.x))),
    "hardsigmoid": ("hardsigmoid", lambda b: div(b, relu6_of_plus_three(b, b.x), 6.0)),
    "hardsigmoid of a line": (
        "hardsigmoid",
        lambda b: b(aten.clamp.default, add(b, mul(b, b.x, 1 / 6), number(b, 0.5)), 0, 1),
    ),
    "gelu as in torch": ("gelu", lambda b: mul(b, mul(b, b.x, 0.5), erf_half(b, b.x))),
    "gelu as exported": ("gelu", lambda b: mul(b, mul(b, b.x, erf_half(b, b.x, number(b, math.sqrt(2)))), number(b, 0.5))),
    "gelu halved last": ("gelu", lambda b: div(b, mul(b, erf_half(b, b.x), b.x), 2)),
    "gelu by tanh": ("gelu", lambda b: mul(b, mul(b, b.x, 0.5), tanh_half(b, b(aten.pow.Tensor_Scalar, b.x, 3)))),
    "gelu by tanh of products": ("gelu", lambda b: mul(b, mul(b, b.x, 0.5), tanh_half(b, mul(b, mul(b, b.x, b.x), b.x)))),
}


@pytest.mark.parametrize("case", sorted(ACTIVATIONS))
def test_activation(build, rewrite, ops, case):
    name, write = ACTIVATIONS[case]
    b = build((4, 8))
    after, row = rewrite(b.returns(write(b)), "raise-idioms")
    assert row.modified
    assert ops(after) == {name: 1}
    assert after.parameters() == {}


def test_activation_of_a_product_inside_another_product(build, rewrite, ops):
    b = build((4, 8), (4, 8))
    gated = mul(b, mul(b, b.x, b(aten.sigmoid.default, b.x)), b.inputs[1])
    after, _ = rewrite(b.returns(gated), "raise-idioms")
    assert ops(after) == {"silu": 1, "mul": 1}


NO_ACTIVATIONS = {
    "gate of another value": lambda b: [mul(b, b.x, b(aten.sigmoid.default, b(aten.neg.default, b.x)))],
    "gate read twice": lambda b: [g := b(aten.sigmoid.default, b.x), mul(b, b.x, g)],
    "sum read twice": lambda b: [s := add(b, b.x, 3.0), div(b, b(aten.relu6.default, s), 6.0)],
    "quick gelu": lambda b: [mul(b, b.x, b(aten.sigmoid.default, mul(b, b.x, 1.702)))],
    "another offset": lambda b: [div(b, b(aten.relu6.default, add(b, b.x, 2.0)), 6.0)],
    "another clamp": lambda b: [div(b, b(aten.clamp.default, add(b, b.x, 3.0), 0.0, 5.0), 6.0)],
    "another root": lambda b: [mul(b, mul(b, b.x, 0.5), erf_half(b, b.x, 1.5))],
    "a lone division": lambda b: [div(b, b.x, number(b, 6.0))],
    "larger result": lambda b: [div(b, b(aten.relu6.default, add(b, b.x, b.parameter(torch.full((1, 1, 1), 3.0)))), 6.0)],
}


@pytest.mark.parametrize("case", sorted(NO_ACTIVATIONS))
def test_no_activation(build, rewrite, case):
    b = build((4, 8))
    _, row = rewrite(b.returns(*NO_ACTIVATIONS[case](b)), "raise-idioms")
    assert not row.modified


def centred(b, x, dims=(-1,)):
    return b(aten.sub.Tensor, x, b(aten.mean.dim, x, list(dims), True))


def normalized(b, x, dims=(-1,), square="pow", root="sqrt"):
    d = centred(b, x, dims)
    squared = {
        "pow": lambda: b(aten.pow.Tensor_Scalar, d, 2),
        "pow by a tensor": lambda: b(aten.pow.Tensor_Tensor, d, number(b, 2.0)),
        "product": lambda: mul(b, d, d),
    }[square]()
    inner = add(b, b(aten.mean.dim, squared, list(dims), True), number(b, 1e-5))
    if root == "rsqrt":
        return mul(b, d, b(aten.rsqrt.default, inner))
    if root == "reciprocal":
        return mul(b, b(aten.reciprocal.default, b(aten.sqrt.default, inner)), d)
    return div(b, d, b(aten.sqrt.default, inner) if root == "sqrt" else b(aten.pow.Tensor_Scalar, inner, 0.5))


@pytest.mark.parametrize("square", ["pow", "pow by a tensor", "product"])
@pytest.mark.parametrize("root", ["sqrt", "power", "rsqrt", "reciprocal"])
@pytest.mark.parametrize("dims", [(-1,), (1, 2)])
def test_layer_norm(build, rewrite, ops, square, root, dims):
    b = build((2, 3, 8))
    shape = (3, 8) if len(dims) == 2 else (8,)
    y = add(b, mul(b, normalized(b, b.x, dims, square, root), b.random(*shape)), b.random(1, *shape))
    after, row = rewrite(b.returns(y), "raise-idioms")
    assert row.modified
    assert ops(after) == {"layer_norm": 1}
    (node,) = [n for n in after.nodes if n.op == "call_function"]
    assert list(node.args[1]) == list(shape)
    assert node.args[4] == pytest.approx(1e-5)


def test_layer_norm_without_parameters_or_with_one(build, rewrite, ops):
    for wrap in (lambda b, y: y, lambda b, y: mul(b, y, b.random(8)), lambda b, y: add(b, b.random(8), y)):
        b = build((2, 3, 8))
        after, _ = rewrite(b.returns(wrap(b, normalized(b, b.x))), "raise-idioms")
        assert ops(after) == {"layer_norm": 1}


NO_LAYER_NORMS = {
    "leading dimension": lambda b: [normalized(b, b.x, (0,))],
    "gap in the dimensions": lambda b: [normalized(b, b.x, (0, 2))],
    "centred value read elsewhere": lambda b: [
        d := centred(b, b.x),
        div(b, d, b(aten.sqrt.default, add(b, b(aten.mean.dim, mul(b, d, d), [2], True), 1e-5))),
    ],
    "another value squared": lambda b: [
        div(b, centred(b, b.x), b(aten.sqrt.default, add(b, b(aten.mean.dim, mul(b, b.x, b.x), [2], True), 1e-5)))
    ],
    "root mean square": lambda b: [
        mul(b, b.x, b(aten.rsqrt.default, add(b, b(aten.mean.dim, b(aten.pow.Tensor_Scalar, b.x, 2), [2], True), 1e-5)))
    ],
}


@pytest.mark.parametrize("case", sorted(NO_LAYER_NORMS))
def test_no_layer_norm(build, rewrite, ops, case):
    b = build((2, 3, 8))
    after, _ = rewrite(b.returns(*NO_LAYER_NORMS[case](b)), "raise-idioms")
    assert "layer_norm" not in ops(after)


def test_a_scale_of_another_shape_stays_outside_layer_norm(build, rewrite, ops):
    b = build((2, 3, 8))
    after, _ = rewrite(b.returns(mul(b, normalized(b, b.x), b.random(3, 1))), "raise-idioms")
    assert ops(after) == {"layer_norm": 1, "mul": 1}


LINEARS = {
    "matmul": lambda b: b(aten.matmul.default, b.x, b.random(4, 5)),
    "mm": lambda b: b(aten.mm.default, b.x, b.random(4, 5)),
    "matmul with permute": lambda b: b(aten.matmul.default, b.x, b(aten.permute.default, b.random(5, 4), [1, 0])),
    "matmul with transpose": lambda b: b(aten.matmul.default, b.x, b(aten.transpose.int, b.random(5, 4), -1, -2)),
    "addmm": lambda b: b(aten.addmm.default, b.random(5), b.x, b(aten.t.default, b.random(5, 4))),
    "addmm with a row": lambda b: b(aten.addmm.default, b.random(1, 5), b.x, b.random(4, 5)),
}


@pytest.mark.parametrize("case", sorted(LINEARS))
def test_linear(build, rewrite, ops, case):
    b = build((3, 4))
    after, _ = rewrite(b.returns(LINEARS[case](b)), "raise-idioms")
    assert ops(after) == {"linear": 1}
    assert {tuple(t.shape) for t in after.parameters().values()} <= {(5, 4), (5,)}


def test_a_transposed_weight_is_used_as_it_is(build, rewrite):
    b = build((3, 4))
    weight = b.random(5, 4)
    program = b.returns(b(aten.matmul.default, b.x, b(aten.permute.default, weight, [1, 0])))
    after, _ = rewrite(program, "raise-idioms")
    (before_tensor,), (after_tensor,) = program.parameters().values(), after.parameters().values()
    assert before_tensor.data_ptr() == after_tensor.data_ptr()


def test_addmm_with_a_computed_or_full_bias(build, rewrite, ops):
    b = build((3, 4), (3, 5))
    y = b(aten.addmm.default, b.inputs[1], b.x, b.random(4, 5))
    after, _ = rewrite(b.returns(y, b(aten.addmm.default, b.random(3, 5), b.x, b.random(4, 5))), "raise-idioms")
    assert ops(after) == {"linear": 2, "add": 2}


def test_flattened_linear(build, rewrite, ops):
    b = build((2, 3, 4))
    flat = b(aten.reshape.default, b.x, [-1, 4])
    y = b(aten.reshape.default, b.linear(flat, 4, 5), [2, 3, 5])
    after, row = rewrite(b.returns(y), "raise-idioms")
    assert ops(after) == {"linear": 1}
    assert row.stats == {"linear_without_flattening": 1}


NO_LINEARS = {
    "two values": lambda b: b(aten.matmul.default, b.x, b.inputs[1]),
    "constant on the left": lambda b: b(aten.matmul.default, b.random(5, 3), b.x),
    "batched constant": lambda b: b(aten.matmul.default, b.x, b.random(2, 4, 5)),
    "scaled addmm": lambda b: b(aten.addmm.default, b.random(5), b.x, b.random(4, 5), beta=2),
    "regrouped linear": lambda b: b(
        aten.reshape.default, b.linear(b(aten.reshape.default, b.x, [6, 2]), 2, 2), [2, 6]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(NO_LINEARS))
def test_no_linear(build, rewrite, case):
    b = build((3, 4), (4, 5))
    _, row = rewrite(b.returns(NO_LINEARS[case](b)), "raise-idioms")
    assert not row.modified


POOLS = {
    "adaptive": lambda b: b(aten.adaptive_avg_pool2d.default, b.x, [1, 1]),
    "adaptive, decomposed": lambda b: b(aten._adaptive_avg_pool2d.default, b.x, [1, 1]),
    "negative dimensions": lambda b: b(aten.mean.dim, b.x, [-1, -2], True),
    "keyword": lambda b: b(aten.mean.dim, b.x, [3, 2], keepdim=True),
}


@pytest.mark.parametrize("case", sorted(POOLS))
def test_global_pool(build, rewrite, case):
    b = build((2, 3, 4, 5))
    after, row = rewrite(b.returns(POOLS[case](b)), "raise-idioms")
    assert row.modified
    (node,) = [n for n in after.nodes if n.op == "call_function"]
    assert node.target is aten.mean.dim
    assert node.args[1:] == ([2, 3], True)


def test_other_pools_stay(build, rewrite):
    b = build((2, 3, 4, 6))
    outputs = [b(aten.adaptive_avg_pool2d.default, b.x, [2, 3]), b(aten.avg_pool2d.default, b.x, [4, 6])]
    _, row = rewrite(b.returns(*outputs, b(aten.mean.dim, b.x, [2, 3], False)), "raise-idioms")
    assert not row.modified


def test_exported_attention_scale_moves_to_the_query(build, rewrite, ops):
    b = build((2, 3, 4), (2, 4, 3))
    scores = div(b, b(aten.matmul.default, b.x, b.inputs[1]), number(b, 8.0))
    after, _ = rewrite(b.returns(b(aten.softmax.int, scores, -1)), "raise-idioms")
    product = next(n for n in after.nodes if n.target is aten.matmul.default)
    assert product.args[0].target is aten.mul.Tensor
    assert product.args[0].args == (after.inputs[0], 0.125)


def test_a_scale_shared_between_both_sides_moves_to_the_query(build, rewrite, ops):
    b = build((2, 3, 4), (2, 3, 4))
    key = b(aten.permute.default, mul(b, b.inputs[1], 0.5), [0, 2, 1])
    after, _ = rewrite(b.returns(b(aten.matmul.default, mul(b, b.x, number(b, 0.5)), key)), "raise-idioms")
    assert ops(after) == {"mul": 1, "permute": 1, "matmul": 1}
    scaled = next(n for n in after.nodes if n.target is aten.mul.Tensor)
    assert scaled.args == (after.inputs[0], 0.25)


def test_a_scaled_key_with_another_reader_stays(build, rewrite):
    b = build((2, 3, 4), (2, 4, 3))
    key = mul(b, b.inputs[1], 0.5)
    _, row = rewrite(b.returns(b(aten.matmul.default, b.x, key), key), "raise-idioms")
    assert not row.modified


def test_scalar_products_merge(build, rewrite, ops):
    b = build((2, 3))
    after, _ = rewrite(b.returns(div(b, mul(b, mul(b, b.x, 3.0), number(b, 2.0)), 4)), "raise-idioms")
    assert ops(after) == {"mul": 1}


def test_division_by_zero_is_left_alone(build, rewrite):
    b = build((2, 3))
    _, row = rewrite(b.returns(div(b, mul(b, b.x, 3.0), 0.0)), "raise-idioms")
    assert not row.modified


@pytest.mark.parametrize(("dim", "index"), [(1, 0), (-1, 1), (1, -1)])
def test_parts_of_a_split_are_slices(build, rewrite, ops, dim, index):
    b = build((2, 9))
    part = b(operator.getitem, b(aten.split_with_sizes.default, b.x, [4, 3, 2], dim), index)
    after, _ = rewrite(b.returns(part), "raise-idioms")
    assert ops(after) == {"slice": 1}


def test_decomposed_programs_are_put_together(build, rewrite, ops):
    b = build((2, 3, 8))
    norm = b(operator.getitem, b(aten.native_layer_norm.default, b.x, [8], b.random(8), b.random(8), 1e-5), 0)
    after, _ = rewrite(b.returns(b(aten._softmax.default, norm, -1, False)), "raise-idioms")
    assert ops(after) == {"layer_norm": 1, "softmax": 1}
