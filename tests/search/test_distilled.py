"""Distilled data: its activations have the statistics that batch norms remember."""

from pathlib import Path

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.errors import DataError, OptionError
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.quantize.annotate import Quantize
from graphwright.search.sensitivity.base import Task
from graphwright.search.sensitivity.distilled import distil
from graphwright.search.sensitivity.hessian_trace import HessianTrace
from graphwright.search.sensitivity.layers import weight_layers
from graphwright.tools.sources import Source
from torch import nn


class Normed(nn.Module):
    """Two convolutions with batch norms that have seen data of mean 3 and deviation 2."""

    def __init__(self, dynamic: bool = False) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.na(self.a(x)))
        return self.head(torch.relu(self.nb(self.b(x))).mean((2, 3)))


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "symbolic"])
def program(request):
    torch.manual_seed(0)
    model = Normed().train()
    for _ in range(200):
        model(3 + 2 * torch.randn(40, 2, 8, 8))
    return capture(model.eval(), torch.randn(1, 2, 8, 8), dynamic_batch=request.param)


def test_distilled_inputs_look_like_what_the_network_was_trained_on(program):
    found = distil(program, count=40, steps=120)
    assert found.after < 0.05 * found.before
    values = torch.cat([sample[0] for sample in found.calibration])
    assert values.shape == (40, 2, 8, 8)
    assert float(values.mean()) == pytest.approx(3.0, abs=0.5) and float(values.std()) == pytest.approx(2.0, abs=0.6)


def test_a_label_free_scorer_runs_on_it_and_agrees_with_real_data(program):
    if program.input_specs[0].shape[0] is None:
        pytest.skip("one batch is enough here")
    data = distil(program, count=32, steps=150).calibration
    real = type(data)(tuple((3 + 2 * torch.randn(1, 2, 8, 8),) for _ in range(32)))
    noise = type(data)(tuple((torch.randn(1, 2, 8, 8),) for _ in range(32)))
    canonical = PassManager().run(program, parse("canonicalize")).program
    layers = weight_layers(canonical, Quantize(), ("int4",))
    distilled, true, random = (
        HessianTrace().score(Task(canonical, layers, ("int4",), d)).loss[:, 0] for d in (data, real, noise)
    )
    assert ((distilled / true).max() < 2) and ((distilled / true).min() > 0.5)
    assert abs(distilled / true - 1).max() < abs(random / true - 1).max()


def test_the_same_seed_gives_the_same_data(program):
    first, second, other = (distil(program, 2, 3, seed=seed).calibration.samples for seed in (1, 1, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_without_batch_norms_it_is_refused(program):
    if program.input_specs[0].shape[0] is not None:
        canonical = PassManager().run(program, parse("canonicalize")).program
        with pytest.raises(DataError, match="as captured, before batch norms are folded"):
            distil(canonical)
    with pytest.raises(DataError, match="no batch norm"):
        distil(capture(nn.Linear(3, 2), torch.randn(1, 3)))


def test_the_word_distilled_stands_for_a_calibration_file(program):
    batches = Source(program).calibration(Path("distilled"), 4)
    assert [tuple(batch[0].shape) for batch in batches] == [(1, 2, 8, 8)] * 4
    with pytest.raises(DataError, match="no batch norm"):
        Source(capture(nn.Linear(3, 2), torch.randn(1, 3))).calibration(Path("distilled"), 4)


def test_token_inputs_and_silly_options_are_refused(program):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(5, 4), nn.BatchNorm1d(4)

        def forward(self, ids):
            return self.norm(self.embed(ids).mean(1))

    with pytest.raises(DataError, match="not float"):
        distil(capture(Tokens().eval(), torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(OptionError, match="at least 1"):
        distil(program, count=0)
