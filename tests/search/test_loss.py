"""Which loss a program gets, what it is, and the samples it is taken over."""

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import DataError, OptionError
from graphwright.search.sensitivity.base import Task
from graphwright.search.sensitivity.groups import groups_of
from graphwright.search.sensitivity.loss import choose
from sensitivity_cases import TinyBlock, TinyConv, TwoOutputs, program_of, task_of
from torch import nn


def test_a_linear_head_makes_class_scores_and_anything_else_does_not():
    assert choose("auto", program_of(TinyConv)).name == "self"
    assert choose("auto", program_of(TwoOutputs)).name == "squared"
    for model, name in [
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh()), "squared"),
        (nn.Linear(4, 1), "squared"),
        (nn.Sequential(nn.Linear(4, 8), nn.Flatten(1)), "self"),
        (nn.Sequential(nn.Linear(4, 8), nn.LogSoftmax(-1)), "self"),
        (nn.Sequential(nn.Linear(4, 8), nn.Softmax(0)), "squared"),
    ]:
        assert choose("auto", capture(model, torch.randn(2, 4))).name == name, model


def test_a_softmax_at_the_end_changes_nothing():
    values = []
    for softmax in (False, True):
        task = task_of(TinyBlock, 3, softmax=softmax)
        loss = choose("self", task.program)
        assert str(loss.nodes[0].target) == "aten.linear.default"
        values.append(loss)
    assert task_of(TinyBlock, 3, softmax=True).program.outputs[0] is not values[1].nodes[0]


def test_class_scores_of_several_outputs_are_refused():
    with pytest.raises(OptionError, match="use squared"):
        choose("self", program_of(TwoOutputs))


def test_the_root_is_one_of_the_hessian_over_the_outputs():
    for model, name in [(TinyConv, "self"), (TinyConv, "labels"), (TwoOutputs, "squared")]:
        task = task_of(model, 1, batch=2)
        loss = choose(name, task.program)
        outputs = task.program(*task.samples.samples[0])
        values = dict(zip(loss.nodes, outputs, strict=True))
        target = loss.target(values, None if task.labels is None else task.labels[0])
        sizes = [o.numel() for o in outputs]

        def value(flat, sizes=sizes, outputs=outputs, loss=loss, target=target):
            parts = [p.reshape(o.shape) for p, o in zip(flat.split(sizes), outputs, strict=True)]
            return loss.value(dict(zip(loss.nodes, parts, strict=True)), target)

        dense = torch.autograd.functional.hessian(value, torch.cat([o.flatten() for o in outputs]))
        columns = []
        for column in torch.eye(sum(sizes)):
            signs = tuple(p.reshape(o.shape) for p, o in zip(column.split(sizes), outputs, strict=True))
            columns.append(torch.cat([z.flatten() for z in loss.root(values, signs)]))
        root = torch.stack(columns, 1)
        assert torch.allclose(root @ root.T, dense, atol=1e-6)


def test_groups_hold_every_sample_once_and_a_symbolic_batch_is_cut_into_rows():
    task = task_of(TinyConv, 100)
    groups = groups_of(task)
    assert torch.equal(torch.cat([g.inputs[0] for g in groups]), torch.stack([s[0] for s in task.samples]))
    assert len(groups) == 16 and {len(g) for g in groups} == {6, 7}
    assert [len(g) for g in groups_of(task, 3)] == [1, 1, 1]
    program = capture(nn.Linear(4, 3), torch.randn(1, 4), dynamic_batch=True)
    samples = Calibration.for_program(program, [torch.randn(5, 4), torch.randn(2, 4)])
    symbolic = Task(program, (), (), samples, torch.arange(7) % 3)
    groups = groups_of(symbolic)
    assert [tuple(g.inputs[0].shape) for g in groups] == [(1, 1, 4)] * 7
    assert torch.cat([g.labels for g in groups])[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_labels_that_do_not_fit_are_refused():
    task = task_of(TinyConv, 4)
    for labels in (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(4, 1)):
        with pytest.raises(DataError, match="one integer class a row"):
            groups_of(Task(task.program, task.layers, task.choices, task.samples, labels))
