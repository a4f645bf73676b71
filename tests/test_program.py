"""Program: what it computes follows its graph, and shapes are inferred as torch.export traces them."""

from __future__ import annotations

import torch
from graphwright.ir.capture import capture
from graphwright.ir.program import infer_node
from models import small_cnn, small_inputs
from torch import nn


def test_an_edited_graph_is_what_runs():
    program, x = capture(small_cnn(), small_inputs()), small_inputs()
    before = program(x)[0]
    bias = next(n for n in program.nodes if n.op == "get_attr" and str(n.target).endswith("head_bias"))
    fresh = program.replace_parameter(bias, program.parameter(bias).detach() + 1.0)
    torch.testing.assert_close(program(x)[0], before + 1.0)
    program.replace_parameter(fresh, program.parameter(fresh) + 1.0)
    torch.testing.assert_close(program(x)[0], before + 2.0)
    last = program.outputs[0]
    program.output.args = ((program.insert(torch.ops.aten.neg.default, (last,), program.output),),)
    torch.testing.assert_close(program(x)[0], -before - 2.0)


def test_a_graph_that_was_not_edited_is_compiled_once(monkeypatch):
    program, x = capture(small_cnn(), small_inputs()), small_inputs()
    program(x)
    monkeypatch.setattr(program.graph_module, "recompile", None)
    program(x)


def test_shapes_of_causal_attention_and_embeddings_are_inferred_with_a_symbolic_batch():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(11, 8)

        def forward(self, ids):
            x = self.tokens(ids).reshape(-1, 5, 2, 4).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    program = capture(Decoder().eval(), torch.zeros(2, 5, dtype=torch.int64), dynamic_batch=True)
    program.infer_shapes()
    for node in program.nodes:
        if node.op == "call_function":
            infer_node(program, node)
    assert program.output_specs[0].shape == (None, 2, 5, 4)
