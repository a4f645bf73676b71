"""Fine-tuning in `optimize` and on the command line: where it stands, what it trains on, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from graphwright import Finetune, optimize
from graphwright.ir.capture import capture
from graphwright.ir.errors import CalibrationError, DataError, OptionError, UnknownNameError
from graphwright.ir.program import Stage
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.recover.distill import Distill
from graphwright.tools.cli import app
from graphwright.tools.finetune import with_distill
from graphwright.tools.predict import program_predict
from graphwright.tools.zoo import load as load_reference
from models import small_cnn, small_inputs
from typer.testing import CliRunner

LOW_BIT = "canonicalize,quantize{weight_bits=2,activation_bits=4},lower-integer"


def low_bit(finetune: Finetune | None):
    batches = [small_inputs(64, seed=1)]
    return optimize(
        small_cnn(), example_inputs=small_inputs(), calibration=batches, pipeline=LOW_BIT, measure=False, finetune=finetune
    )


@pytest.mark.parametrize(
    "pipeline, expected",
    [
        ("canonicalize,quantize,align-scales,lower-integer", "canonicalize,quantize,align-scales,DISTILL,lower-integer"),
        ("canonicalize,quantize,adaround", "canonicalize,quantize,adaround,DISTILL"),
        ("canonicalize,distill,quantize", "canonicalize,distill,quantize"),
    ],
)  # fmt: skip
def test_where_it_stands(pipeline, expected):
    recipe = Distill() if "distill" in pipeline else Distill(epochs=3)
    assert str(with_distill(parse(pipeline), recipe)) == expected.replace("DISTILL", "distill{epochs=3}")


def test_two_recipes_and_nothing_to_win_back_are_errors():
    with pytest.raises(OptionError, match="give them in one place"):
        with_distill(parse("canonicalize,distill{epochs=2},quantize"), Distill(epochs=3))
    with pytest.raises(OptionError, match="nothing in 'canonicalize,equalize' compresses or quantizes"):
        with_distill(parse("canonicalize,equalize"), Distill())


def test_optimize_trains_on_its_own_data_and_the_plan_says_so(tmp_path):
    before = low_bit(None)
    finetune = Finetune(
        epochs=4, batch_size=16, learning_rate=3e-3, data=[small_inputs(256, seed=7)], checkpoints=tmp_path, device="cpu"
    )
    after = low_bit(finetune)
    assert after.program.stage is Stage.INTEGER
    x = small_inputs(64, seed=5)
    expected = small_cnn()(x).detach()
    predictions = [program_predict(result.program)(x) for result in (before, after)]
    errors = [float((torch.as_tensor(y) - expected).square().sum()) for y in predictions]
    assert errors[1] < 0.7 * errors[0]
    (row,) = [r for r in after.report.certificate if r.name == "distill"]
    assert row.stats["samples"] == 256 and row.stats["held_out_after"] < row.stats["held_out_before"]
    assert "distill{epochs=4,learning_rate=0.003,batch_size=16},lower-integer" in after.plan.pipeline
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_a_bit_search_with_it_trains_what_stands_before_quantize_once():
    model, steps = small_cnn(), []
    pipeline = "canonicalize,distill{epochs=1,batch_size=16},quantize{weight_observer=mse},lower-integer"
    optimize(
        model, example_inputs=small_inputs(), calibration=[small_inputs(64, seed=1)], pipeline=pipeline, measure=False,
        constraints={"average_bits": 4.0}, finetune=Finetune(data=[small_inputs(128, seed=7)], device="cpu"),
        progress=lambda done, total, what: steps.append(done) if what == "distill" else None,
    )  # fmt: skip
    assert steps == list(range(7 + 1))


def test_a_program_that_is_compressed_already_is_quantized_by_default():
    canonical = PassManager().run(capture(small_cnn(), small_inputs()), parse("canonicalize")).program
    canonical.stage = Stage.COMPRESSED
    result = optimize(canonical, calibration=[small_inputs(16, seed=1)], measure=False)
    assert result.program.stage is Stage.INTEGER


def test_wrong_data_is_an_error():
    with pytest.raises(CalibrationError, match=r"input 'x' has shape \(8, 3, 9, 9\)"):
        low_bit(Finetune(data=[torch.randn(8, 3, 9, 9)]))


def test_training_samples_are_neither_calibration_nor_evaluation_samples():
    reference = load_reference("resnet20")
    training = torch.cat([batch for (batch,) in reference.training(64) or []])
    others = [batch for (batch,) in reference.calibration(64)] + [inputs[0] for inputs, _ in reference.evaluation(64)]
    assert training.shape == (64, 1, 28, 28)
    assert not any(torch.equal(a, b) for a in training for batch in others for b in batch)
    assert load_reference("minilm-l6").training(8) is None


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_line_trains_and_replays(tmp_path):
    common = ["--finetune-samples", 96, "--samples", 32, "--device", "cpu", "--checkpoints", tmp_path / "kept"]
    pipeline, plan, rows = "canonicalize,quantize{weight_bits=4},lower-integer", tmp_path / "plan.json", tmp_path / "rows.json"
    done = command(
        "optimize", "resnet20", "-o", tmp_path / "model.gw", "-p", pipeline, *common, "--finetune", "distill{batch_size=32}",
        "--evaluate", 0, "--no-measure", "--plan", plan,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "quantize{weight_bits=4},distill{batch_size=32},lower-integer" in json.loads(plan.read_text())["pipeline"]
    assert command("rewrite", "resnet20", "--plan", plan, *common, "--certificate", rows).exit_code == 0
    (row,) = [r for r in json.loads(rows.read_text()) if r["name"] == "distill"]
    assert row["stats"]["samples"] == 96
    assert len(list((tmp_path / "kept").glob("*.pt"))) == 1


@pytest.mark.parametrize(
    "options, error, message",
    [
        (["--finetune", "distil"], UnknownNameError, "did you mean 'distill'"),
        (["--finetune", "canonicalize"], OptionError, "--finetune takes distill with its options"),
        (["--finetune", "distill", "--finetune-samples", 99999], DataError, "99999 Fashion-MNIST training images requested"),
        (["--finetune-samples", 9], OptionError, "--finetune-samples is for --finetune"),
        (["--device", "cpu"], OptionError, "--device is for --finetune"),
    ],
)
def test_wrong_options_are_errors(options, error, message, tmp_path):
    done = command("optimize", "resnet20", "-o", tmp_path / "model.gw", "--samples", 8, *options)
    assert isinstance(done.exception, error) and message in str(done.exception)
