import torch
import torch.nn.functional as F
from graphwright.ir.program import origin_of
from graphwright.passes.quantize.regions import find_regions
from quantize_models import BLOCK, Block, Concat, ConvNet, Mixed, prepared
from torch import nn


def sources(program, **options) -> list[str]:
    return [p.source.target.__name__.split(".")[0] if p.source.op == "call_function" else p.source.op
            for p in find_regions(program, **options).placements]  # fmt: skip


def test_encodings_sit_after_the_clamp_and_before_the_pool():
    program, _ = prepared(ConvNet, (1, 3, 9, 9))
    clamp = "relu6" if any("relu6" in str(n.target) for n in program.nodes) else "hardtanh"
    assert sources(program) == ["placeholder", "relu", clamp, clamp, "convolution", "add", "mean"]


def test_logits_and_what_only_feeds_them_stay_float():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return torch.sigmoid(self.a(x) + self.b(x)) * 2

    program, _ = prepared(Net, (1, 2, 4, 4))
    assert sources(program) == ["placeholder"]


def test_concat_parts_without_other_readers_share_the_encoding_of_the_result():
    program, _ = prepared(Mixed, (1, 3, 8, 8))
    found = sources(program)
    assert "cat" in found and "mul" in found, "the product is also read by a convolution"
    assert "gelu" not in found, "this part is read by the concat alone"


def test_a_concat_part_with_other_readers_keeps_its_own_encoding():
    program, _ = prepared(Concat, (1, 2, 4, 4))
    assert sources(program) == ["placeholder", "relu", "cat"]


def test_the_residual_stream_of_a_transformer_stays_float():
    program, _ = prepared(Block, BLOCK)
    found = sources(program)
    assert "add" not in found
    assert found.count("layer_norm") == 2, "the two that linear layers read; the last one feeds a float mean"
    assert found == ["layer_norm", "linear", "softmax", "matmul", "layer_norm", "linear", "gelu", "mean"]


def test_the_second_operand_of_a_matmul_is_signed():
    program, _ = prepared(Block, BLOCK)
    signed = {origin_of(p.source): p.signed for p in find_regions(program).placements}
    assert signed["qkv"] and not signed["fc1"] and not signed["norm1"]


def test_clamps_of_values_with_several_readers_become_tables():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = self.a(x)
            return self.c(self.b(torch.relu(y)) + y)

    program, _ = prepared(Net, (1, 2, 4, 4))
    assert sources(program) == ["placeholder", "convolution", "relu", "convolution", "add"]


def test_skipped_layers_take_their_inputs_along():
    program, _ = prepared(ConvNet, (1, 3, 9, 9))
    stem = [n for n in program.nodes if origin_of(n) == "stem"]
    regions = find_regions(program, skip=stem)
    assert stem[0] not in regions.layers
    assert sources(program, skip=stem)[0] == "relu"


def test_transposed_convolutions_and_dynamic_weights_are_no_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 2, 2, 2)

        def forward(self, x, w):
            return self.up(x) + F.conv2d(x, w, padding=2)[:, :, :8, :8]

    from graphwright.ir.capture import capture

    program = capture(Net(), (torch.randn(1, 2, 4, 4), torch.randn(2, 2, 1, 1)))
    regions = find_regions(program)
    assert regions.layers == () and regions.placements == ()
