"""The layer-by-layer walk: rows are the layer as a matrix product, and what was rewritten is what later layers read."""

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.passes.layerwise import Layerwise, relative_error, signal_of
from torch import nn


def walk_of(model: nn.Module, shape: tuple[int, ...], samples: int = 8) -> Layerwise:
    torch.manual_seed(0)
    program = capture(model.eval(), (torch.zeros(1, *shape),))
    return Layerwise(program, tuple((torch.randn(1, *shape),) for _ in range(samples)), lambda *_: None, "test")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv2d(6, 9, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=3), (6, 7, 9)),
        (nn.Conv2d(5, 5, 3, groups=5, bias=False), (5, 6, 6)),
        (nn.Conv1d(4, 7, 5, padding=2), (4, 11)),
        (nn.Linear(13, 3), (5, 13)),
    ],
)
def test_the_rows_multiplied_by_the_weight_are_the_layer_s_outputs(model, shape):
    walk = walk_of(model, shape)
    (rows,) = [walk.rows(layer, 40, torch.Generator().manual_seed(1)) for layer in walk.layers()]
    assert rows.inputs.shape[1] == 40 and rows.fitted == 30
    torch.testing.assert_close(rows.outputs(rows.weight), rows.targets)
    assert rows.error(rows.weight) < 1e-10 < rows.error(torch.zeros_like(rows.weight))


def test_later_layers_read_what_the_rewritten_ones_give():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    walk = walk_of(model, (6,))
    generator = torch.Generator().manual_seed(1)
    for index, layer in enumerate(walk.layers()):
        rows = walk.rows(layer, 8, generator)
        if index == 0:
            walk.rewrite(layer, torch.zeros_like(rows.weight), torch.full_like(rows.bias, 3.0))
        else:
            assert torch.equal(rows.inputs, torch.full_like(rows.inputs, 3.0))
            assert not torch.equal(rows.exact_inputs, rows.inputs)
            torch.testing.assert_close(rows.exact_inputs @ rows.weight.transpose(1, 2) + rows.bias, rows.targets)
    # The program itself is untouched.
    torch.testing.assert_close(walk.program(torch.ones(1, 6))[0], model(torch.ones(1, 6)))


def test_transposed_convolutions_are_walked_through_but_not_shown():
    walk = walk_of(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 1)), (3, 5, 5))
    assert [layer.out_channels for layer in walk.layers()] == [2]


def test_errors_of_rows_that_do_not_vary_are_relative_to_their_size():
    constant = torch.full((1, 16, 2), 3.0)
    wanted = constant + 1e-7 * torch.randn(1, 16, 2)
    assert signal_of(wanted) == pytest.approx(16 * 2 * 9.0)
    varied = torch.randn(1, 16, 2) + 3.0
    assert signal_of(varied) == pytest.approx(float((varied - varied.mean(1, keepdim=True)).square().sum()), rel=1e-5)
    assert relative_error(0.5, signal_of(torch.zeros(1, 4, 1))) == 0.5
