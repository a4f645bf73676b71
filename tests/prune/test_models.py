"""Reference models and onnx's own small model files lose half of every group and run."""

from __future__ import annotations

from pathlib import Path

import onnx
import prune_graphs
import pytest
import torch
from graphwright.ir.load import load_program
from graphwright.ir.program import Program, Stage
from graphwright.passes.base import PassContext
from graphwright.passes.fold.canonicalize import Canonicalize
from graphwright.passes.prune.coupling import coupled_groups
from graphwright.passes.prune.cut import cut
from graphwright.tools.sources import resolve

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"

#: File -> groups that can be cut, and the least share of the parameters that must go. Those left out take long to read.
ONNX = {"bvlc_alexnet": (6, 0.7), "squeezenet": (25, 0.6), "zfnet512": (3, 0.7), "shufflenet": (10, 0.5), "resnet50": (36, 0.6)}

#: Model -> what can be cut in it, by group.
ZOO = {
    "resnet20": {"conv": 16, "blocks.0.conv1": 16, "blocks.8.conv1": 64},
    "mobilenetv2": {"features.0": 32, "features.12.layers.0": 384},
    "vit-tiny": {"blocks.0.attention.qkv:1": 3, "blocks.0.attention.qkv:2": 64, "blocks.0.fc1": 768},
    "gpt-small": {"blocks.5.attention.qkv:1": 4, "blocks.5.attention.qkv:2": 64, "blocks.5.fc1": 1024},
    "minilm-l6": {"encoder.layer.0.attention.self.query:0": 12, "encoder.layer.5.intermediate.dense": 1536},
    "efficientnet-lite0": {},
}


def canonical(program: Program) -> Program:
    program = Canonicalize().run(program.clone(), PassContext()).program
    program.sweep()
    program.stage = Stage.CANONICAL
    return program


def halves(program: Program) -> dict[str, range]:
    return {g.name: range(g.size // 2) for g in coupled_groups(program) if not g.pinned}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_reference_models(name: str) -> None:
    program = canonical(resolve(name).program)
    sizes = {g.name: g.size for g in coupled_groups(program) if not g.pinned}
    assert {n: sizes.get(n) for n in ZOO[name]} == ZOO[name]
    inputs = [
        torch.randn([d or 1 for d in s.shape])
        if s.dtype.is_floating_point
        else torch.ones([d or 1 for d in s.shape], dtype=s.dtype)
        for s in program.input_specs
    ]
    removed = halves(program)
    smaller = cut(program, removed)
    expected = prune_graphs.zeroed(program, coupled_groups(program), removed)(*inputs)
    for left, right in zip(expected, smaller(*inputs), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-4 * float(left.abs().max()))


@pytest.mark.parametrize("name", sorted(ONNX))
def test_onnx_models(name: str) -> None:
    program = canonical(load_program(LIGHT / f"light_{name}.onnx"))
    for node in list(program.nodes):
        if node.target is torch.ops.aten.full.default:
            # The files leave most weights out; each reader gets one of its own, which takes no memory.
            for reader in list(node.users):
                weight = torch.tensor(float(node.args[1])).expand(node.args[0])  # type: ignore[arg-type]
                reader.replace_input_with(node, program.add_parameter(node.name, weight, before=reader))
    program.sweep()
    removed, (groups, gone) = halves(program), ONNX[name]
    smaller = cut(program, removed)
    assert len(removed) >= groups
    before, after = (sum(v.numel() for v in p.parameters().values()) for p in (program, smaller))
    assert after < (1 - gone) * before
    outputs = smaller(*(torch.ones([d or 1 for d in spec.shape]) for spec in program.input_specs))
    assert [o.shape for o in outputs] == [n.meta["val"].shape for n in program.outputs]
