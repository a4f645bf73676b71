"""hessian-trace: Hutchinson's estimates against dense Hessians, inside their own intervals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from graphwright.ir.errors import DataError, OptionError
from graphwright.search.sensitivity.curvature import Curvature
from graphwright.search.sensitivity.groups import Group, groups_of
from graphwright.search.sensitivity.hessian_trace import HessianTrace
from graphwright.search.sensitivity.loss import choose
from graphwright.search.sensitivity.network import Network, NotDifferentiableError
from graphwright.search.sensitivity.statistics import mean_interval
from graphwright.search.store import Store
from sensitivity_cases import TinyBlock, TinyConv, TwoOutputs, dense_hessian, task_of

CASES = [
    (TinyConv, "self"),
    (TinyConv, "labels"),
    (TinyBlock, "self"),
    (TinyBlock, "labels"),
    (TwoOutputs, "squared"),
]


def whole(task) -> Group:
    """All samples as one group."""
    groups = groups_of(task)
    labels = None if task.labels is None else torch.cat([g.labels for g in groups])
    return Group(0, tuple(torch.cat(values) for values in zip(*(g.inputs for g in groups), strict=True)), labels)


@pytest.mark.parametrize(("model", "loss"), CASES)
def test_a_hessian_product_is_that_of_the_dense_hessian(model, loss):
    task = task_of(model)
    curvature = Curvature(Network(task.program, task.layers), choose(loss, task.program), whole(task))
    generator = torch.Generator().manual_seed(1)
    for index, layer in enumerate(task.layers):
        v = torch.randn(layer.weight.shape, generator=generator)
        product = curvature.product({layer.origin: v})[layer.origin]
        expected = dense_hessian(model, loss, index) @ v.flatten().double()
        assert torch.allclose(product.flatten().double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("model", "loss"), CASES)
def test_traces_lie_inside_their_intervals(model, loss):
    """Of the 95% intervals of some 15 channels nearly all hold the exact value; a bias would show over many probes."""
    task = task_of(model)
    hessians = [dense_hessian(model, loss, index) for index in range(len(task.layers))]
    pairs = zip(hessians, task.layers, strict=True)
    exact = torch.cat([h.diagonal().reshape(layer.weight.shape).flatten(1).sum(1) for h, layer in pairs]).numpy()
    runs = []
    for seed in range(12):
        seeded = type(task)(task.program, task.layers, task.choices, task.samples, task.labels, seed=seed)
        runs.append(HessianTrace(loss=loss).traces(seeded))
    mean, half_width = mean_interval(*HessianTrace(loss=loss, probes=8).traces(task))
    assert (np.abs(mean - exact) <= half_width + 1e-4 * np.abs(exact)).mean() >= 0.85
    # Over probes alone. Channels of a layer err together, so that the share inside says little; twice the width holds them all.
    # Where the outputs are linear in the weights the estimate is exact, and the width is that of float32.
    mean, half_width = mean_interval(np.stack([traces.mean(0) for traces, _ in runs]), np.ones(12))
    assert (np.abs(mean - exact) <= 2 * half_width + 1e-4 * np.abs(exact)).all()


def test_the_score_is_half_the_mean_trace_times_the_squared_error():
    task = task_of(TinyConv, 64)
    traces, sizes = HessianTrace().traces(task)
    trace = (traces * sizes[:, None]).sum(0) / sizes.sum()
    layer, channels = task.layers[1], slice(4, 8)
    errors = (layer.rounded("int4") - layer.weight).square().flatten(1).sum(1).numpy()
    whole_layer = 0.5 * trace[channels].sum() / layer.weight.numel() * errors.sum()
    by_channel = 0.5 * (trace[channels] / layer.weight[0].numel() * errors).sum()
    assert HessianTrace().score(task).loss[1, 1] == pytest.approx(whole_layer, rel=1e-5)
    assert HessianTrace(per="channel").score(task).loss[1, 1] == pytest.approx(by_channel, rel=1e-5)


def test_more_samples_narrow_the_interval_and_one_sample_has_none():
    widths = [HessianTrace().score(task_of(TinyConv, count)) for count in (16, 256)]
    assert (widths[1].half_width / widths[1].loss).mean() < 0.6 * (widths[0].half_width / widths[0].loss).mean()
    alone = HessianTrace().score(task_of(TinyConv, 1))
    assert np.isinf(alone.half_width).all() and alone.uncertain() == list(alone.layers)


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from graphwright.search.sensitivity.hessian_trace import HessianTrace
from graphwright.search.store import Store
from sensitivity_cases import TinyConv, task_of

def progress(done, total, what):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

task = task_of(TinyConv, store=Store(pathlib.Path(sys.argv[1])))
HessianTrace().score(type(task)(**{**vars(task), "progress": progress}))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(tests.parent / ".link")}
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), str(tests)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(kept) == 5
    task = task_of(TinyConv, store=Store(tmp_path))
    resumed, whole_run = HessianTrace().score(task), HessianTrace().score(task_of(TinyConv))
    assert (resumed.loss == whole_run.loss).all() and (resumed.half_width == whole_run.half_width).all()
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(after) == 12 and kept.items() <= after.items()
    # Other choices and the other granularity need the same traces.
    HessianTrace(per="channel").score(task)
    assert len(list(tmp_path.rglob("*.json"))) == 12


def test_options_and_labels_are_checked():
    task = task_of(TinyConv, 4)
    with pytest.raises(OptionError, match="probes"):
        HessianTrace(probes=0).score(task)
    with pytest.raises(DataError, match="scorer hessian-trace{loss=labels} needs a label .*; not by .*output-distortion"):
        HessianTrace(loss="labels").score(type(task)(task.program, task.layers, task.choices, task.samples))


def test_an_op_without_derivative_is_named():
    class Rounded(torch.nn.Module):
        shape = (3,)

        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.b(torch.cdist(self.a(x)[None], self.a(x)[None] + 1)[0] @ self.a(x))

    with pytest.raises(NotDifferentiableError, match="cdist.*output-distortion need no derivatives"):
        HessianTrace(loss="labels").score(task_of(Rounded, 2))
