"""activation-trace: against dense Hessians over activations."""

import numpy as np
import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.search.sensitivity.activation_trace import ActivationTrace
from graphwright.search.sensitivity.curvature import Curvature
from graphwright.search.sensitivity.groups import Group, groups_of
from graphwright.search.sensitivity.layers import activation_of
from graphwright.search.sensitivity.loss import choose
from graphwright.search.sensitivity.network import Network
from graphwright.search.sensitivity.statistics import mean_interval
from sensitivity_cases import TinyBlock, TinyConv, TwoOutputs, task_of


@pytest.mark.parametrize("model", [TinyConv, TinyBlock, TwoOutputs])
def test_traces_are_those_of_dense_hessians_within_their_intervals(model):
    task = task_of(model, 1)
    network, loss = Network(task.program, task.layers), choose("auto", task.program)
    nodes = [activation_of(layer) for layer in task.layers]
    (group,) = groups_of(task)
    values = network.values(task.samples.samples[0])
    target = loss.target(values, None)
    exact = []
    for node in nodes:

        def moved(offset, node=node):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return loss.value(network.values(task.samples.samples[0], offsets={node: offset}), target)

        offset = torch.zeros_like(values[node])
        with torch.enable_grad():
            dense = torch.autograd.functional.hessian(moved, offset)
        exact.append(float(dense.reshape(offset.numel(), -1).diagonal().sum()))
    many = Group(0, tuple(x.expand(400, *x.shape[1:]) for x in group.inputs))
    estimates = Curvature(network, loss, many).activation_traces(nodes, torch.Generator().manual_seed(0)).numpy()
    mean, width = mean_interval(estimates, np.ones(400))
    assert (np.abs(mean - exact) <= 1.5 * width + 1e-4 * np.abs(exact)).all()


def test_the_fused_relu_belongs_to_the_layer():
    stem, depthwise, head = task_of(TinyConv).layers
    assert str(activation_of(stem).target) == "aten.relu.default"
    assert activation_of(depthwise).args[0] is depthwise.node
    assert activation_of(head) is head.node


def test_fewer_bits_lose_more_and_intervals_cover_samples():
    scores = ActivationTrace().score(task_of(TinyConv, 64))
    assert (np.diff(scores.loss[:-1], axis=1) > 0).all() and (scores.half_width > 0).all() and scores.count == 64


def test_options_and_choices_are_checked():
    task = task_of(TinyConv, 2)
    with pytest.raises(OptionError, match="labels"):
        ActivationTrace(loss="labels").score(task)
    with pytest.raises(OptionError, match="no format of an activation"):
        ActivationTrace().score(type(task)(task.program, task.layers, ("fp4e2m1",), task.samples))
