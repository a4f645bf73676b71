"""The bit-exactness bench: it counts what differs, takes what inputs there are, and keeps what it found when interrupted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.errors import DataError
from graphwright.tools.bench import exactness
from graphwright.tools.bench.exactness import Count, count_equal, take_samples


def source(evaluation, calibration):
    """A model of batch 1 with this many samples, each holding its own number; those of calibration count from 100."""

    def batches(start, available, count):
        if count is not None and count > available:
            raise DataError(f"{count} calibration samples requested; ask for 1 to {available}")
        values = torch.arange(start, start + (available if count is None else count), dtype=torch.float32)
        return [(x[:, None],) for x in values.split(4)]

    reference = SimpleNamespace(
        evaluation=lambda count=None: [(inputs, None) for inputs in batches(0, evaluation, count)],
        calibration=lambda count: batches(100, calibration, count),
    )
    return SimpleNamespace(program=capture(torch.nn.ReLU(), torch.zeros(1, 1)), reference=reference)


def values(samples):
    return [float(x) for (x,) in samples]


def test_calibration_inputs_follow_when_evaluation_is_used_up():
    assert take_samples(source(6, 0), 5)[1] == 5
    samples, held_out = take_samples(source(6, 9), 9)
    assert (values(samples), held_out) == ([0, 1, 2, 3, 4, 5, 100, 101, 102], 6)
    assert all(x.shape == (1, 1) for (x,) in samples)


def test_too_few_inputs_are_an_error():
    with pytest.raises(DataError, match="10 inputs wanted, toy has 6 for evaluation.*ask for 1 to 3"):
        model = source(6, 3)
        model.program.name = "toy"
        take_samples(model, 10)
    with pytest.raises(DataError, match="brings no inputs along; name a reference model"):
        take_samples(SimpleNamespace(program=capture(torch.nn.ReLU(), torch.zeros(1, 1)), reference=None), 10)


def test_a_flipped_bit_is_counted():
    """Bits, not values: -0.0 equals 0.0, and still is another answer."""
    expected = [[np.zeros(3, np.float32)], [np.ones(3, np.float32)]]
    assert count_equal(expected, [[x.copy() for x in xs] for xs in expected]) == 2
    assert count_equal(expected, [[np.array([0, -0.0, 0], np.float32)], expected[1]]) == 1
    count = Count(wanted=3)
    count.add(expected, expected)
    assert str(count) == "2 of 2 (3 wanted)"


def test_an_interrupt_keeps_what_was_compared(monkeypatch, tmp_path):
    model = source(6, 3)
    monkeypatch.setattr(exactness, "resolve", lambda name: SimpleNamespace(**vars(model), calibration=lambda path, count: None))
    monkeypatch.setattr(exactness, "CHUNK", 2)
    compiled = exactness.optimize(model.program, pipeline="canonicalize", measure=False)
    monkeypatch.setattr(exactness, "optimize", lambda *args, **kwargs: compiled)

    def progress(done, total, what):
        if done == 4:
            raise KeyboardInterrupt

    found = exactness.measure("toy", 6, 0, tmp_path, progress)
    assert (found.here.equal, found.here.compared, found.arm64.compared) == (4, 4, 0)


def test_a_missing_runner_is_named_before_any_work(tmp_path):
    with pytest.raises(exactness.GraphwrightError, match="no AArch64 runner at .*gw-run.*make runner"):
        exactness.measure("resnet20", 1, 1, tmp_path / "gw-run", lambda *_: None)
