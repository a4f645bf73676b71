"""Random networks of everything the coupling analysis knows, and the check that a cut is what zeroing is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from graphwright.ir.capture import capture
from graphwright.ir.program import Program, Stage
from graphwright.passes.base import PassContext
from graphwright.passes.fold.canonicalize import Canonicalize
from graphwright.passes.prune.coupling import coupled_groups
from graphwright.passes.prune.cut import cut
from graphwright.passes.prune.group import Group
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "hardswish": F.hardswish, "none": lambda x: x}


def canonical(model: nn.Module, inputs: torch.Tensor | Sequence[torch.Tensor], dynamic_batch: bool = False) -> Program:
    """Captured and canonicalized, with biases and normalizations that are not neutral."""
    torch.manual_seed(1)
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.dim() == 1 and value.is_floating_point():
                value.data.uniform_(0.5, 1.5) if "var" in name or "weight" in name else value.data.uniform_(-0.5, 0.5)
    program = Canonicalize().run(capture(model.eval(), inputs, dynamic_batch=dynamic_batch), PassContext()).program
    program.sweep()
    program.stage = Stage.CANONICAL
    return program


def zeroed(program: Program, groups: Sequence[Group], removed: Mapping[str, Sequence[int]]) -> Program:
    """The program with the slices of these atoms set to zero in every member."""
    result = program.clone()
    for group in groups:
        for member in group.members:
            gone = [i for atom in removed.get(group.name, ()) for i in member.indices[atom]]
            value = getattr(result.graph_module, member.parameter).detach().clone()
            value.index_fill_(member.dim, torch.tensor(gone, dtype=torch.int64), 0)
            delattr(result.graph_module, member.parameter)
            result.graph_module.register_buffer(member.parameter, value)
    return result


def check_cut(program: Program, removed: Mapping[str, Sequence[int]], inputs: Sequence[torch.Tensor]) -> Program:
    """Cuts, and checks sizes and values against the zeroed original."""
    groups = coupled_groups(program)
    before = {name: tuple(value.shape) for name, value in program.parameters().items()}
    smaller = cut(program, removed)
    assert smaller.stage is Stage.COMPRESSED
    assert {n: tuple(v.shape) for n, v in program.parameters().items()} == before
    expected: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        for member in group.members:
            gone = expected.setdefault((member.parameter, member.dim), set())
            gone.update(i for atom in removed.get(group.name, ()) for i in member.indices[atom])
    after = smaller.parameters()
    for (name, dim), gone in expected.items():
        assert after[name].shape[dim] == before[name][dim] - len(gone), f"{name} dim {dim}"
    for left, right in zip(zeroed(program, groups, removed)(*inputs), smaller(*inputs), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-7, atol=1e-7 * max(1.0, float(left.abs().max())))
    return smaller


# -- blocks: (batch, channels, height, width) -> the same rank -----------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self, ins: int, outs: int, kernel: int = 1, groups: int = 1, activation: str = "relu", norm: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, groups=groups, bias=norm != "batch")
        norms = {"batch": nn.BatchNorm2d, "group": lambda n: nn.GroupNorm(n // 2, n), "instance": nn.InstanceNorm2d}
        self.norm = norms[norm](outs) if norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x)))


class Up(nn.Module):
    def __init__(self, ins: int, outs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(ins, outs, 2, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)[:, :, 1:, 1:]


class Residual(nn.Module):
    def __init__(self, channels: int, hidden: int, activation: str, kernel: int = 3) -> None:
        super().__init__()
        self.first, self.second = Conv(channels, hidden, kernel, activation=activation), Conv(hidden, channels, activation="none")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x))


class Dense(nn.Module):
    """Concatenation with what came in."""

    def __init__(self, ins: int, grown: int, activation: str) -> None:
        super().__init__()
        self.conv = Conv(ins, grown, 1, activation=activation, norm="batch")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(x)], 1)


class Parted(nn.Module):
    """Part of the channels goes through a layer, the rest by."""

    def __init__(self, channels: int, part: int) -> None:
        super().__init__()
        self.part, self.conv = part, Conv(part, part, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.split(x, [self.part, x.shape[1] - self.part], 1)
        return torch.cat([b, self.conv(a)], 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        return x.reshape(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


# -- blocks: (batch, length, channels) -> the same rank ------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head or grouped-query attention; packed takes queries, keys and values from one projection."""

    def __init__(self, channels: int, heads: int, shared: int, width: int, packed: bool, rotate: bool = False) -> None:
        super().__init__()
        self.heads, self.shared, self.width, self.packed, self.rotate = heads, heads // shared, width, packed, rotate
        sizes = [heads * width, self.shared * width, self.shared * width]
        self.qkv = nn.Linear(channels, sum(sizes)) if packed else nn.ModuleList(nn.Linear(channels, s) for s in sizes)
        self.sizes, self.out = sizes, nn.Linear(heads * width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).split(self.sizes, -1) if self.packed else [f(x) for f in self.qkv]  # type: ignore[union-attr]
        q = q.view(b, t, self.heads, self.width).transpose(1, 2)
        k, v = (y.view(b, t, self.shared, self.width).transpose(1, 2) for y in (k, v))
        if self.rotate:
            q, k = (y * 0.5 + torch.cat([-y[..., self.width // 2 :], y[..., : self.width // 2]], -1) * 0.25 for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.shared)
        return x + self.out(y.transpose(1, 2).reshape(b, t, -1))


class PackedAttention(nn.Module):
    """One view as (3, heads, width)."""

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(channels, 3 * heads * width), nn.Linear(heads * width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class GatedMLP(nn.Module):
    def __init__(self, channels: int, hidden: int, packed: bool, activation: str) -> None:
        super().__init__()
        self.packed, self.activation = packed, ACTIVATIONS[activation]
        self.gate = nn.Linear(channels, 2 * hidden if packed else hidden)
        self.up = nn.Identity() if packed else nn.Linear(channels, hidden)
        self.down = nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x).chunk(2, -1) if self.packed else (self.gate(x), self.up(x))
        return x + self.down(self.activation(gate) * up)


class Network(nn.Module):
    def __init__(self, blocks: list[nn.Module], ends: str, channels: int, positions: int) -> None:
        super().__init__()
        self.blocks, self.ends = nn.Sequential(*blocks), ends
        self.head = nn.Linear(channels * positions if ends == "flatten" else channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(x)
        if self.ends == "flatten":
            return self.head(x.flatten(1))
        return self.head(x.mean((2, 3) if self.ends == "image" else 1))


@st.composite
def image_blocks(draw: st.DrawFn, channels: int) -> tuple[nn.Module, int]:
    """A block that takes `channels` channels, and how many it gives. Channels are multiples of 4."""
    outs, hidden = 4 * draw(st.integers(1, 3)), 4 * draw(st.integers(1, 2))
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    groups = draw(st.sampled_from([1, 2, 4]))
    norm = draw(st.sampled_from(["", "batch", "group", "instance"]))
    part = draw(st.integers(2, channels - 2)) if channels > 4 else 2
    return draw(
        st.sampled_from(
            [
                (Conv(channels, outs, 3, 1, activation, norm), outs),
                (Conv(channels, outs, 3, groups, activation, norm), outs),
                (Conv(channels, channels, 3, channels, activation, norm), channels),
                (Conv(channels, 2 * channels, 1, channels, activation), 2 * channels),
                (Up(channels, outs, groups), outs),
                (Residual(channels, hidden, activation), channels),
                (Dense(channels, outs, activation), channels + outs),
                (Parted(channels, part), channels),
                (Gate(channels, hidden), channels),
                (nn.Sequential(Conv(channels, 4 * outs), nn.PixelShuffle(2), nn.AvgPool2d(2)), outs),
                (nn.Sequential(Conv(channels, outs), nn.PixelUnshuffle(2), nn.Upsample(scale_factor=2)), 4 * outs),
                (nn.Sequential(Shuffle(groups), Conv(channels, outs, 1, groups)), outs),
                (nn.Sequential(Lambda(lambda x: x.flip(1)[:, [*range(1, channels), 0]]), nn.PReLU(channels)), channels),
                (Lambda(lambda x: F.pad(x, (0, 0, 0, 0, 1, 3)) + 1), channels + 4),
                (Lambda(lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1)), channels),
                (Lambda(lambda x: x.repeat(1, 2, 1, 1)), 2 * channels),
                (Lambda(lambda x: x + x.sum(1, keepdim=True)), channels),
            ]
        )
    )


@st.composite
def sequence_blocks(draw: st.DrawFn, channels: int) -> tuple[nn.Module, int]:
    outs, heads, width = 4 * draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 4]))
    activation, packed = draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.booleans())
    shared = draw(st.sampled_from([s for s in (1, 2, 4) if heads % s == 0]))
    return draw(
        st.sampled_from(
            [
                (nn.Sequential(nn.Linear(channels, outs), Lambda(ACTIVATIONS[activation])), outs),
                (Attention(channels, heads, shared, width, packed), channels),
                (Attention(channels, heads, shared, width, packed, rotate=True), channels),
                (PackedAttention(channels, heads, width), channels),
                (GatedMLP(channels, outs, packed, activation), channels),
                (nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, outs)), outs),
                (nn.Sequential(nn.Linear(channels, 2 * outs), nn.GLU()), outs),
            ]
        )
    )


@st.composite
def networks(draw: st.DrawFn) -> tuple[Network, torch.Tensor]:
    """A random network in float64 and an input for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels = 4 * draw(st.integers(1, 3))
    blocks: list[nn.Module] = []
    if draw(st.booleans()):
        blocks.append(Conv(2, channels))
        for _ in range(draw(st.integers(1, 5))):
            if channels <= 48:
                block, channels = draw(image_blocks(channels))
                blocks.append(block)
        x, ends = torch.randn(2, 2, 4, 4, dtype=torch.float64), draw(st.sampled_from(["image", "flatten", "sequence"]))
        if ends == "sequence":
            blocks.append(Lambda(lambda x: x.flatten(2).transpose(1, 2)))
    else:
        x, ends = torch.randn(2, 4, 5, dtype=torch.float64), draw(st.sampled_from(["sequence", "flatten"]))
        blocks.append(nn.Linear(5, channels))
    for _ in range(draw(st.integers(1, 3))) if x.dim() == 3 or ends == "sequence" else ():
        block, channels = draw(sequence_blocks(channels))
        blocks.append(block)
    positions = 4 if x.dim() == 3 else 16
    return Network(blocks, ends, channels, positions).double(), x
