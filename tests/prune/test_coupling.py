"""The groups that each operator gives, what pins them, and the errors of the cut."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import prune_graphs
import pytest
import torch
from graphwright.ir.errors import OptionError, PassError, UnknownNameError
from graphwright.ir.program import Program, Stage
from graphwright.passes.prune.coupling import coupled_groups
from graphwright.passes.prune.cut import cut
from graphwright.passes.prune.group import Group, Member
from torch import nn
from torch.nn import functional as F


class Between(nn.Module):
    """A function between a first and a last layer."""

    def __init__(self, first: nn.Module, function: Callable[..., torch.Tensor], last: nn.Module, **others: nn.Module):
        super().__init__()
        self.first, self.last, self.others, self.function = first, last, nn.ModuleDict(others), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x), **self.others))


def images(function: Callable, *, channels: int = 8, last: int = 8, **others: Any) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    model = Between(nn.Conv2d(2, channels, 1), function, nn.Conv2d(last, 3, 1), **others).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    return prune_graphs.canonical(model, x), x


def rows(function: Callable, *, channels: int = 8, last: int = 8, **others: Any) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    model = Between(nn.Linear(5, channels), function, nn.Linear(last, 3), **others).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    return prune_graphs.canonical(model, x), x


def by_name(program: Program) -> dict[str, Group]:
    return {g.name: g for g in coupled_groups(program)}


def check_each(program: Program, x: torch.Tensor) -> dict[str, Group]:
    """Every open group can lose its second atom; the groups."""
    groups = by_name(program)
    for group in groups.values():
        if not group.pinned:
            prune_graphs.check_cut(program, {group.name: [1]}, [x])
    return groups


def members(group: Group) -> list[tuple[str, str, int, int]]:
    return [(m.role, layer_parameter(m), m.dim, m.width) for m in group.members]


def layer_parameter(member: Member) -> str:
    """The parameter's name without the version that a fold gave it."""
    return re.sub(r"__v\d+$", "", member.parameter)


FIRST = [("out", "first_weight", 0, 1), ("along", "first_bias", 0, 1)]

#: function -> the indices of the last layer's input that go with atom 1 of the first layer.
IMAGES: dict[str, tuple[Callable, int, list[int]]] = {
    "element-wise": (lambda x: torch.sigmoid(x) * 2 + 1, 8, [1]),
    "pooling": (lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2), 8, [1]),
    "concatenation": (lambda x: torch.cat([x, x], 1), 16, [1, 9]),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 16, [1, 9]),
    "interleave": (lambda x: x.repeat_interleave(2, 1), 16, [2, 3]),
    "flip": (lambda x: x.flip(1), 8, [6]),
    "split": (lambda x: torch.add(*torch.split(x, 4, 1)), 4, [1]),
    "chunk swap": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 8, [5]),
    "shuffle": (prune_graphs.Shuffle(2), 8, [2]),
    "gather": (lambda x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]], 8, [0]),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 2, [0]),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2), 32, [4, 5, 6, 7]),
    "transposes": (lambda x: x.permute(0, 2, 3, 1).reshape(2, 16, 8).transpose(1, 2).reshape(2, 8, 4, 4), 8, [1]),
}


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_where_a_channel_goes(name: str) -> None:
    function, last, expected = IMAGES[name]
    program, x = images(function, last=last)
    groups = check_each(program, x)
    holder = next(
        g for g in groups.values() for m in g.members if layer_parameter(m) == "first_weight" and 1 in sum(m.indices, ())
    )
    atom = next(a for a in range(holder.size) if 1 in holder.members[0].indices[a])
    [read] = [m for m in holder.members if layer_parameter(m) == "last_weight"]
    assert read.dim == 1 and read.role == "in"
    assert set(expected) <= set(read.indices[atom])


#: function, layers -> what pins the first layer's channels.
PINNED: dict[str, tuple[Callable, dict[str, nn.Module], str]] = {
    "unknown operator": (lambda x: torch.sort(x, 1)[0], {}, "aten.sort at 'sort' is an operator that the coupling analysis does"),
    "softmax": (lambda x: F.softmax(x, 1), {}, "normalizes over it"),
    "mean": (lambda x: x - x.mean(1, keepdim=True), {}, "is over it"),
    "local response": (lambda x: F.local_response_norm(x, 3), {}, "works across it"),
    "cumulative sum": (lambda x: x.cumsum(1), {}, "adds it up in order"),
    "sum of ones": (lambda x: x + torch.sigmoid(x).sum(1, keepdim=True), {}, "sums over channels that are not zero"),
    "group of one": (lambda x, norm: norm(x), {"norm": nn.GroupNorm(1, 8)}, "normalizes over it"),
    "norm over all": (lambda x, norm: norm(x), {"norm": nn.LayerNorm([8, 4, 4])}, "normalizes over it"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PINNED))
