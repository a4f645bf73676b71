"""Rows of what distillation wins back: made once, resumed, tabled."""

from __future__ import annotations

import json

import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.passes.base import Training
from graphwright.passes.recover.distill import Distill
from graphwright.tools import recover, zoo
from graphwright.tools.bench.tables import app
from typer.testing import CliRunner

PIPELINE = "canonicalize,sparsify-magnitude{sparsity=0.9}"


def test_rows_are_made_once_and_tabled(tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "_HELD_OUT_STOP", 96)
    output, setup = tmp_path / "rows.json", recover.Setup(samples=96, calibration=32, training=Training(device="cpu"))

    def rows(*recipes):
        return recover.run([("resnet20", PIPELINE)], recipes, setup, output)

    first = rows(Distill(batch_size=32))
    (row,) = first
    assert (row.samples, row.steps, row.macs, row.device) == (96, 2, 1.0, "cpu")
    assert row.float_score > 0.9 and row.loss_after <= row.loss_before
    monkeypatch.setattr(recover.Bench, "recover", None)
    assert rows(Distill(batch_size=32)) == first
    with pytest.raises(TypeError):
        rows(Distill(batch_size=16))
    table = CliRunner().invoke(app, ["recovery", str(output)])
    assert table.exit_code == 0 and f"`{PIPELINE}`" in table.output and "distill{batch_size=32}" in table.output
    assert len(json.loads(output.read_text())) == 1


def test_held_out_samples_are_none_that_passes_see():
    reference = zoo.load("resnet20")
    images, labels = recover.held_out(reference)
    assert len(images) == len(labels) == 5000 - recover.CALIBRATION
    seen = torch.cat([batch for (batch,) in reference.calibration(recover.CALIBRATION)])
    assert not any(torch.equal(image, seen[-1]) or torch.equal(image, seen[0]) for image in images)


def test_models_without_classes_have_no_held_out_rows(tmp_path):
    with pytest.raises(OptionError, match="'gpt-small' is scored by log-likelihood: use --split test"):
        recover.run([("gpt-small", PIPELINE)], [Distill()], recover.Setup(), tmp_path / "rows.json")


def test_a_language_model_is_scored_by_perplexity(tmp_path):
    reference = zoo.load("gpt-small")
    setup = recover.Setup("test", samples=4, calibration=2, evaluate=2, training=Training(device="cpu"))
    (row,) = recover.run([("gpt-small", PIPELINE)], [Distill(batch_size=2)], setup, tmp_path / "rows.json")
    expected = reference.evaluate(lambda inputs: reference.model(*inputs), 2)
    assert row.float_score == pytest.approx(zoo.perplexity(expected), rel=1e-4)
    assert row.before > 2 * row.float_score > row.float_score
    table = CliRunner().invoke(app, ["recovery", str(tmp_path / "rows.json")])
    assert f"{100 * (row.before / row.float_score - 1):.1f}%" in table.output


def test_what_lost_tokens_can_be_recovered(tmp_path):
    pipeline = "canonicalize,reduce-tokens{per_layer=4}"
    setup = recover.Setup("test", samples=16, calibration=4, evaluate=16, training=Training(device="cpu"))
    (row,) = recover.run([("vit-tiny", pipeline)], [Distill(batch_size=8)], setup, tmp_path / "rows.json")
    assert (row.samples, row.steps) == (16, 1) and 0.7 < row.macs < 0.75
    assert row.loss_after <= row.loss_before
