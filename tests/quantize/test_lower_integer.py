import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphwright.ir.dialect import gw
from graphwright.ir.errors import PassError
from graphwright.ir.program import Stage, dtype_of, origin_of
from graphwright.ir.verify import is_gw
from quantize_models import BLOCK, Block, Concat, ConvNet, Mixed, prepare, prepared, run, seeded, targets
from torch import nn

MODES = ["float-scale", "dyadic"]
EDGES = {"gw.quantize", "gw.dequantize", "gw.scale"}


def lower(model_class, shape, mode="float-scale", quantize="quantize", **options):
    """The lowered model, made once: a cache tells a default that is spelled out from one that is not."""
    return _lower(model_class, shape, mode, quantize, tuple(sorted(options.items())))


@functools.lru_cache
def _lower(model_class, shape, mode, quantize, options):
    program, context = prepared(model_class, shape, **dict(options))
    return run(program, f"{quantize},lower-integer{{rescale={mode}}}", context)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("model", "shape"), [(ConvNet, (2, 3, 13, 11)), (Mixed, (2, 3, 8, 8)), (Block, BLOCK)])
def test_integers_follow_the_annotated_program(model, shape, mode):
    row = lower(model, shape, mode).certificate[-1]
    assert row.relative < 0.04 and row.sqnr_db > 30


@pytest.mark.parametrize("mode", MODES)
def test_a_convolutional_network_is_integer_from_edge_to_edge(mode):
    result = lower(ConvNet, (2, 3, 13, 11), mode)
    program, stats = result.program, result.certificate[-1].stats
    assert program.stage is Stage.INTEGER and stats["islands"] == [] and stats["edges"] == {"quantize": 1, "scale": 1}
    rescale = "gw.rescale_dyadic" if mode == "dyadic" else "gw.rescale"
    convolution = ["gw.convolution", rescale]
    assert targets(program) == [
        "gw.quantize", *convolution * 4, "gw.add", "gw.max_pool2d", "gw.sum", rescale, "gw.linear", "gw.scale",
    ]  # fmt: skip
    inside = [n for n in program.nodes if is_gw(n)][1:-1]
    assert all(not dtype_of(n).is_floating_point for n in inside)


def test_parameters_are_small_integers_afterwards():
    result = lower(ConvNet, (1, 3, 9, 9))
    tensors = result.program.parameters()
    floats = [t for t in tensors.values() if t.is_floating_point()]
    assert all(t.dim() == 1 for t in floats), "only scales of rescaling are float"
    weights = [t for t in tensors.values() if t.dim() > 1]
    assert len(weights) == 5 and all(t.dtype == torch.int8 for t in weights)
    assert not any(is_fake for is_fake in ("fake" in t for t in targets(result.program)))


def test_dyadic_programs_hold_no_float_between_the_edges():
    program = lower(ConvNet, (1, 3, 9, 9), "dyadic").program
    floats = [n for n, t in program.parameters().items() if t.is_floating_point()]
    assert floats == [n for n in floats if n.endswith("head_scale")] and len(floats) == 1


def test_relu6_becomes_code_limits():
    program = lower(ConvNet, (1, 3, 9, 9)).program
    limits = {origin_of(n): n.args[2:5] for n in program.nodes if n.target is gw.rescale.default}
    zero, low, high = limits["depthwise"]
    assert low == zero == 0 and high <= 255
    assert limits["stem"][0] == 0, "relu leaves nothing below zero"


def test_tables_replace_activations():
    result = lower(Mixed, (2, 3, 8, 8))
    names = targets(result.program)
    assert names.count("gw.lookup") >= 4 and "gw.multiply" in names and "gw.sum_pool2d" in names
    assert result.certificate[-1].stats["islands"] == []


