"""What kernel generators and the graph lowering agree on.

Physical layouts
    Spatial activations (logical N, C, H, W) live as [N, H, W, Cp], Cp = C rounded up to LANES; lanes past C hold anything.
    Everything else is dense and row-major: rows [M, K] for linear layers, [B, M, K] for matmul.
    Weights are packed once at build time, by the generator that reads them.
Every kernel is a TIR PrimFunc with static shapes, buffers in the order inputs, packed parameters, output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Channels of a spatial tensor are padded to this many: one 512-bit register of s32 accumulators.
LANES = 16

#: LANES floats, as TIR names the type.
VECTOR = f"float32x{LANES}"


def padded(channels: int, multiple: int = LANES) -> int:
    return -(-channels // multiple) * multiple


@dataclass(frozen=True)
class ResidualAdd:
    """`gw::add` fused after a rescale: a is the rescaled value, b a second tensor of the output's shape (an extra input buffer).

    Fields as in `gw::add`; b_dtype is uint8 or int8. The result is stored as the tail's dtype.
    """

    a_multiplier: int
    b_multiplier: int
    shift: int
    a_zero_point: int
    b_zero_point: int
    zero_point: int
    qmin: int
    qmax: int
    b_dtype: str


@dataclass(frozen=True)
class FloatAdd:
    """A float32 addition fused after `gw::scale`: the second tensor, of the output's shape, is an extra input buffer.

    normalized: what is added is the layer normalization of that buffer; behind it stand the mean and the inverse deviation of
    each row [rows, 2], weight and bias [C], all float32. CUDA's linear layers alone add one.
    """

    b_dtype: str = "float32"
    normalized: bool = False


@dataclass(frozen=True)
class Outliers:
    """The few columns of a layer that `split-outliers` took out: codes [rows, columns] of `dtype` with their zero point."""

    columns: int
    dtype: str
    zero_point: int


@dataclass(frozen=True)
class Tail:
    """What happens to an s32 accumulator before it is stored; mirrors `gw::rescale`, `gw::rescale_dyadic` and `gw::scale`.

    rescale: reads float32 scale [C]; dyadic: reads s32 multiplier [C] and s32 shift [C]; scale: reads float32 scale [C],
    stores float32; none: stores the s32 accumulator. Parameters are per output channel, always expanded to the full vector
    (padded like the output's channels) at build time. dtype is the stored type: uint8, int8, float32 or int32.
    residual: an addition fused after rescale, dyadic or scale; saves one pass over memory.
    shrinks: every float scale is below 1, so that no product leaves s32 and saturating packs can do the upper clamp.
    bounded: no product of an accumulator and its scale reaches 2^22, so that one addition rounds it. CUDA's kernels alone ask.
    table: type of the 256 entries that replace the codes at last (`gw::lookup`); "": none. CUDA's kernels alone look up.
    outliers: a second product that is added to a scaled one before the residual is. CUDA's linear layers alone take one.
    """

    kind: Literal["rescale", "dyadic", "scale", "none"]
    dtype: str
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 255
    residual: ResidualAdd | FloatAdd | None = None
    shrinks: bool = False
    bounded: bool = False
    table: str = ""
    outliers: Outliers | None = None

    @property
    def stored(self) -> str:
        """Type of the elements that are stored."""
        return self.table or self.dtype


def pair(values: tuple[int, int]) -> str:
    """`2` for (2, 2), `2x1` for (2, 1)."""
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


@dataclass(frozen=True)
class Convolution:
    """Shape of a 2-D convolution; spatial extents are (height, width).

    padding: rows above and columns left of the image. padding_end: rows below and columns right; None: as many again.
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_end: tuple[int, int] | None = None

    @property
    def framed_height(self) -> int:
        """Height of the image with its padding."""
        return self.height + self.padding[0] + (self.padding if self.padding_end is None else self.padding_end)[0]

    @property
    def framed_width(self) -> int:
        """Width of the image with its padding."""
        return self.width + self.padding[1] + (self.padding if self.padding_end is None else self.padding_end)[1]

    @property
    def bordered(self) -> bool:
        return (self.framed_height, self.framed_width) != (self.height, self.width)

    @property
    def out_height(self) -> int:
        return (self.framed_height - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.framed_width - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels == self.filters and self.groups > 1

    @property
    def work(self) -> str:
        """`96x56x56 -> 24x56x56, 1x1` with what differs from the defaults: batch, stride, padding, dilation, groups."""
        changed = [
            f"{name} {pair(value)}"
            for name, value, default in (
                ("stride", self.stride, (1, 1)),
                ("pad", self.padding, (0, 0)),
                ("dilation", self.dilation, (1, 1)),
            )
            if value != default
        ]
        changed += [f"groups {self.groups}"] if self.groups > 1 else []
        batch = f"{self.batch}x" if self.batch > 1 else ""
        image = f"{batch}{self.channels}x{self.height}x{self.width} -> {self.filters}x{self.out_height}x{self.out_width}"
        return ", ".join([image, f"{self.kernel[0]}x{self.kernel[1]}", *changed])

    @property
    def macs(self) -> int:
        taps = self.kernel[0] * self.kernel[1] * self.channels // self.groups
        return self.batch * self.filters * self.out_height * self.out_width * taps
