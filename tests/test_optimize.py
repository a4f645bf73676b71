"""The main job end to end on a small network: capture to artifact, with its evidence."""

import numpy as np
import pytest
import torch
from graphwright import load, optimize
from graphwright.ir.errors import CalibrationError, CaptureError, OptionError, PassError, UnknownNameError
from graphwright.ir.program import Stage
from graphwright.tools.report import ConstraintError
from models import small_cnn, small_inputs


@pytest.fixture(scope="module")
def result():
    model = small_cnn()
    x = small_inputs(64, seed=1)
    labels = model(x).argmax(1)

    def agreement(predict):
        return float((predict(x).argmax(1) == labels).float().mean())

    return optimize(model, "cpu", example_inputs=small_inputs(), calibration=[x], evaluate=agreement)


def test_the_result_is_integer_and_close(result):
    assert result.program.stage is Stage.INTEGER
    before, after = result.report.rows
    assert before.score == 1.0
    assert after.score >= 0.9
    assert before.latency_ms > 0 and after.latency_ms > 0


def test_the_artifact_equals_the_reference_bit_for_bit(result, tmp_path):
    path = tmp_path / "model.gw"
    result.artifact.save(path)
    model = load(path)
    for x in small_inputs(50, seed=2).split(1):
        assert torch.equal(model(x), result.program(x)[0])
        assert np.array_equal(model(x.numpy()), result.program(x)[0].numpy())


def test_the_certificate_travels(result, tmp_path):
    assert [row["name"] for row in result.artifact.certificate] == [row.name for row in result.report.certificate]
    assert result.artifact.plan == result.plan.to_json()
    assert "quantize" in str(result.report)
    result.report.save_html(tmp_path / "report.html")
    assert "lower-integer" in (tmp_path / "report.html").read_text()


def test_parameters_are_really_smaller(result):
    row = next(r for r in result.report.certificate if r.name == "lower-integer")
    assert row.bytes_after < 0.5 * row.bytes_before


def test_the_same_seed_gives_the_same_artifact_program(result):
    again = optimize(small_cnn(), "cpu", example_inputs=small_inputs(), calibration=[small_inputs(64, seed=1)], measure=False)
    x = small_inputs(1, seed=9)
    assert torch.equal(again.program(x)[0], result.program(x)[0])


def test_unmet_limits_are_all_named():
    arguments = {"example_inputs": small_inputs(), "calibration": [small_inputs(8)], "measure": False}
    with pytest.raises(ConstraintError, match=r"misses 2 of 2 limits: max_drop: limit 0.1, reached 1; size: limit 0, reached"):
        scores = iter([1.0, 0.0])
        optimize(small_cnn(), evaluate=lambda predict: next(scores), constraints={"max_drop": 0.1, "size": 0}, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"constraints": {"max_dorp": 0.1}}, UnknownNameError, "did you mean 'max_drop'"),
        ({"constraints": {"max_drop": 0.1}}, OptionError, "needs evaluate"),
        ({"constraints": {"latency": -1}}, OptionError, "at least 0"),
        ({"constraints": {"latency": 0.5}, "measure": False}, OptionError, "needs measure"),
        ({"target": "x68"}, UnknownNameError, "did you mean 'x86'"),
        ({"calibration": None}, PassError, "needs calibration data"),
        ({"calibration": []}, CalibrationError, "is empty"),
        ({"calibration": [torch.zeros(2, 3, 12, 13)]}, CalibrationError, "has shape"),
        ({"pipeline": "canonicalise"}, UnknownNameError, "did you mean 'canonicalize'"),
        ({"pipeline": "quantize{weight_bit=8}"}, UnknownNameError, "did you mean 'weight_bits'"),
        ({"example_inputs": None}, CaptureError, "needs example_inputs"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"example_inputs": small_inputs(), "calibration": [small_inputs(8)], "measure": False}
    with pytest.raises(error, match=message):
        optimize(small_cnn(), **(good | arguments))


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch, result):
    import os

    def stop(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        result.artifact.save(tmp_path / "model.gw")
    assert not list(tmp_path.iterdir())
