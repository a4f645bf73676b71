"""Weights as codes of a table: `gw::fake_codebook` in the annotated stage, `gw::decode` in the integer stage.

    value = table[code] * scale                 one float32 product, scale (O, G): one for each group of inputs of a row
    value = (table[code] - zero) * scale        where there is a zero, u8 (O, G)

A row is all weights of one output channel, flattened; its group g holds the weights [g * group, (g + 1) * group), and the last
group of a row may be shorter. The table is sorted, with distinct entries, at most 2^bits of them. Activations stay float.
"""

from __future__ import annotations

from math import prod

import torch

from . import packed as bitstream
from ._library import LIBRARY, define


def groups_of(count: int, group: int) -> int:
    """Groups of a row of `count` weights."""
    return -(-count // group)


def spread(values: torch.Tensor, shape: tuple[int, ...], group: int) -> torch.Tensor:
    """(O, G) -> `shape` (O, ...): the value of each weight's group."""
    count = prod(shape[1:])
    return values.repeat_interleave(group, 1)[:, :count].reshape(shape)


def nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the entry nearest to each x, int64; x beyond the ends saturates.

    In the middle between two entries, the one an even number of places from the entry nearest 0: round half even for integers,
    and the even mantissa for floating-point formats, as IEEE 754 rounds.
    """
    wide = table.to(torch.float64)
    middle = (wide[1:] + wide[:-1]) / 2
    value = x.to(torch.float64).contiguous()
    lower, upper = torch.bucketize(value, middle), torch.bucketize(value, middle, right=True)
    origin = wide.abs().argmin()
    return torch.where((lower - origin) % 2 == 0, lower, upper)


def codes_of(
    x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, group: int, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """The codes of weights (O, ...), u8: the entries nearest to x / scale (+ zero), the quotient in float32."""
    return nearest(_steps(x, scale, group, zero), table).to(torch.uint8)


def _steps(x: torch.Tensor, scale: torch.Tensor, group: int, zero: torch.Tensor | None) -> torch.Tensor:
    steps = x / spread(scale, tuple(x.shape), group)
    return steps if zero is None else steps + spread(zero, tuple(x.shape), group).to(x.dtype)


def values_of(
    codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, group: int, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """What codes (O, ...) mean, float32."""
    entries = table[codes.to(torch.int64)]
    if zero is not None:
        entries = entries - spread(zero, tuple(codes.shape), group).to(torch.float32)
    return entries * spread(scale, tuple(codes.shape), group)


class _FakeCodebook(torch.autograd.Function):
    """Values held on a table. The gradient is the straight-through estimator, cut where a value saturates."""

    @staticmethod
    def forward(ctx, x, table, scale, group: int, zero, codes):  # type: ignore[override]
        steps = _steps(x, scale, group, zero)
        ctx.save_for_backward((steps >= table[0]) & (steps <= table[-1]))
        chosen = codes_of(x, table, scale, group, zero) if codes is None else codes
        return values_of(chosen, table, scale, group, zero).to(x.dtype)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None, None


LIBRARY.define("fake_codebook(Tensor x, Tensor table, Tensor scale, int group, Tensor? zero=None, Tensor? codes=None) -> Tensor")
LIBRARY.impl(
    "fake_codebook",
    lambda *args: _FakeCodebook.apply(*args, *(None,) * (6 - len(args))),
    "CompositeImplicitAutograd",
)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """u8 codes (O, ...) -> u8 (O, bytes of a row): the bit stream of `packed`, or the codes themselves at 8 bits."""
    return codes.reshape(codes.shape[0], -1).contiguous() if bits == 8 else bitstream.pack(codes, bits)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse: u8 (O, count)."""
    return packed if bits == 8 else bitstream.unpack_codes(packed, bits, count)


def _decode_shape(packed, bits, shape, table, scale, group, zero=None):
    rows, count = shape[0], prod(shape[1:])
    expected = {
        "packed": (packed, (rows, bitstream.row_bytes(count, bits))),
        "scale": (scale, (rows, groups_of(count, group))),
        **({} if zero is None else {"zero": (zero, (rows, groups_of(count, group)))}),
    }
    for name, (tensor, wanted) in expected.items():
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} of {list(shape)} at {bits} bits, groups of {group}, is {wanted}, not {tuple(tensor.shape)}")
    if not 2 <= bits <= 8 or not 2 <= table.shape[0] <= 1 << bits:
        raise ValueError(f"a table of {table.shape[0]} entries has no codes of {bits} bits")
    return torch.empty(tuple(shape), dtype=torch.float32, device=packed.device)


@define(
    "decode(Tensor packed, int bits, SymInt[] shape, Tensor table, Tensor scale, int group, Tensor? zero=None) -> Tensor",
    _decode_shape,
)
def decode(packed, bits: int, shape, table, scale, group: int, zero=None):
    """float32 `shape` from `pack`ed codes; see the module text. Each operation rounds once, so the result is bit-exact."""
    _decode_shape(packed, bits, shape, table, scale, group, zero)
    codes = unpack(packed, bits, prod(shape[1:])).reshape(tuple(shape))
    return values_of(codes, table, scale, group, zero)