def test_a_table_holds_the_float_function_on_every_code():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.b(F.silu(self.a(x)))

    program, context = prepared(Net, (1, 2, 4, 4))
    annotated = run(program, "quantize", context).program
    scales = {k: float(v) for k, v in annotated.parameters().items() if k.endswith("scale") and v.numel() == 1}
    zeros = {k: int(v) for k, v in annotated.parameters().items() if k.endswith("zero_point") and v.numel() == 1}
    lowered = run(annotated, "lower-integer", context).program
    table = next(t for k, t in lowered.parameters().items() if "table" in k)
    codes = (torch.arange(256, dtype=torch.float64) - zeros["convolution_zero_point"]) * scales["convolution_scale"]
    expected = torch.round(F.silu(codes) / scales["silu_scale"]) + zeros["silu_zero_point"]
    assert int((table.to(torch.int64) - expected.clamp(0, 255).to(torch.int64)).abs().max()) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_block_names_its_islands(masked):
    result = lower(Block, BLOCK, **({"masked": True} if masked else {}))
    names, islands = targets(result.program), result.certificate[-1].stats["islands"]
    found = [(i["op"].removesuffix(".default"), i["origin"]) for i in islands]
    assert found.count(("aten.layer_norm", "norm1")) == 2 and ("aten.softmax.int", "softmax") in found
    assert sum(op == "aten.add.Tensor" for op, _ in found) == (3 if masked else 2)
    assert all(i["why"] for i in islands)
    assert "gw.softmax" in names and "gw.layer_norm" in names and names.count("gw.matmul") == 2 and names.count("gw.linear") == 5
    assert "gw.reduce_sum" in names and "aten.mean.dim" not in names
    assert "gw.dequantize" not in names, "accumulators leave by gw.scale; nothing is rounded to 8 bits on the way out"


def test_float_sums_and_norms_have_a_fixed_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 7)

        def forward(self, x):
            y = self.a(x)
            return y.sum((0, 1)), torch.linalg.vector_norm(y, dim=-1, keepdim=True)

    program, context = prepare(seeded(Net), (2, 3, 6))
    result = run(program, "quantize,lower-integer", context)
    names = targets(result.program)
    assert names.count("gw.reduce_sum") == 3 and "gw.square_root" in names and names.count("gw.scale") == 1
    assert not any("vector_norm" in n or "aten.sum" in n for n in names)
    assert result.certificate[-1].relative < 1e-3


def test_the_residual_stream_of_a_block_is_added_in_float():
    program = lower(Block, BLOCK).program
    adds = [n for n in program.nodes if "aten.add" in str(n.target)]
    assert len(adds) == 2 and all(n.args[1].target is gw.scale.default for n in adds)


def test_the_score_scale_disappears_into_the_softmax_edge():
    program = lower(Block, BLOCK).program
    assert not any("aten.mul" in t for t in targets(program)[:-4])


def test_padding_of_codes_uses_the_zero_point():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3, 2), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.b(self.a(F.pad(x, (0, 1, 0, 1))))

    result = lower(Net, (1, 2, 7, 7))
    pad = next(n for n in result.program.nodes if "pad" in str(n.target))
    quantize = next(n for n in result.program.nodes if n.target is gw.quantize.default)
    assert pad.args[2] == quantize.args[2] != 0 and dtype_of(pad) == torch.uint8
    assert result.certificate[-1].sqnr_db > 35


def test_average_pools_without_integer_form_are_islands():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.b(F.avg_pool2d(self.a(x), 3, 2, 1, count_include_pad=False))

    stats = lower(Net, (1, 2, 7, 7)).certificate[-1].stats
    assert [i["op"] for i in stats["islands"]] == ["aten.avg_pool2d.default"]


def test_a_skipped_layer_is_an_island():
    result = lower(ConvNet, (1, 3, 9, 9), quantize="quantize{skip=[project]}")
    islands = result.certificate[-1].stats["islands"]
    assert ("aten.convolution.default", "project") in [(i["op"], i["origin"]) for i in islands]
    assert any(t.is_floating_point() and t.dim() == 4 for t in result.program.parameters().values())


