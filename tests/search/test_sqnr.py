"""sqnr: rounding noise over signal."""

import numpy as np
import pytest
import torch
from graphwright.passes.quantize.annotate import sqnr_db
from graphwright.search.sensitivity.sqnr import Sqnr
from sensitivity_cases import TinyConv, task_of


def test_it_is_the_reciprocal_of_the_ratio_that_quantize_reports():
    task = task_of(TinyConv)
    scores = Sqnr().score(task)
    for i, layer in enumerate(task.layers):
        for j, choice in enumerate(task.choices):
            assert -10 * np.log10(scores.loss[i, j]) == pytest.approx(sqnr_db(layer.weight, layer.encodings[choice]), rel=1e-4)
    assert not scores.half_width.any() and scores.uncertain() == []


def test_fewer_bits_lose_more_and_no_sample_is_needed():
    task = task_of(TinyConv)
    blind = type(task)(task.program, task.layers, task.choices)
    scores = Sqnr().score(blind)
    assert (np.diff(scores.loss, axis=1) > 0).all() and scores.count == 0


def test_a_weight_of_zeros_loses_nothing():
    task = task_of(TinyConv)
    layer = task.layers[0]
    zero = type(layer)(layer.origin, layer.node, torch.zeros_like(layer.weight), layer.encodings)
    assert not Sqnr().score(type(task)(task.program, (zero,), task.choices)).loss.any()