def test_what_pins(name: str) -> None:
    function, others, expected = PINNED[name]
    program, _ = images(function, **others)
    assert expected in by_name(program)["first"].pinned
    with pytest.raises(PassError, match="group 'first' cannot be cut"):
        cut(program, {"first": [0]})


def test_input_and_output_are_pinned() -> None:
    torch.manual_seed(0)
    residual = nn.Linear(5, 5)
    program = prune_graphs.canonical(
        Between(nn.Identity(), lambda x, layer: x + layer(x), nn.Linear(5, 3), layer=residual), torch.randn(2, 5)
    )
    groups = by_name(program)
    assert "joins it with a fixed dimension" in groups["others.layer"].pinned
    assert "reaches the network's output" in groups["last"].pinned


def test_sum_of_what_vanishes() -> None:
    program, x = images(lambda x: x + x.sum(1, keepdim=True) + x.norm(dim=1, keepdim=True))
    assert members(check_each(program, x)["first"]) == [*FIRST, ("in", "last_weight", 1, 1)]


def test_residual_and_gate() -> None:
    def forward(x: torch.Tensor, body: nn.Module, gate: nn.Module) -> torch.Tensor:
        return (x + body(x)) * torch.sigmoid(gate(x.mean((2, 3), keepdim=True)))

    program, x = images(forward, body=nn.Conv2d(8, 8, 3, padding=1), gate=nn.Conv2d(8, 8, 1))
    written = {m.parameter for m in check_each(program, x)["first"].roles("out")}
    assert written == {"first_weight", "others_body_weight", "others_gate_weight"}


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolution(transposed: bool) -> None:
    """What goes is a group, or one position in every group."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    program, x = images(lambda x, grouped: F.relu(grouped(x)), last=12, grouped=kind(8, 12, 1, groups=4))
    groups = check_each(program, x)
    inside = "others.grouped" if transposed else "others.grouped:1"  # the weight's own dimension, or a factor of it
    assert {g.name: g.size for g in groups.values() if not g.pinned} == {"first:0": 4, "first:1": 2, inside: 3}
    smaller = cut(program, {"first:0": [0, 2], "first:1": [1]})
    [node] = [n for n in smaller.nodes if n.target is torch.ops.aten.convolution.default and n.args[8] != 1]
    assert node.args[8] == 2 and node.all_input_nodes[0].meta["val"].shape[1] == 2


def test_depthwise_follows() -> None:
    program, x = images(lambda x, depthwise: depthwise(x), depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8))
    assert members(check_each(program, x)["first"])[2:4] == [
        ("out", "others_depthwise_weight", 0, 1),
        ("along", "others_depthwise_bias", 0, 1),
    ]
    smaller = cut(program, {"first": [1, 2, 5]})
    assert [n.args[8] for n in smaller.nodes if n.target is torch.ops.aten.convolution.default] == [1, 5, 1]


def test_group_norm_loses_whole_groups() -> None:
    program, x = images(lambda x, norm: norm(x), norm=nn.GroupNorm(4, 8))
    groups = check_each(program, x)
    assert groups["first:0"].size == 4 and "normalizes over it" in groups["first:1"].pinned
    assert ("along", "others_norm_weight", 0, 2) in members(groups["first:0"])


def test_flatten() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    program = prune_graphs.canonical(nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).double(), x)
    assert ("in", "3_weight", 1, 16) in members(check_each(program, x)["0"])


def test_channel_shuffle_is_a_permutation() -> None:
    """Rows and columns that are left whole stay a reshape; anything else becomes a gather."""
    program, x = images(lambda x: F.relu(prune_graphs.Shuffle(2)(F.relu(x))))
    assert [(g.name, g.size, bool(g.pinned)) for g in coupled_groups(program)] == [("first", 8, False), ("last", 3, True)]
    targets = [
        {node.target for node in prune_graphs.check_cut(program, {"first": gone}, [x]).nodes}
        for gone in ([1, 5], [0, 1, 2, 3], [1, 4])
    ]
    gather, reshape = torch.ops.aten.index_select.default, torch.ops.aten.reshape.default
    assert [(reshape in t, gather in t) for t in targets] == [(True, False), (True, False), (False, True)]


def test_concatenation_keeps_groups_apart() -> None:
    program, x = images(lambda x, other: torch.cat([x, other(x)], 1), last=12, other=nn.Conv2d(8, 4, 1))
    groups = check_each(program, x)
    assert groups["others.other"].members[-1].indices == tuple((8 + k,) for k in range(4))


def test_shared_weights_are_cut_once() -> None:
    program, x = rows(lambda x, shared: F.relu(shared(F.relu(shared(F.relu(x))))), shared=nn.Linear(8, 8))
    shared = [m for m in check_each(program, x)["first"].members if m.parameter == "others_shared_weight"]
    assert sorted((m.dim, m.role, len(m.layers)) for m in shared) == [(0, "out", 2), (1, "in", 2)]


def test_heads() -> None:
    """Heads and head width are two groups of one projection; grouped queries go with their keys and values."""
    program, x = rows(lambda x, block: block(x), block=prune_graphs.Attention(8, 4, 2, 6, packed=False))
    groups = check_each(program, x)
    sizes = {n: g.size for n, g in groups.items() if "qkv" in n}
    assert sizes == {"others.block.qkv.0:0": 2, "others.block.qkv.0:1": 2, "others.block.qkv.0:2": 6, "others.block.qkv.2:1": 6}
    shared = {layer_parameter(m): m.width for m in groups["others.block.qkv.0:0"].members}
    assert shared["others_block_qkv_0_weight"] == 12 and shared["others_block_qkv_1_weight"] == 6
    repeats = {layer_parameter(m) for m in groups["others.block.qkv.0:1"].members}
    assert "others_block_qkv_1_weight" not in repeats and "others_block_out_weight" in repeats


def test_packed_heads() -> None:
    program, x = rows(lambda x, block: block(x), block=prune_graphs.PackedAttention(8, 4, 6))
    groups = check_each(program, x)
    assert {n: g.size for n, g in groups.items() if "qkv" in n} == {f"others.block.qkv:{k}": s for k, s in enumerate((3, 4, 6))}
    assert groups["others.block.qkv:1"].roles("out")[0].indices[1] == tuple(
        24 * part + 6 + k for part in range(3) for k in range(6)
    )


def test_gated_mlp() -> None:
    program, x = rows(lambda x, block: block(x), block=prune_graphs.GatedMLP(8, 6, True, "gelu"))
    assert check_each(program, x)["others.block.gate"].members[0].indices[1] == (1, 7)


def test_embedding_features() -> None:
    torch.manual_seed(0)
    numbers = torch.randint(0, 7, (2, 4))
    program = prune_graphs.canonical(nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 3)).double(), numbers)
    [group] = [g for g in coupled_groups(program) if not g.pinned]
    assert members(group) == [("out", "0_weight", 1, 1), ("in", "1_weight", 1, 1)]
    prune_graphs.check_cut(program, {"0": [0, 3]}, [numbers])


def test_dynamic_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), prune_graphs.Attention(8, 4, 2, 4, packed=True), nn.Flatten(), nn.Linear(24, 2)
    ).double()
    program = prune_graphs.canonical(model, torch.randn(2, 3, 5, dtype=torch.float64), dynamic_batch=True)
    removed = {g.name: [0] for g in coupled_groups(program) if not g.pinned}
    assert len(removed) == 5
    prune_graphs.check_cut(program, removed, [torch.randn(7, 3, 5, dtype=torch.float64)])


def test_text() -> None:
    program, _ = images(lambda x, other: torch.cat([x, other(x)], 1), last=12, other=nn.Conv2d(8, 4, 1, bias=False))
    assert [str(g) for g in coupled_groups(program)] == [
        "first: 8 atoms\n    out   first_weight dim 0\n    along first_bias dim 0\n    in    others_other_weight dim 1\n"
        "    in    last_weight dim 1",
        "others.other: 4 atoms\n    out   others_other_weight dim 0\n    in    last_weight dim 1",
        "last: 3 atoms, pinned: it reaches the network's output 'convolution_2'\n    out   last_weight dim 0\n"
        "    along last_bias dim 0",
    ]


# -- errors ------------------------------------------------------------------------------------------------------------------


def test_errors_name_the_way_out() -> None:
    program, _ = images(F.relu)
    with pytest.raises(UnknownNameError, match="unknown group of channels 'frist'; did you mean 'first'"):
        cut(program, {"frist": [0]})
    with pytest.raises(OptionError, match="atoms 0 to 7; there is no atom 8"):
        cut(program, {"first": [8]})
    with pytest.raises(OptionError, match="there is no atom -1"):
        cut(program, {"first": [-1]})
    with pytest.raises(PassError, match="all 8 atoms of group 'first' would go; keep at least one"):
        cut(program, {"first": range(8)})
    with pytest.raises(PassError, match="'last' cannot be cut: it reaches the network's output"):
        cut(program, {"last": [0]})


def test_stage() -> None:
    program, _ = images(F.relu)
    program.stage = Stage.CAPTURED
    with pytest.raises(PassError, match="run canonicalize first"):
        coupled_groups(program)
    program.stage = Stage.INTEGER
    with pytest.raises(PassError, match="prune before quantizing"):
        coupled_groups(program)


def test_cutting_nothing_and_cutting_again() -> None:
    program, x = images(F.relu)
    assert cut(program, {}).parameters().keys() == program.parameters().keys()
    assert cut(program, {"first": []}).stage is Stage.COMPRESSED
    twice = cut(cut(program, {"first": [0, 1]}), {"first": [0]})
    torch.testing.assert_close(twice(x)[0], cut(program, {"first": [0, 1, 2]})(x)[0])


# -- where Torch-Pruning's users were stuck (numbers of its issues) --------------------------------------------------------------


class C2f(nn.Module):
    """YOLO's block: chunks of one convolution, each a source of the concatenation (#100)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = prune_graphs.Conv(8, 12, norm="batch"), prune_graphs.Conv(24, 8, norm="batch")
        self.inner = nn.ModuleList(prune_graphs.Residual(6, 4, "relu") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.inner:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """YOLO's SPPF and a neck that concatenates an upsampled map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = prune_graphs.Conv(8, 4), prune_graphs.Conv(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self.down(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 3, 1, 1))
        y = self.up(torch.cat(maps, 1))
        return torch.cat([F.interpolate(F.avg_pool2d(y, 2), scale_factor=2), x], 1)


class ScaledHeads(nn.Module):
    """A learned number a head, and a norm over the head's width."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v, self.out = nn.Linear(8, 48), nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale, self.norm = nn.Parameter(torch.rand(4, 1, 1)), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k = self.qk(x).view(b, t, 2, 4, 6).unbind(2)
        v = self.v(x).view(b, t, 4, 6).transpose(1, 2)
        scores = self.norm(q).transpose(1, 2) @ self.norm(k).permute(0, 2, 3, 1) * self.scale
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


#: Block, and the sizes of the groups inside it that can be cut.
STUCK = {
    "yolo chunk (#100)": (C2f, images, {"block.first.conv": 6, "block.first.conv#2": 6, "block.inner.0.first.conv": 4}),
    "yolo neck (#100)": (Pyramid, images, {"block.down.conv": 4, "block.up.conv": 8}),
    "unbind (#524)": (lambda: prune_graphs.PackedAttention(8, 4, 6), rows, {"block.qkv:1": 4, "block.qkv:2": 6}),
    "grouped queries (#512)": (lambda: prune_graphs.Attention(8, 4, 2, 6, True), rows, {"block.qkv:0": 2, "block.qkv:2": 6}),
    "one shared key (#512)": (lambda: prune_graphs.Attention(8, 4, 4, 6, False), rows, {"block.qkv.0:0": 4}),
    "parameter a head": (ScaledHeads, rows, {"block.qk:1": 4, "block.v:1": 6}),
}


@pytest.mark.parametrize("name", sorted(STUCK))
def test_where_others_are_stuck(name: str) -> None:
    block, build, expected = STUCK[name]
    last = 16 if block is Pyramid else 8
    program, x = build(lambda x, block: F.relu(block(F.relu(x))), last=last, block=block())
    sizes = {g.name.removeprefix("others."): g.size for g in check_each(program, x).values() if not g.pinned}
    assert {n: sizes.get(n) for n in expected} == expected, sizes
