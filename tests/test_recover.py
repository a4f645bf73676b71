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
    monkeypatch.setattr(recover, "CALIBRATION", 32)
    monkeypatch.setattr(recover, "_HELD_OUT_STOP", 96)
    output, training = tmp_path / "rows.json", Training(device="cpu")

    def rows(*recipes):
        return recover.run([("resnet20", PIPELINE)], recipes, "held-out", 96, training, 0, output)

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
    images, labels = recover.evaluation(reference, "held-out")
    assert len(images) == len(labels) == 5000 - recover.CALIBRATION
    seen = torch.cat([batch for (batch,) in reference.calibration(recover.CALIBRATION)])
    assert not any(torch.equal(image, seen[-1]) or torch.equal(image, seen[0]) for image in images)


def test_models_without_classes_are_refused():
    with pytest.raises(OptionError, match="'gpt-small' is scored by log-likelihood"):
        recover.run([("gpt-small", PIPELINE)], [Distill()], "test", None, Training(), 0, recover.Path("/nonexistent.json"))
