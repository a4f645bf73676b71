"""linearize-activations: exact where the activation is a line already, the best line elsewhere, priced before it is chosen."""

from __future__ import annotations

import pytest
import torch
from block_models import canonical, compress, residual, transformer
from graphwright.ir.errors import OptionError, PassError, UnknownNameError
from graphwright.passes.prune.linearize_activations import candidates
from torch import nn


class Positive(nn.Module):
    """Layers of positive numbers, so that the ReLU between them passes everything; `padding` of the second convolution."""

    def __init__(self, padding: int = 0, convolutional: bool = True) -> None:
        super().__init__()
        pair = (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 2, 3, padding=padding)) if convolutional else (nn.Linear(3, 8), nn.Linear(8, 3))
        self.body = nn.Sequential(pair[0], nn.ReLU(), pair[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0.1, 1.0)

    def forward(self, x):
        return self.body(torch.sigmoid(x))


@pytest.mark.parametrize(("model", "shape"), [(Positive(), (1, 2, 9, 9)), (Positive(convolutional=False), (1, 4, 3))])
def test_a_line_is_replaced_exactly(model, shape):
    result = compress(canonical(model, *shape), "linearize-activations{layers=[body.1]}")
    assert result.certificate[-1].relative < 1e-5
    assert candidates(result.program) == []


def test_padding_costs_the_border_only():
    program = canonical(Positive(padding=1), 1, 2, 9, 9)
    after = compress(program, "linearize-activations{layers=[body.1]}").program
    x = torch.randn(1, 2, 9, 9)
    before, now = program(x)[0], after(x)[0]
    torch.testing.assert_close(now[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-4)
    assert now.shape == before.shape and not torch.allclose(now, before, rtol=1e-4)


def test_only_what_saves_is_chosen_and_the_price_is_reported():
    result = compress(transformer(2), "linearize-activations{count=1,criterion=fit}")
    stats = result.certificate[-1].stats
    assert stats["linearized"] in ("blocks.0.gelu", "blocks.1.gelu")
    assert (stats["macs_before"], stats["macs_after"]) == (9 * 2 * 8 * 16, 9 * 8 * 8)
    assert len(result.program.graph.nodes) < len(transformer(2).graph.nodes)
    with pytest.raises(PassError, match="has 0 whose layers take fewer multiply-accumulates as one, of 4"):
        compress(residual(), "linearize-activations{count=1}")


@pytest.mark.parametrize("criterion", ["fit", "output-distortion"])
def test_the_activation_that_is_nearly_a_line_goes(criterion):
    program = transformer(3)
    layer = next(c for c in candidates(program) if c.name == "blocks.1.gelu").first.node
    # Values far above zero, where GELU is the identity.
    program.replace_parameter(layer.args[2], program.parameter(layer.args[2]) + 9.0)
    program.sweep()
    result = compress(program, f"linearize-activations{{count=1,criterion={criterion}}}")
    assert result.certificate[-1].stats["linearized"] == "blocks.1.gelu"


def test_named_ones_go_whatever_they_cost():
    result = compress(residual(), "linearize-activations{layers=[blocks.0.1,blocks.3.1]},merge-parallel")
    assert result.certificate[0].stats["macs_after"] > result.certificate[0].stats["macs_before"]
    assert result.certificate[1].stats == {"merged": 2}


def test_bad_input_is_refused():
    with pytest.raises(OptionError, match="one of the two"):
        compress(transformer(1), "linearize-activations")
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks\.0\.gelu'"):
        compress(transformer(2), "linearize-activations{layers=[blocks.0.gel]}")
    with pytest.raises(PassError, match="needs calibration data"):
        compress(transformer(2), "linearize-activations{count=1}", calibrated=False)
