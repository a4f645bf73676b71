"""Calibration data is checked at the door; each refusal names the batch, the input and the way out."""

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration, random_sample
from graphwright.ir.errors import CalibrationError


@pytest.fixture(scope="module")
def program():
    return capture(torch.nn.Linear(4, 2), torch.zeros(1, 4), name="tiny")


def test_batches_are_cut_to_the_programs_batch(program):
    data = Calibration.for_program(program, [torch.arange(12.0).reshape(3, 4), (torch.ones(2, 4),)])
    assert len(data) == 5
    assert [tuple(s[0].shape) for s in data] == [(1, 4)] * 5
    assert torch.equal(data.samples[1][0], torch.tensor([[4.0, 5, 6, 7]]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "is empty"),
        ([torch.zeros(0, 4)], "batch 0 is empty"),
        ([torch.zeros(1, 5)], r"shape \(1, 5\), but the model takes input: float32\[1x4\]"),
        ([torch.zeros(4)], r"shape \(4,\)"),
        ([torch.zeros(1, 4, dtype=torch.float64)], "float64.*float32"),
        ([torch.zeros(1, 4), torch.tensor([[0.0, 1, float("nan"), 2]])], r"batch 1.*nan at \(0, 2\)"),
        ([torch.tensor([[0.0, float("inf"), 0, 0]])], r"inf at \(0, 1\)"),
        ([(torch.zeros(1, 4), torch.zeros(1))], "2 tensors, but tiny takes 1.*drop the labels"),
        ([["text"]], "holds str"),
    ],
)
def test_bad_samples_are_refused(program, batches, message):
    with pytest.raises(CalibrationError, match=message):
        Calibration.for_program(program, batches)


def test_a_batch_that_does_not_split_is_refused():
    program = capture(torch.nn.Linear(4, 2), torch.zeros(2, 4))
    with pytest.raises(CalibrationError, match=r"batch sizes \[3\].*batch of 2"):
        Calibration.for_program(program, [torch.zeros(3, 4)])


def test_random_samples_only_for_float_inputs(program):
    generator = torch.Generator().manual_seed(0)
    sample = random_sample(program.input_specs, generator)
    assert sample is not None and sample[0].shape == (1, 4)
    tokens = capture(torch.nn.Embedding(5, 3), torch.zeros(1, 2, dtype=torch.int64))
    assert random_sample(tokens.input_specs, generator) is None
