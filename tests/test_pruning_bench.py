"""Networks that the pruning table keeps, so that another command can time them in a quiet moment."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.errors import DataError
from graphwright.ir.load import load_program
from graphwright.tools.bench.pruning import Point, save_networks
from models import small_cnn, small_inputs


def test_networks_are_kept_by_the_names_of_their_methods_and_read_back(tmp_path):
    program = capture(small_cnn().eval(), (small_inputs(1),))
    points = [
        Point("net", "float", 1.0, 0.9, 0.9, 0.0, program),
        Point("net", "Torch-Pruning 1.6.0: taylor, global, new statistics", 0.5, 0.8, 0.9, 1.0, program),
    ]
    paths = save_networks(points, tmp_path / "networks")
    assert [p.name for p in paths] == ["net-float.onnx", "net-Torch-Pruning-1.6.0-taylor-global-new-statistics.onnx"]
    x = small_inputs(1, seed=3)
    for path in paths:
        assert torch.allclose(load_program(path)(x)[0], program(x)[0], atol=1e-5)


def test_a_network_that_was_not_kept_is_named(tmp_path):
    with pytest.raises(DataError, match="network of 'taylor' was not kept; .* programs=True"):
        save_networks([Point("net", "taylor", 0.5, 0.8, 0.9, 1.0)], tmp_path)
