"""The loss of a whole plan: that of the network with all rounded weights at once, whatever the number of samples."""

from dataclasses import replace

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.quantize.annotate import Quantize
from graphwright.search.plan_loss import CHUNK, PlanLoss
from graphwright.search.sensitivity.base import Task
from graphwright.search.sensitivity.layers import weight_layers
from models import small_cnn, small_inputs

CHOICES = ("int8", "int3")


@pytest.fixture(scope="module")
def loss():
    program = PassManager().run(capture(small_cnn(), small_inputs(1)), parse("canonicalize")).program
    inputs = [small_inputs(1, seed=s) for s in range(CHUNK + 3)]
    samples = Calibration.for_program(program, inputs)
    return PlanLoss(Task(program, weight_layers(program, Quantize(), CHOICES), CHOICES, samples))


@pytest.mark.parametrize("count", [1, 5, CHUNK + 3])
def test_it_is_the_divergence_of_the_program_with_rounded_weights(loss, count):
    task = loss.task
    chosen = [i % 2 for i in range(len(task.layers))]
    rounded = task.program.clone()
    for layer, choice in zip(task.layers, chosen, strict=True):
        node = next(n for n in rounded.nodes if n.op == "get_attr" and n.target == layer.node.args[1].target)
        rounded.replace_parameter(node, layer.rounded(CHOICES[choice]))
    rounded.sweep()
    expected = []
    for sample in task.samples.samples[:count]:
        exact, other = (p(*sample)[0].log_softmax(-1) for p in (task.program, rounded))
        expected.append(float((exact.exp() * (exact - other)).sum(-1).mean()))
    assert loss(chosen, count) == pytest.approx(sum(expected) / count, rel=1e-3, abs=1e-7)


def test_asking_for_more_samples_than_there_are_takes_them_all(loss):
    chosen = [1] * len(loss.task.layers)
    assert loss.samples == CHUNK + 3 and loss(chosen, 10_000) == loss(chosen, loss.samples) > loss([0] * len(chosen), 10_000)


def test_outputs_that_are_no_classes_lose_by_their_relative_error():
    program = PassManager().run(capture(torch.nn.Conv2d(2, 3, 3), torch.zeros(1, 2, 6, 6)), parse("canonicalize")).program
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    task = Task(program, weight_layers(program, Quantize(), CHOICES), CHOICES, Calibration.for_program(program, [x]))
    loss = PlanLoss(replace(task))
    with torch.no_grad():
        exact = torch.nn.functional.conv2d(x, *(program.parameters()[n] for n in ("weight", "bias")))
        other = torch.nn.functional.conv2d(x, task.layers[0].rounded("int3"), program.parameters()["bias"])
    assert loss([1], 1) == pytest.approx(float((other - exact).square().sum() / exact.square().sum()), rel=1e-4)
