"""`graphwright tune`: which kernels it finds, that it resumes, and that a slower choice never replaces the guess."""

import dataclasses

import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.kernels import linear_int8
from graphwright.backends.tvm.kernels.base import Tail
from graphwright.backends.tvm.tuning import TuningDatabase
from graphwright.backends.tvm.tuning import measure as measuring
from graphwright.backends.tvm.tuning.measure import Measured, measure
from graphwright.ir.capture import capture
from graphwright.ir.errors import GraphwrightError
from graphwright.tools import tune as tuning
from graphwright.tools.cli import app
from graphwright.tools.quick import quick_program
from graphwright.tools.sources import Source
from typer.testing import CliRunner

HERE = Target.parse("cpu")


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(16, 32, 3, padding=1)
        self.depthwise = torch.nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.second = torch.nn.Conv2d(32, 32, 1)
        self.third = torch.nn.Conv2d(32, 32, 1)

    def forward(self, x):
        return self.third(torch.relu(self.second(self.depthwise(self.first(x)))))


@pytest.fixture(scope="module", params=["int8", "float32"])
def kernels(request):
    source = Source(capture(Small().eval(), torch.randn(1, 16, 8, 8)))
    return tuning.kernels_of(quick_program(source, request.param), HERE)


def test_distinct_products_are_tunable_and_depthwise_is_not(kernels):
    works = [k.key.split(maxsplit=1)[1].removeprefix("int8 ").removeprefix("uint8 ") for k in kernels]
    assert works[0].removesuffix(", planar") == "16x8x8 -> 32x8x8, 3x3, pad 1"
    assert set(works[1:]) == {"32x8x8 -> 32x8x8, 1x1"}
    assert len({k.key for k in kernels}) == len(kernels)


def test_a_run_continues_where_the_last_one_stopped(kernels, tmp_path, monkeypatch):
    path, calls = tmp_path / "rows.jsonl", []

    def fake(generator, spec, target, threads, board):
        calls.append(spec)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return Measured({"rows": 1, "groups": 1}, 1.0, 2.0, 1.1, 2.1, 5)

    monkeypatch.setattr(measuring, "measure", fake)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(kernels, HERE, 1, path)
    assert len(TuningDatabase.read(path)) == 1
    outcome = tuning.tune(kernels, HERE, 1, path)
    assert (len(outcome.measured), outcome.kept, outcome.remaining) == (len(kernels) - 1, 1, 0)
    assert len(calls) == len(kernels) + 1
    assert tuning.tune(kernels, HERE, 1, path).kept == len(kernels)
    # Another thread count is another measurement; --again measures in any case; a spent budget begins nothing.
    assert len(tuning.tune(kernels, HERE, 2, path).measured) == len(kernels)
    assert len(tuning.tune(kernels, HERE, 2, path, again=True).measured) == len(kernels)
    assert tuning.tune(kernels, HERE, 1, path, budget=-1.0).remaining == len(kernels)


def test_a_real_measurement_covers_the_space_and_keeps_the_guess_within_noise(monkeypatch):
    monkeypatch.setattr(measuring, "BATCH_SECONDS", 1e-5)
    monkeypatch.setattr(measuring, "FINAL_ROUNDS", 1)
    spec = (linear_int8.LinearInt8(3, 20, 40, "uint8", 3), Tail("none", "int32"), "portable")
    space = measuring.FAMILIES[linear_int8.build].space(spec)
    monkeypatch.setattr(measuring, "NOISE", 0.0)
    kept = measure(linear_int8.build, spec, HERE, 1)
    assert kept.choice is None and kept.candidates == len(space) + 1
    assert 0 < kept.microseconds == kept.guess_microseconds
    monkeypatch.setattr(measuring, "NOISE", 1e9)
    found = measure(linear_int8.build, spec, HERE, 1)
    assert found.choice is None or found.choice in space


def test_the_whole_model_is_timed_both_ways(tmp_path):
    program = quick_program(Source(capture(Small().eval(), torch.randn(1, 16, 8, 8))), "int8")
    found = tuning.end_to_end(program, HERE, 1, tmp_path / "none.jsonl", rounds=1)
    assert all(0 < least <= median for least, median in dataclasses.astuple(found))


def test_the_command_lists_kernels_without_measuring(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["tune", "resnet20", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "convolution_int8 uint8 64x7x7 -> 64x7x7, 3x3, pad 1" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODELS or --all-zoo"),
        (["resnet20", "--all-zoo"], "exactly one"),
        (["resnet20", "--precision", "int4"], "unknown precision 'int4'"),
        (["resnet20", "--target", "arm64:cortex-a76"], "cannot run arm64"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, message):
    done = CliRunner().invoke(app, ["tune", *arguments])
    assert isinstance(done.exception, GraphwrightError)
    assert message in str(done.exception)
