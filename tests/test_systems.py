"""The peers of a bench build from any float file of ours and answer near the float model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphwright.ir.capture import capture
from graphwright.ir.onnx_export import export_onnx
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.tools.bench.systems import build
from torch import nn


class Encoder(nn.Module):
    """Attention with a mask of -10000, layer norm, and an embedding of unit length: what broke ONNX Runtime's tools on MiniLM."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(64, width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.to(torch.float32)
        x = self.norm(self.words(ids))
        scores = self.query(x) @ self.key(x).transpose(-1, -2) * 0.2 + ((1.0 - weights) * -10_000.0)[:, None, :]
        x = x + self.out(torch.softmax(scores, -1) @ self.value(x))
        return F.normalize((x * weights[:, :, None]).sum(1) / weights[:, :, None].sum(1), dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("systems")
    ids, mask = torch.randint(0, 64, (8, 1, 12)), torch.ones(8, 1, 12, dtype=torch.int64)
    mask[::2, :, 7:] = 0
    program = capture(Encoder().eval(), (ids[0], mask[0]))
    export_onnx(PassManager().run(program, parse("canonicalize")).program, folder / "float.onnx")
    np.savez(folder / "samples.npz", **dict(zip([s.name for s in program.input_specs], (ids.numpy(), mask.numpy()), strict=True)))
    return folder


def answers(system):
    return np.concatenate([system.run([v[i] for v in system.samples.values()])[0] for i in range(8)])


@pytest.mark.parametrize("peer", ["ort-int8", "ort-dynamic"])
def test_int8_peers_build_on_a_masked_encoder(folder, peer):
    exact, system = answers(build("ort", folder, 1)), build(peer, folder, 1)
    assert system.precision.startswith("int8") and system.size_bytes < build("ort", folder, 1).size_bytes
    assert (exact * answers(system)).sum(1).min() > 0.98
