"""remove-no-ops: everything that returns its input goes; near misses stay."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.errors import PassError

aten = torch.ops.aten

NO_OPS = {
    "clone": lambda b: b(aten.clone.default, b.x),
    "alias": lambda b: b(aten.alias.default, b.x),
    "detach": lambda b: b(aten.detach.default, b.x),
    "contiguous": lambda b: b(aten.contiguous.default, b.x),
    "dropout": lambda b: b(aten.dropout.default, b.x, 0.5, False),
    "dropout of nothing": lambda b: b(aten.dropout.default, b.x, 0.0, True),
    "reshape": lambda b: b(aten.reshape.default, b.x, [2, -1, 4]),
    "view": lambda b: b(aten.view.default, b.x, [2, 3, 4]),
    "flatten": lambda b: b(aten.flatten.using_ints, b.x, 1, 1),
    "expand": lambda b: b(aten.expand.default, b.x, [-1, 3, 4]),
    "permute": lambda b: b(aten.permute.default, b.x, [0, -2, 2]),
    "transpose": lambda b: b(aten.transpose.int, b.x, 1, -2),
    "slice": lambda b: b(aten.slice.Tensor, b.x, 1, 0, 9223372036854775807),
    "squeeze": lambda b: b(aten.squeeze.dims, b.x, [1]),
    "repeat": lambda b: b(aten.repeat.default, b.x, [1, 1, 1]),
    "cat of one": lambda b: b(aten.cat.default, [b.x], 1),
    "pad by zero": lambda b: b(aten.constant_pad_nd.default, b.x, [0, 0, 0, 0], 1.0),
    "same dtype": lambda b: b(aten._to_copy.default, b.x, dtype=torch.float32),
    "add 0": lambda b: b(aten.add.Tensor, b.x, 0),
    "add 0.0 from the left": lambda b: b(aten.add.Tensor, b.parameter(torch.zeros(())), b.x),
    "sub 0": lambda b: b(aten.sub.Tensor, b.x, b.parameter(torch.zeros(4))),
    "mul 1": lambda b: b(aten.mul.Tensor, b.x, 1.0),
    "1 mul": lambda b: b(aten.mul.Tensor, b.parameter(torch.ones(3, 1)), b.x),
    "div 1": lambda b: b(aten.div.Tensor, b.x, 1),
    "pow 1": lambda b: b(aten.pow.Tensor_Scalar, b.x, 1),
}

NEAR_MISSES = {
    "reshape": lambda b: b(aten.reshape.default, b.x, [3, 2, 4]),
    "expand": lambda b: b(aten.expand.default, b.x, [1, 2, 3, 4]),
    "permute": lambda b: b(aten.permute.default, b.x, [1, 0, 2]),
    "permute with the same shape": lambda b: b(aten.permute.default, b(aten.slice.Tensor, b.x, 2, 0, 3), [0, 2, 1]),
    "slice": lambda b: b(aten.slice.Tensor, b.x, 1, 1, 3),
    "pad and crop": lambda b: b(aten.constant_pad_nd.default, b.x, [1, -1]),
    "other dtype": lambda b: b(aten._to_copy.default, b.x, dtype=torch.float64),
    "add that broadcasts": lambda b: b(aten.add.Tensor, b.x, b.parameter(torch.zeros(2, 1, 1, 1))),
    "mul that promotes": lambda b: b(aten.mul.Tensor, b.x, b.parameter(torch.ones(3, 1, dtype=torch.float64))),
    "mul almost 1": lambda b: b(aten.mul.Tensor, b.x, b.parameter(torch.tensor([1.0, 1.0, 1.0, 1.5]))),
    "0 minus": lambda b: b(aten.sub.Tensor, b.parameter(torch.zeros(4)), b.x),
    "1 over": lambda b: b(aten.div.Tensor, b.parameter(torch.ones(4)), b.x),
    "add scaled": lambda b: b(aten.add.Tensor, b.parameter(torch.zeros(4)), b.x, alpha=2),
    "cat of two": lambda b: b(aten.cat.default, [b.x, b.x], 1),
}


@pytest.mark.parametrize("case", sorted(NO_OPS))
def test_no_op_goes(build, rewrite, ops, case):
    b = build((2, 3, 4))
    after, row = rewrite(b.returns(b(aten.relu.default, NO_OPS[case](b))), "remove-no-ops")
    assert row.modified
    assert row.stats["removed"] == 1
    assert ops(after) == {"relu": 1}


@pytest.mark.parametrize("case", sorted(NEAR_MISSES))
def test_near_miss_stays(build, rewrite, case):
    b = build((2, 3, 4))
    _, row = rewrite(b.returns(NEAR_MISSES[case](b)), "remove-no-ops")
    assert not row.modified


def test_a_chain_down_to_the_output_goes_whole(build, rewrite, ops):
    b = build((2, 3, 4))
    y = b(aten.mul.Tensor, b(aten.clone.default, b(aten.relu.default, b.x)), 1)
    after, row = rewrite(b.returns(y, y), "remove-no-ops")
    assert row.stats["removed"] == 2
    assert [n.name for n in after.outputs] == ["relu_default", "relu_default"]


def test_view_becomes_reshape_so_that_the_copy_before_it_can_go(build, rewrite, ops):
    b = build((2, 3, 4))
    moved = b(aten.clone.default, b(aten.permute.default, b.x, [0, 2, 1]), memory_format=torch.contiguous_format)
    after, row = rewrite(b.returns(b(aten.view.default, moved, [2, 12])), "remove-no-ops")
    assert row.stats == {"removed": 1, "views": 1}
    assert ops(after) == {"permute": 1, "reshape": 1}


def test_random_dropout_is_refused(build, rewrite):
    b = build((2, 3, 4))
    with pytest.raises(PassError, match=r"dropout at 'dropout\w*' .* training=True.*training=self.training"):
        rewrite(b.returns(b(aten.dropout.default, b.x, 0.5, True)), "remove-no-ops")


def test_symbolic_dimensions_are_compared_by_symbol(rewrite, ops):
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x.reshape(x.shape[0], 4)), x.reshape(-1, 2)

    # The example batch is 2, the size of the second reshape's other dimension: a comparison of hints would be fooled.
    program = capture(Net(), torch.randn(2, 4), dynamic_batch=True)
    after, row = rewrite(program, "remove-no-ops")
    assert row.stats == {"removed": 1, "views": 2}
    assert ops(after)["reshape"] == 1
    assert after.input_specs[0].shape == (None, 4)
