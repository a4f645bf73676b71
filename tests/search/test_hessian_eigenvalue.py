"""hessian-eigenvalue: power iteration against dense eigenvalues."""

import numpy as np
import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.search.sensitivity.hessian_eigenvalue import HessianEigenvalue
from graphwright.search.store import Store
from sensitivity_cases import TinyBlock, TinyConv, TwoOutputs, dense_hessian, task_of


@pytest.mark.parametrize(("model", "loss"), [(TinyConv, "self"), (TinyBlock, "self"), (TwoOutputs, "squared")])
def test_it_finds_the_largest_eigenvalue_of_each_block(model, loss):
    task = task_of(model)
    scorer = HessianEigenvalue(loss=loss, iterations=60, tolerance=1e-5)
    quotients, sizes = scorer.eigenvalues(task)
    found = (quotients * sizes[:, None]).sum(0) / sizes.sum()
    exact = [float(torch.linalg.eigvalsh(dense_hessian(model, loss, i))[-1]) for i in range(len(task.layers))]
    assert found == pytest.approx(np.array(exact), rel=0.01)
    layer = task.layers[1]
    error = float((layer.rounded("int4") - layer.weight).square().sum())
    scores = scorer.score(task)
    assert scores.loss[1, 1] == pytest.approx(0.5 * found[1] * error, rel=1e-6)
    assert (scores.half_width > 0).all() and scores.count == 12


def test_it_bounds_the_second_order_loss():
    task = task_of(TinyConv)
    scores = HessianEigenvalue(iterations=60, tolerance=1e-5).score(task)
    for i, layer in enumerate(task.layers):
        error = (layer.rounded("int2") - layer.weight).flatten().double()
        assert 0.5 * error @ dense_hessian(TinyConv, "self", i) @ error <= scores.loss[i, 2] * 1.01


def test_a_killed_run_keeps_the_layers_that_are_done(tmp_path):
    def stop(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    task = task_of(TinyConv, 4, store=Store(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        HessianEigenvalue().score(type(task)(**{**vars(task), "progress": stop}))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    scores = HessianEigenvalue().score(task)
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert (scores.loss == HessianEigenvalue().score(task_of(TinyConv, 4)).loss).all()


def test_options_are_checked():
    with pytest.raises(OptionError, match="iterations"):
        HessianEigenvalue(iterations=0).score(task_of(TinyConv, 2))
