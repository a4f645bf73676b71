"""expand-attention: equal to torch's attention under every mask, scale and head grouping, or a typed refusal."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.errors import PassError
from graphwright.ir.verify import verify
from hypothesis import given
from hypothesis import strategies as st

aten = torch.ops.aten
attention = aten.scaled_dot_product_attention.default


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.integers(1, 5),
    width=st.integers(1, 5),
    inner=st.integers(1, 8),
    mask=st.sampled_from(["none", "causal", "bool", "float", "bool input", "float input"]),
    scale=st.sampled_from([None, 0.3]),
)
def test_equals_torch(build, rewrite, ops, batch, heads, length, width, inner, mask, scale):
    b = build((batch, heads, length, inner), (batch, heads, width, inner), (batch, heads, width, 3), (length, width))
    q, k, v, extra = b.inputs
    masks = {
        "bool": lambda: b.parameter(torch.rand(length, width) > 0.3),
        "float": lambda: b.random(1, 1, length, width),
        "bool input": lambda: b(aten.gt.Scalar, extra, 0.0),
        "float input": lambda: extra,
    }
    options = {} if scale is None else {"scale": scale}
    given_mask = masks[mask]() if mask in masks else None
    y = b(attention, q, k, v, given_mask, 0.0, mask == "causal", **options)
    after, row = rewrite(b.returns(y, extra), "expand-attention")
    assert row.stats == {"expanded": 1}
    found = ops(after)
    assert "scaled_dot_product_attention" not in found
    assert (found["matmul"], found["softmax"], found["mul"]) == (2, 1, 1)


def test_rows_hidden_altogether_are_zero(build, rewrite):
    for constant in (True, False):
        b = build((1, 1, 3, 4), (3, 3))
        mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
        node = b.parameter(mask) if constant else b(aten.gt.Scalar, b.inputs[1], 0.0)
        y = b(attention, b.x, b.x, b.x, node)
        x = torch.randn(1, 1, 3, 4)
        after, _ = rewrite(b.returns(y, b.inputs[1]), "expand-attention", [(x, mask.float())])
        (out, _) = after(x, mask.float())
        assert bool((out[0, 0, 1] == 0).all())
        assert bool((out[0, 0, 0] != 0).all())


def test_the_scale_is_on_the_query_side(build, rewrite):
    b = build((1, 2, 3, 16))
    after, _ = rewrite(b.returns(b(attention, b.x, b.x, b.x)), "expand-attention")
    scaled = next(n for n in after.nodes if n.target is aten.mul.Tensor)
    assert scaled.args[1] == 0.25
    product = next(iter(scaled.users))
    assert product.target is aten.matmul.default
    assert product.args[0] is scaled


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries(build, rewrite, groups):
    b = build((2, 4, 3, 8), (2, 4 // groups, 5, 8))
    y = b(attention, b.x, b.inputs[1], b.inputs[1], enable_gqa=True)
    _, row = rewrite(b.returns(y), "expand-attention")
    assert row.modified


def test_grouped_queries_with_symbolic_batch(rewrite):
    class Net(torch.nn.Module):
        def forward(self, q, k):
            return torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    program = capture(Net(), (torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)), dynamic_batch=True)
    _, row = rewrite(program, "expand-attention")
    assert row.modified


def test_refusals(build, rewrite):
    b = build((1, 2, 3, 4))
    with pytest.raises(PassError, match=r"drops attention weights at random; set dropout_p to 0"):
        rewrite(b.returns(b(attention, b.x, b.x, b.x, None, 0.5)), "expand-attention")
    b = build((4, 3, 8), (2, 3, 8))
    query, key = (b(aten.clone.default, x) for x in b.inputs)
    with pytest.raises(PassError, match=r"grouped queries of 3 dimensions; give \(batch, heads, length, width\)"):
        rewrite(b.returns(b(attention, query, key, key, enable_gqa=True)), "expand-attention")


def test_a_causal_mask_over_a_symbolic_length_is_refused(rewrite):
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    program = capture(Net(), torch.randn(5, 4), dynamic_batch=True)
    with pytest.raises(PassError, match=r"causal over a symbolic length.*pass attn_mask"):
        rewrite(program, "expand-attention")


def test_nothing_to_do(build, rewrite):
    b = build((2, 3))
    after, row = rewrite(b.returns(b(aten.softmax.int, b.x, -1)), "expand-attention")
    assert not row.modified
    verify(after)
