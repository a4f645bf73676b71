"""cast-float: what becomes half precision and what stays float32, and that artifacts are close to what torch computes so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends import host
from graphwright.backends.artifact import Artifact
from graphwright.backends.loader import load
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import ArtifactError, OptionError
from graphwright.ir.program import dtype_of
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.tools.sources import resolve
from torch import nn

ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
aten = torch.ops.aten


def cast(model: nn.Module, *inputs: torch.Tensor, dtype: str = "bfloat16"):
    program = capture(model.eval(), inputs)
    result = PassManager().run(program, parse(f"canonicalize,cast-float{{dtype={dtype}}}"), PassContext())
    return result.program, result.certificate[-1]


def types(program, *targets) -> set[torch.dtype]:
    return {dtype_of(n) for n in program.nodes if n.target in targets}


def relative(a, b) -> float:
    a, b = (torch.as_tensor(v).double() for v in (a, b))
    return float((a - b).norm() / b.norm())


class Mixed(nn.Module):
    """A convolution, a residual addition, a reduction, masked attention over a linear layer, and arithmetic on the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 19, 3, padding=1), nn.Conv2d(19, 19, 1)
        self.mix, self.out, self.norm = nn.Linear(19, 19), nn.Linear(19, 5), nn.LayerNorm(19)

    def forward(self, x, mask):
        x = torch.relu(self.conv(x))
        x = torch.relu(self.again(x) + x)
        rows = self.norm(self.mix(x.flatten(2).transpose(1, 2)))
        hidden = ((1.0 - mask) * -10000.0)[:, None, :]
        rows = torch.softmax(rows @ rows.transpose(1, 2) * 0.2 + hidden, -1) @ rows
        return self.out(rows.mean(1)), mask * 2.0


def mixed() -> tuple[Mixed, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(2, 35)
    mask[:, 30:] = 0
    return Mixed(), torch.randn(2, 3, 5, 7), mask


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_between_layers_are_half_and_edges_float32(dtype):
    program, row = cast(*mixed(), dtype=dtype)
    half = getattr(torch, dtype)
    inside = (aten.convolution.default, aten.linear.default, aten.matmul.default, aten.softmax.int, aten.layer_norm.default)
    assert types(program, *inside, aten.relu.default, aten.add.Tensor) == {half}
    assert types(program, aten.mean.dim) == {torch.float32}
    # The mask's own arithmetic stays float32; only the sum with half-precision scores is one.
    assert types(program, aten.sub.Tensor) == {torch.float32}
    assert {s.dtype for s in (*program.input_specs, *program.output_specs)} == {torch.float32}
    assert {t.dtype for t in program.parameters().values()} == {half}
    assert row.modified and row.effect == "lossy" and row.stats["layers"] == 6 and row.stats["saturated"] == 0
    assert row.bytes_after * 2 == row.bytes_before and row.relative < 16 * ROUNDOFF[dtype]


def test_programs_without_products_are_left_alone():
    program, row = cast(nn.Sequential(nn.ReLU(), nn.Softmax(1)), torch.randn(2, 5))
    assert not row.modified and types(program, aten.relu.default) == {torch.float32}


def test_a_second_cast_changes_nothing():
    program, _ = cast(*mixed())
    assert not PassManager().run(program, parse("cast-float"), PassContext()).certificate[-1].modified


def test_values_that_several_read_are_cast_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + self.b(x), x + 1.0

    program, row = cast(Twice(), torch.randn(3, 4))
    assert row.stats["casts"] == 2  # the input, and the one output that is half precision
    assert sorted(str(s.dtype) for s in program.output_specs) == ["torch.float32"] * 2


def test_parameters_beyond_the_range_are_its_largest_numbers():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.hidden = nn.Linear(3, 2), nn.Parameter(torch.tensor([0.0, -1e9]))

        def forward(self, x):
            return torch.softmax(self.linear(x) + self.hidden, -1)

    program, row = cast(Masked(), torch.ones(1, 3), dtype="float16")
    assert row.stats["saturated"] == 1
    assert min(float(t.min()) for t in program.parameters().values()) == -65504.0


def test_split_values_keep_their_types():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x):
            a, b = self.first(x).split(3, dim=1)
            return self.second(a * b)

    program, _ = cast(Split(), torch.randn(3, 4))
    assert types(program, aten.mul.Tensor) == {torch.bfloat16}


def test_layers_with_compressed_weights_stay_float32():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    program = capture(model.eval(), torch.randn(2, 64))
    passes = parse("canonicalize,sparsify-magnitude{sparsity=0.6},compress-sparse,cast-float")
    result = PassManager().run(program, passes, PassContext()).program
    read = [n for n in result.nodes if n.target is torch.ops.gw.from_bitmask.default]
    assert read and all(dtype_of(user) is torch.float32 for n in read for user in n.users)


def test_unknown_types_are_refused():
    with pytest.raises(OptionError, match="bfloat16"):
        parse("cast-float{dtype=float8}")


# -- artifacts ---------------------------------------------------------------------------------------------------------------


def artifact(program, target: Target) -> Artifact:
    return Artifact.build(program, [TVMBackend().compile(program, target)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("level", ["native", "avx2"])
def test_artifacts_compute_what_torch_does(dtype, level, tmp_path):
    """Every op in its half-precision form; the kernels round less often than torch, so the two differ by some roundings."""
    if host.host_arch() != "x86":
        pytest.skip("levels of x86")
    model, *inputs = mixed()
    program, _ = cast(model, *inputs, dtype=dtype)
    artifact(program, Target.parse(f"x86:{level}")).save(tmp_path / "half.gw")
    found, expected = load(tmp_path / "half.gw")(*(x.numpy() for x in inputs)), program(*inputs)
    assert relative(found[0], expected[0]) < 4 * ROUNDOFF[dtype]
    assert np.array_equal(np.asarray(found[1]), expected[1].numpy())


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_trained_networks(name):
    """Captured, cast, compiled: as close to torch's bfloat16 as torch's is to float32, and the same classes as float32."""
    source = resolve(name)
    samples = Calibration.for_program(source.program, source.calibration(None, 4) or [])
    assert len(samples) == 4
    program = PassManager().run(source.program, parse("canonicalize,cast-float"), PassContext()).program
    run = load_bytes(TVMBackend().compile(program, Target.parse("cpu")).library)
    for sample in samples:
        found, half, single = run(*(x.numpy() for x in sample))[0], program(*sample)[0], source.program(*sample)[0]
        assert relative(found, half) < 2 * ROUNDOFF["bfloat16"]
        assert relative(found, single) < 8 * ROUNDOFF["bfloat16"]
        assert int(np.argmax(found)) == int(single.argmax())


def test_a_processor_without_the_instructions_refuses(tmp_path, monkeypatch):
    program, _ = cast(nn.Linear(8, 8), torch.randn(1, 8))
    artifact(program, Target("x86", "avx512-bf16")).save(tmp_path / "half.gw")
    flags = host.X86_FLAGS["avx512-vnni"] | host.X86_FLAGS["avx2"]
    monkeypatch.setattr("graphwright.backends.loader.host_arch", lambda: "x86")
    monkeypatch.setattr("graphwright.backends.loader.host_flags", lambda: flags)
    with pytest.raises(ArtifactError, match="this CPU lacks avx512_bf16"):
        load(tmp_path / "half.gw")
