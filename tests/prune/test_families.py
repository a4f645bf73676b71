"""Every family of torchvision's classifiers, every reference model and every small ONNX model prunes at 50% and runs."""

from __future__ import annotations

import prune_families
import prune_graphs
import pytest
import torch
from graphwright.passes.prune.coupling import coupled_groups

#: Besides the classes, only what layer normalization or a lone slice holds together may be pinned.
PINNED = {
    "convnext": ["layer_norm", "layer_norm"],
    "vit": ["layer_norm", "takes it alone"],
    "swin": ["layer_norm", "takes it alone", "takes it alone"],
}


@pytest.mark.parametrize("family", sorted(prune_families.FAMILIES))
def test_half_of_every_group(family: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    program = prune_graphs.canonical(prune_families.FAMILIES[family]().double(), x)
    groups = coupled_groups(program)
    *reasons, classes = [g.pinned for g in groups if g.pinned]
    assert "reaches the network's output" in classes
    assert len(reasons) == len(PINNED.get(family, []))
    for reason, expected in zip(reasons, PINNED.get(family, []), strict=True):
        assert expected in reason
    removed = {g.name: range(0, g.size, 2) if g.size % 2 == 0 else range(g.size // 2) for g in groups if not g.pinned}
    smaller = prune_graphs.check_cut(program, removed, [x])
    before, after = (sum(v.numel() for v in p.parameters().values()) for p in (program, smaller))
    assert after < (0.85 if PINNED.get(family) else 0.5) * before
