"""Each rule of each stage: a program that breaks it, and the message that says where."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.dialect import gw
from graphwright.ir.errors import VerificationError
from graphwright.ir.program import Program, Stage
from graphwright.ir.verify import NON_CANONICAL, verify
from torch import nn

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.relu(self.layer(x))


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Net(), torch.randn(2, 4))


@pytest.fixture
def program(captured) -> Program:
    return captured.clone()


def append(program: Program, target, *args, **kwargs) -> torch.fx.Node:
    """Adds a call on the program's output, and returns its result instead."""
    old = program.outputs[0]
    node = program.insert(target, (old, *args), program.output, origin="added", **kwargs)
    program.output.replace_input_with(old, node)
    return node


def fake_quantize(program: Program) -> torch.fx.Node:
    scale = program.add_parameter("scale", torch.tensor(0.1), program.output)
    zero = program.add_parameter("zero", torch.tensor(0), program.output)
    return append(program, gw.fake_quantize.default, scale, zero, -128, 127)


def quantize(program: Program) -> torch.fx.Node:
    return append(program, gw.quantize.default, 0.1, 0, -128, 127, torch.int8)


@pytest.mark.parametrize("stage", list(Stage))
def test_a_plain_program_is_valid_at_every_stage(program, stage):
    verify(program, stage)


def test_annotated_and_integer_ops_are_valid_in_their_stage(program):
    annotated, integer = program.clone(), program.clone()
    fake_quantize(annotated)
    quantize(integer)
    verify(annotated, Stage.ANNOTATED)
    verify(integer, Stage.INTEGER)


def test_only_placeholders_parameters_and_calls(program):
    with program.graph.inserting_before(program.output):
        node = program.graph.call_method("relu", (program.outputs[0],))
    node.meta["val"] = program.outputs[0].meta["val"]
    program.output.replace_input_with(program.outputs[0], node)
    with pytest.raises(VerificationError, match=r"a call_method node; programs hold only placeholders, parameters"):
        verify(program)


def test_only_aten_and_gw_ops(program):
    node = next(n for n in program.nodes if n.target is aten.relu.default)
    node.target = torch.relu
    with pytest.raises(VerificationError, match=r"'relu' .*: .*is neither an ATen op nor a gw op"):
        verify(program)


def test_parameters_are_there(program):
    delattr(program.graph_module, "layer_bias")
    with pytest.raises(VerificationError, match=r"names parameter 'layer_bias', which the program does not hold|layer_bias"):
        verify(program)


def test_shapes_are_known(program):
    del program.outputs[0].meta["val"]
    with pytest.raises(VerificationError, match=r"'relu' \(from relu\): no shape; a pass added it without Program.insert"):
        verify(program)


def test_recorded_shapes_are_the_computed_ones(program):
    node = next(n for n in program.nodes if n.target is aten.linear.default)
    node.meta["val"] = node.meta["val"].new_empty(2, 5)
    with pytest.raises(VerificationError, match=r"'linear' \(from layer\): records \(2, 5\) torch.float32 but computes \(2, 3\)"):
        verify(program)


@pytest.mark.parametrize("dynamic", [False, True])
def test_shapes_are_compared_again_where_the_calls_are_known(dynamic):
    program = capture(Net(), torch.randn(2, 4), dynamic_batch=dynamic)
    verify(program)
    node = program.outputs[0]
    node.meta["val"] = node.meta["val"].new_empty(2, 5)
    with pytest.raises(VerificationError, match=r"'relu' \(from relu\): records \(2, 5\) torch.float32 but computes \(.*, 3\)"):
        verify(program)


def test_recorded_dtypes_are_the_computed_ones(program):
    node = program.outputs[0]
    node.meta["val"] = node.meta["val"].double()
    with pytest.raises(VerificationError, match=r"records \(2, 3\) torch.float64 but computes \(2, 3\) torch.float32"):
        verify(program)


def test_an_op_that_rejects_its_inputs_is_named_with_their_shapes(program):
    node = next(n for n in program.nodes if n.target is aten.linear.default)
    program.parameter(node.args[1])
    program.graph_module.layer_weight = torch.zeros(3, 5)
    with pytest.raises(
        VerificationError, match=r"(?s)aten.linear.default at 'linear' \(from layer\) rejects its inputs .*\(3, 5\)"
    ):
        verify(program)


def test_a_malformed_graph_is_reported(program):
    relu, linear = program.outputs[0], next(n for n in program.nodes if n.target is aten.linear.default)
    linear.prepend(relu)
    with pytest.raises(VerificationError, match=r"'Net' is not a well-formed graph: .*used before it has been defined"):
        verify(program)


@pytest.mark.parametrize("stage", [Stage.CAPTURED, Stage.CANONICAL, Stage.COMPRESSED])
@pytest.mark.parametrize("edit", [fake_quantize, quantize])
def test_float_stages_hold_no_gw_ops(program, stage, edit):
    edit(program)
    with pytest.raises(VerificationError, match=rf"not a valid {stage.label} program: .*'gw.* belongs to a later stage"):
        verify(program, stage)


def test_the_annotated_stage_holds_no_integer_ops(program):
    quantize(program)
    with pytest.raises(VerificationError, match=r"'gw.quantize.default' belongs to the integer stage"):
        verify(program, Stage.ANNOTATED)


def test_the_integer_stage_holds_no_fake_quantization(program):
    fake_quantize(program)
    with pytest.raises(VerificationError, match=r"fake quantization left behind in the integer stage \(lower-integer\)"):
        verify(program, Stage.INTEGER)


def training_only(program: Program, target) -> None:
    if target is aten.batch_norm.default:
        mean, var = (program.add_parameter(n, torch.ones(3), program.output) for n in ("mean", "var"))
        append(program, target, None, None, mean, var, False, 0.1, 1e-5, False)
    elif target is aten.scaled_dot_product_attention.default:
        append(program, target, program.outputs[0], program.outputs[0])
    elif target is aten.native_dropout.default:
        program.insert(target, (program.outputs[0], 0.5, False), program.output, origin="added")
    else:
        append(program, target, *((0.5, False) if target is aten.dropout.default else ()))


@pytest.mark.parametrize("target", list(NON_CANONICAL), ids=str)
def test_later_stages_hold_nothing_that_canonicalization_removes(program, target):
    training_only(program, target)
    verify(program, Stage.CAPTURED)
    for stage in list(Stage)[1:]:
        with pytest.raises(VerificationError) as caught:
            verify(program, stage)
        assert NON_CANONICAL[target] in str(caught.value)
        assert "(from added)" in str(caught.value)


def test_the_message_shows_producers_and_readers(program):
    append(program, aten.clone.default)
    append(program, aten.tanh.default)
    with pytest.raises(VerificationError) as caught:
        verify(program, Stage.CANONICAL)
    lines = str(caught.value).split("\n")
    assert lines[1] == "    relu = aten.relu.default"
    assert lines[2].startswith(" -> ")
    assert lines[3] == "    read by tanh_default = aten.tanh.default"
