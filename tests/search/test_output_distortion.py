"""output-distortion: what it measures is what a program with one rounded weight really loses."""

import numpy as np
import pytest
import torch
from graphwright.ir.errors import CalibrationError, DataError
from graphwright.search.sensitivity.output_distortion import OutputDistortion
from graphwright.search.store import Store
from sensitivity_cases import TinyBlock, TinyConv, TwoOutputs, mean_loss, task_of


@pytest.mark.parametrize(
    ("model", "loss"), [(TinyConv, "self"), (TinyConv, "labels"), (TinyBlock, "self"), (TwoOutputs, "squared")]
)
def test_it_is_the_increase_of_the_loss_with_one_layer_rounded(model, loss):
    task = task_of(model, 20)
    scores = OutputDistortion(loss=loss).score(task)
    for i, layer in enumerate(task.layers):
        base = mean_loss(task, loss, layer, layer.weight)
        for j, choice in enumerate(task.choices):
            expected = float(mean_loss(task, loss, layer, layer.rounded(choice)) - base)
            assert scores.loss[i, j] == pytest.approx(expected, rel=1e-3, abs=2e-7)
    assert scores.count == 20 and (scores.half_width > 0).all()


def test_several_rows_a_sample():
    task = task_of(TinyConv, 6, batch=3)
    layer = task.layers[0]
    expected = float(mean_loss(task, "self", layer, layer.rounded("int2")))
    assert OutputDistortion().score(task).loss[0, 2] == pytest.approx(expected, rel=1e-3)


def test_the_distance_at_layers_is_the_mean_relative_error_of_all_of_them():
    task = task_of(TinyConv, 1)
    layer, (x,) = task.layers[1], task.samples.samples[0]

    def outputs(weight):
        values = {}
        for node in task.program.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = weight if node is layer.node.args[1] else task.program.parameter(node)
            elif node.op == "call_function":
                values[node] = node.target(*torch.fx.map_arg(node.args, values.get), **node.kwargs)
        return [values[n] for n in (*(other.node for other in task.layers), task.program.outputs[0])]

    with torch.no_grad():
        pairs = zip(outputs(layer.rounded("int2")), outputs(layer.weight), strict=True)
        errors = [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]
    assert errors[0] == 0 < errors[1]
    assert OutputDistortion(at="layers").score(task).loss[1, 2] == pytest.approx(np.mean(errors), rel=1e-4)


def test_missing_data_is_an_error_that_names_the_scorers_that_do_without():
    task = task_of(TinyConv, 4)
    with pytest.raises(CalibrationError, match="sqnr"):
        OutputDistortion().score(type(task)(task.program, task.layers, task.choices))
    with pytest.raises(DataError, match="sqnr"):
        OutputDistortion(loss="labels").score(type(task)(task.program, task.layers, task.choices, task.samples))


def test_a_second_run_reads_what_the_first_one_stored(tmp_path):
    first = OutputDistortion().score(task_of(TinyConv, 4, store=Store(tmp_path)))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    second = OutputDistortion().score(task_of(TinyConv, 4, store=Store(tmp_path)))
    assert (first.loss == second.loss).all() and len(files) == 4
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