def test_concat_parts_on_other_grids_are_requantized():
    result = lower(functools.partial(Concat, 3.0), (2, 2, 5, 5))
    names = targets(result.program)
    assert names.count("gw.lookup") == 1 and names.count("gw.rescale") == 2 and "aten.mul.Tensor" not in names
    assert result.certificate[-1].stats["islands"] == []
    assert result.certificate[-1].sqnr_db > 35


def test_subtraction_and_broadcast_sums():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.c(self.a(x) - self.b(x))

    result = lower(Net, (2, 2, 5, 5))
    add = next(n for n in result.program.nodes if n.target is gw.add.default)
    assert add.args[2] > 0 > add.args[3]
    assert result.certificate[-1].sqnr_db > 30


@pytest.mark.parametrize("axis", ["weights", "bias"])
def test_overflow_of_the_accumulator_names_the_layer(axis):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(150_000 if axis == "weights" else 8, 2)

        def forward(self, x):
            return self.wide(x)

    model = seeded(Net)
    if axis == "weights":
        model.wide.weight.data[:] = 1.0
    program, context = prepare(model, (1, model.wide.in_features), samples=2)
    annotated = run(program, "quantize", context).program
    if axis == "bias":
        linear = next(n for n in annotated.nodes if origin_of(n) == "wide" and "linear" in str(n.target))
        annotated.replace_parameter(linear.args[2], torch.full((2,), 1e9))
        annotated.sweep()
    with pytest.raises(PassError, match=r"'wide'.*32-bit accumulator"):
        run(annotated, "lower-integer", context)


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_layer_against_numpy(mode):
    """One convolution of the lowered program, recomputed from its parameters with int64 and exact rounding."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    program, context = prepare(model, (1, 2, 4, 4))
    program = run(program, f"quantize,lower-integer{{rescale={mode}}}", context).program
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    nodes = list(program.nodes)
    quantize = next(n for n in nodes if n.target is gw.quantize.default)
    layer = next(n for n in nodes if n.target is gw.convolution.default)
    tail = next(iter(layer.users))
    q = gw.quantize(x, *quantize.args[1:]).numpy().astype(np.int64) - quantize.args[2]
    weight = program.parameter(layer.args[1]).numpy().astype(np.int64)[:, :, 0, 0]
    acc = np.einsum("nchw,oc->nohw", q, weight) + program.parameter(layer.args[2]).numpy()[:, None, None]
    first = program.parameter(tail.args[1]).numpy()[:, None, None]
    if mode == "dyadic":
        shift = program.parameter(tail.args[2]).numpy().astype(np.int64)[:, None, None]
        zero, low, high = tail.args[3:6]
        steps = (acc * first.astype(np.int64) + (np.int64(1) << (shift - 1))) >> shift
    else:
        zero, low, high = tail.args[2:5]
        steps = np.rint(acc.astype(np.float32) * first).astype(np.int64)
    expected = np.clip(steps + zero, low, high)
    seen = {}

    class Spy(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n] = super().run_node(n)
            return seen[n]

    Spy(program.graph_module).run(x)
    assert np.array_equal(seen[tail].numpy().astype(np.int64), expected)


def test_batches_of_any_size_run_when_the_batch_is_symbolic():
    from graphwright.ir.capture import capture
    from graphwright.ir.data import Calibration
    from graphwright.passes.base import PassContext

    program = capture(seeded(ConvNet), torch.randn(2, 3, 9, 9), dynamic_batch=True)
    program.stage = Stage.CANONICAL
    context = PassContext(Calibration.for_program(program, [torch.randn(4, 3, 9, 9)]))
    lowered = run(program, "quantize,lower-integer", context).program
    x = torch.randn(3, 3, 9, 9)
    together = lowered(x)[0]
    assert torch.equal(together, torch.cat([lowered(x[i : i + 1])[0] for i in range(3)]))
