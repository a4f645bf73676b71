"""split-quant: clusters, exact sums, and what they are for."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.errors import OptionError, UnknownNameError
from graphwright.passes.quantize import operators as ops
from graphwright.passes.quantize.split_quant import clusters_of
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import ConvNet, prepare, run
from torch import nn


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), clusters=st.integers(2, 4), bias=st.booleans())
def test_exact_for_convolutions_and_linear_layers(seed, clusters, bias):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, stride=2, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4, bias=bias)]
    program, context = prepare(nn.Sequential(*layers), (2, 3, 7, 7), samples=1)
    result = run(program, f"split-quant{{clusters={clusters}}}", context)  # the manager checks the effect
    assert result.certificate[0].stats["layers"] == 2
    parts = [result.program.parameter(n.args[1]) for n in result.program.nodes if n.target is ops.LINEAR]
    assert len(parts) == clusters
    assert torch.equal(sum(parts), program.parameter(next(n for n in program.nodes if n.target is ops.LINEAR).args[1]))
    assert int(sum((p != 0).to(torch.int32) for p in parts).max()) == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 4))
def test_clusters_are_a_fixed_point_of_k_means(seed, count):
    weight = torch.randn(200, generator=torch.Generator().manual_seed(seed)) ** 3
    cluster = clusters_of(weight, count)
    means = torch.stack([weight[cluster == i].double().mean() for i in range(count)])
    assert bool((means.diff() > 0).all())
    assert torch.equal((weight.double()[:, None] - means).abs().argmin(1), cluster)


def test_a_constant_weight_is_not_split():
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 0.5)
    program, context = prepare(model, (2, 4), samples=1)
    assert not run(program, "split-quant", context).certificate[0].modified


def test_helps_at_two_bits():
    torch.manual_seed(0)
    program, context = prepare(ConvNet(), (2, 3, 16, 16))
    text = 'quantize{weights=["*=uint2g64"]}'
    plain = run(program, text, context).certificate[-1].sqnr_db
    split = run(program, f"split-quant,{text}", context).certificate[-1].sqnr_db
    assert split > plain + 5


def test_layers_are_chosen_by_origin():
    program, context = prepare(ConvNet(), (2, 3, 16, 16), samples=1)
    assert run(program, 'split-quant{layers=["head"]}', context).certificate[0].stats["layers"] == 1
    with pytest.raises(UnknownNameError, match="name in 'layers' of split-quant"):
        run(program, 'split-quant{layers=["nothing"]}', context)


def test_one_cluster_is_refused():
    program, context = prepare(nn.Linear(4, 4), (2, 4), samples=1)
    with pytest.raises(OptionError, match="clusters"):
        run(program, "split-quant{clusters=1}", context)
