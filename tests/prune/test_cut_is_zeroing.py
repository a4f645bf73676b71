"""On random networks: a cut program computes what the original computes with the same slices of all members set to zero."""

from __future__ import annotations

import prune_graphs
import pytest
import torch
from graphwright.ir.errors import PassError
from graphwright.passes.prune.coupling import coupled_groups
from graphwright.passes.prune.cut import cut
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


# Shrinking a network takes minutes and tells little: the failing example is printed as it is.
@settings(max_examples=20, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
@given(network=prune_graphs.networks(), data=st.data())
def test_cut_is_zeroing(network: tuple[torch.nn.Module, torch.Tensor], data: st.DataObject) -> None:
    model, x = network
    program = prune_graphs.canonical(model, x)
    open_groups = [g for g in coupled_groups(program) if not g.pinned]
    removed = {g.name: data.draw(st.sets(st.integers(0, g.size - 1), max_size=g.size - 1), g.name) for g in open_groups}
    prune_graphs.check_cut(program, {name: sorted(atoms) for name, atoms in removed.items()}, [x])
    if open_groups:
        group = data.draw(st.sampled_from(open_groups))
        prune_graphs.check_cut(program, {group.name: [data.draw(st.integers(0, group.size - 1))]}, [x])
    for group in coupled_groups(program):
        if group.pinned:
            with pytest.raises(PassError, match="cannot be cut"):
                cut(program, {group.name: [0]})
