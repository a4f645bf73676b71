"""The classification families of torchvision in small: every kind of block they are made of, few and narrow, random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class Apply(nn.Module):
    """A function of the modules given by name."""

    def __init__(self, function: Callable, **modules: nn.Module) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleDict(modules), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, **self.parts)


def conv(ins: int, outs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    """Convolution, batch normalization, activation."""
    layers = [nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outs)]
    return nn.Sequential(*layers, nn.ReLU() if act is None else act)


def plain(ins: int, outs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv(ins, outs, kernel, stride, groups, nn.Identity())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def alexnet() -> nn.Module:
    features = [nn.Conv2d(3, 8, 7, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 5, padding=2), nn.ReLU()]
    classifier = [nn.Dropout(), nn.Linear(12 * 9, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(3), nn.Flatten(), *classifier)


def vgg() -> nn.Module:
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        conv(3, 8),
        conv(8, 8),
        pool,
        conv(8, 16),
        conv(16, 16),
        pool,
        nn.Flatten(),
        nn.Linear(16 * 64, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


def residual(ins: int, outs: int, stride: int, body: nn.Module) -> nn.Module:
    if ins == outs and stride == 1:
        return Apply(lambda x, body: F.relu(x + body(x)), body=body)
    return Apply(lambda x, body, shortcut: F.relu(shortcut(x) + body(x)), body=body, shortcut=plain(ins, outs, 1, stride))


def basic(ins: int, outs: int, stride: int = 1) -> nn.Module:
    return residual(ins, outs, stride, nn.Sequential(conv(ins, outs, 3, stride), plain(outs, outs, 3)))


def bottleneck(ins: int, outs: int, width: int, stride: int = 1, groups: int = 1, gate: bool = False) -> nn.Module:
    layers = [conv(ins, width, 1), conv(width, width, 3, stride, groups)]
    if gate:
        layers.append(squeeze(width, 4))  # type: ignore[arg-type]
    return residual(ins, outs, stride, nn.Sequential(*layers, plain(width, outs)))


def squeeze(channels: int, hidden: int, scale: type[nn.Module] = nn.Sigmoid) -> nn.Module:
    """Squeeze and excitation."""
    body = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1), scale()
    )
    return Apply(lambda x, gate: x * gate(x), gate=body)


def resnet() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.MaxPool2d(3, 2, 1), basic(8, 8), basic(8, 16, 2), basic(16, 16), head(16))


def resnet_bottleneck() -> nn.Module:
    return nn.Sequential(conv(3, 8), bottleneck(8, 16, 4), bottleneck(16, 16, 4), bottleneck(16, 32, 8, 2), head(32))


def resnext() -> nn.Module:
    return nn.Sequential(conv(3, 8), bottleneck(8, 16, 8, groups=4), bottleneck(16, 16, 8, groups=4), head(16))


def wide_resnet() -> nn.Module:
    return nn.Sequential(conv(3, 8), bottleneck(8, 16, 16), bottleneck(16, 16, 16), head(16))


def regnet() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, 2), bottleneck(8, 16, 16, 2, 2, gate=True), bottleneck(16, 16, 16, 1, 2, gate=True), head(16)
    )


def densenet() -> nn.Module:
    def dense(ins: int, grown: int = 4) -> nn.Module:
        body = nn.Sequential(nn.BatchNorm2d(ins), nn.ReLU(), conv(ins, 8, 1), nn.Conv2d(8, grown, 3, padding=1, bias=False))
        return Apply(lambda x, body: torch.cat([x, body(x)], 1), body=body)

    transition = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2))
    end = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), head(16))
    return nn.Sequential(conv(3, 8), dense(8), dense(12), transition, dense(8), dense(12), end)


def squeezenet() -> nn.Module:
    def fire(ins: int, down: int, up: int) -> nn.Module:
        parts = {"down": nn.Conv2d(ins, down, 1), "one": nn.Conv2d(down, up, 1), "three": nn.Conv2d(down, up, 3, padding=1)}

        def forward(x: torch.Tensor, down: nn.Module, one: nn.Module, three: nn.Module) -> torch.Tensor:
            x = F.relu(down(x))
            return torch.cat([F.relu(one(x)), F.relu(three(x))], 1)

        return Apply(forward, **parts)

    end = nn.Sequential(nn.Conv2d(16, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True), fire(8, 4, 8), fire(16, 4, 8), end)


def branches(**parts: nn.Module) -> nn.Module:
    return Apply(lambda x, **parts: torch.cat([part(x) for part in parts.values()], 1), **parts)


def googlenet() -> nn.Module:
    def inception(ins: int) -> nn.Module:
        return branches(
            a=conv(ins, 4, 1),
            b=nn.Sequential(conv(ins, 4, 1), conv(4, 8)),
            c=nn.Sequential(conv(ins, 2, 1), conv(2, 4)),
            d=nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(ins, 4, 1)),
        )

    return nn.Sequential(conv(3, 8, 7, 2), inception(8), nn.MaxPool2d(3, 2), inception(20), head(20))


def inception_v3() -> nn.Module:
    """Factorized kernels, branches of branches, and a branch that only pools."""

    def oblong(ins: int, outs: int, kernel: tuple[int, int]) -> nn.Module:
        padding = (kernel[0] // 2, kernel[1] // 2)
        return nn.Sequential(nn.Conv2d(ins, outs, kernel, padding=padding, bias=False), nn.BatchNorm2d(outs), nn.ReLU())

    fork = nn.Sequential(conv(8, 4, 1), branches(a=oblong(4, 4, (1, 3)), b=oblong(4, 4, (3, 1))))
    wide = branches(a=fork, b=nn.Sequential(conv(8, 4, 1), oblong(4, 4, (1, 7)), oblong(4, 4, (7, 1))))
    down = branches(a=conv(12, 8, 3, 2), b=nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(conv(3, 8, 3, 2), wide, down, head(20))


def inverted(
    ins: int, outs: int, hidden: int, stride: int = 1, act: nn.Module | None = None, gate: nn.Module | None = None
) -> nn.Module:
    layers = [conv(ins, hidden, 1, act=act), conv(hidden, hidden, 3, stride, hidden, act)]
    if gate is not None:
        layers.append(gate)  # type: ignore[arg-type]
    body = nn.Sequential(*layers, plain(hidden, outs))
    return Apply(lambda x, body: x + body(x), body=body) if ins == outs and stride == 1 else body


def mobilenet_v2() -> nn.Module:
    act = nn.ReLU6()
    blocks = [inverted(8, 8, 16, act=act), inverted(8, 12, 16, 2, act=act), inverted(12, 12, 24, act=act)]
    return nn.Sequential(conv(3, 8, 3, 2, act=act), *blocks, conv(12, 24, 1, act=act), head(24))


def mobilenet_v3() -> nn.Module:
    act = nn.Hardswish()
    blocks = [
        inverted(8, 12, 16, 2, act, squeeze(16, 4, nn.Hardsigmoid)),
        inverted(12, 12, 24, 1, act, squeeze(24, 8, nn.Hardsigmoid)),
    ]
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 16), act, nn.Linear(16, 5))
    return nn.Sequential(conv(3, 8, 3, 2, act=act), *blocks, conv(12, 24, 1, act=act), end)


def mnasnet() -> nn.Module:
    separable = nn.Sequential(conv(8, 8, 3, 1, 8), plain(8, 8))
    return nn.Sequential(conv(3, 8, 3, 2), separable, inverted(8, 12, 24, 2), inverted(12, 12, 24), conv(12, 24, 1), head(24))


def efficientnet() -> nn.Module:
    act = nn.SiLU()
    blocks = [inverted(8, 12, 16, 2, act, squeeze(16, 2)), inverted(12, 12, 24, 1, act, squeeze(24, 3))]
    return nn.Sequential(conv(3, 8, 3, 2, act=act), *blocks, conv(12, 24, 1, act=act), head(24))


def shufflenet_v2() -> nn.Module:
    def shuffle(x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)

    def body(ins: int, width: int, stride: int) -> nn.Module:
        return nn.Sequential(conv(ins, width, 1), plain(width, width, 3, stride, width), conv(width, width, 1))

    def unit(width: int) -> nn.Module:
        def forward(x: torch.Tensor, body: nn.Module) -> torch.Tensor:
            left, right = x.chunk(2, dim=1)
            return shuffle(torch.cat([left, body(right)], 1))

        return Apply(forward, body=body(width, width, 1))

    def down(ins: int, width: int) -> nn.Module:
        side = nn.Sequential(plain(ins, ins, 3, 2, ins), conv(ins, width, 1))
        return Apply(lambda x, side, body: shuffle(torch.cat([side(x), body(x)], 1)), side=side, body=body(ins, width, 2))

    return nn.Sequential(conv(3, 8, 3, 2), down(8, 8), unit(8), unit(8), conv(16, 24, 1), head(24))


class ChannelsLastNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
            self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
            self.scale = nn.Parameter(torch.rand(channels, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)

    down = nn.Sequential(ChannelsLastNorm(8), nn.Conv2d(8, 12, 2, 2))
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), ChannelsLastNorm(12), nn.Flatten(1), nn.Linear(12, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), ChannelsLastNorm(8), Block(8), down, Block(12), end)


def mlp(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))


class ViT(nn.Module):
    """A class token, positions, nn.MultiheadAttention."""

    def __init__(self, channels: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, channels, 8, 8), nn.LayerNorm(channels)
        self.token, self.position = nn.Parameter(torch.rand(1, 1, channels)), nn.Parameter(torch.rand(1, 17, channels))
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norms, self.mlp, self.head = (
            nn.ModuleList(nn.LayerNorm(channels) for _ in range(2)),
            mlp(channels),
            nn.Linear(channels, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norm(x)[:, 0])


class Swin(nn.Module):
    """Shifted windows with a relative position bias, and patch merging."""

    def __init__(self, channels: int = 8, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.patches, self.norms = nn.Conv2d(3, channels, 4, 4), nn.ModuleList(nn.LayerNorm(channels) for _ in range(4))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(channels, n * channels) for _ in range(2)) for n in (3, 1))
        self.table = nn.Parameter(torch.rand((2 * window - 1) ** 2, heads))
        steps = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = steps[:, :, None] - steps[:, None, :] + window - 1
        self.register_buffer("number", (apart[0] * (2 * window - 1) + apart[1]).flatten())
        self.mlps = nn.ModuleList(mlp(channels) for _ in range(2))
        self.merge_norm, self.merge = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)
        self.head = nn.Linear(2 * channels, 5)

    number: torch.Tensor

    def attend(self, x: torch.Tensor, k: int, shift: int) -> torch.Tensor:
        (b, h, w, c), n = x.shape, self.window
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = x.view(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, n * n, c)
        q, key, v = self.qkv[k](x).reshape(x.shape[0], n * n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        bias = self.table[self.number].view(n * n, n * n, -1).permute(2, 0, 1)
        y = F.softmax(scores + bias, -1) @ v
        y = self.out[k](y.transpose(1, 2).reshape(x.shape[0], n * n, c))
        y = y.view(b, h // n, w // n, n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(y, (shift, shift), (1, 2)) if shift else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for k in range(2):
            x = x + self.attend(self.norms[2 * k](x), k, k * self.window // 2)
            x = x + self.mlps[k](self.norms[2 * k + 1](x))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(self.merge_norm(x)).mean((1, 2)))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        alexnet, vgg, resnet, resnet_bottleneck, resnext, wide_resnet, regnet, densenet, squeezenet, googlenet, inception_v3,
        mobilenet_v2, mobilenet_v3, mnasnet, efficientnet, shufflenet_v2, convnext,
    )
} | {"vit": ViT, "swin": Swin}  # fmt: skip
