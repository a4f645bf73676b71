"""Weights of fewer than 8 bits as dense bit streams, one a row: `pack` before the op, `gw::unpack` in the program.

    codes u of a row, 3 bits each     u0 = abc, u1 = def, u2 = ghi, ...      (a, d, g: highest bits)
    bytes of the row                  h i d e f a b c | ...                  first code in the lowest bits

Eight codes fill `bits` bytes; the last byte of a row is filled up with zeros.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F

from ._library import define

#: Widths that are packed; codes of 8 bits are stored as they are.
LEAST_BITS, MOST_BITS = 2, 7


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes (rows, ...) in [0, 2^bits) -> u8 (rows, row_bytes(codes of a row, bits)).

    Raises:
        ValueError: bits outside 2 to 7, or a code that needs more of them.
    """
    _require_width(bits)
    rows, count = codes.shape[0], prod(codes.shape[1:])
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise ValueError(f"codes in [{int(codes.min())}, {int(codes.max())}] do not fit {bits} bits")
    eights = F.pad(codes.reshape(rows, count).to(torch.uint8), (0, -count % 8)).reshape(rows, -1, 8)
    stream = torch.zeros((rows, eights.shape[1], bits + 1), dtype=torch.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        stream[..., byte] |= eights[..., place] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= eights[..., place] >> (8 - shift)
    return stream[..., :bits].reshape(rows, -1)[:, : row_bytes(count, bits)].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack`: u8 (rows, count)."""
    rows, eights = packed.shape[0], -(-count // 8)
    stream = F.pad(packed, (0, eights * bits - packed.shape[1])).reshape(rows, eights, bits)
    codes = []
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code = code | stream[..., byte + 1] << (8 - shift)
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, -1).reshape(rows, -1)[:, :count]


def _require_width(bits: int) -> None:
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"codes of {LEAST_BITS} to {MOST_BITS} bits are packed, not of {bits}")


def _unpack_shape(packed, bits, shape, zero_point=None):
    _require_width(bits)
    expected = (shape[0], row_bytes(prod(shape[1:]), bits))
    if packed.dtype is not torch.uint8 or tuple(packed.shape) != expected:
        raise ValueError(
            f"{list(shape)} at {bits} bits is packed as uint8 {expected}, not as {packed.dtype} {tuple(packed.shape)}"
        )
    if zero_point is not None and tuple(zero_point.shape) != (shape[0],):
        raise ValueError(f"{list(shape)} has {shape[0]} rows with a zero point each, not {tuple(zero_point.shape)}")
    return torch.empty(tuple(shape), dtype=torch.int8, device=packed.device)


@define("unpack(Tensor packed, int bits, SymInt[] shape, Tensor? zero_point=None) -> Tensor", _unpack_shape)
def unpack(packed, bits: int, shape, zero_point=None):
    """s8 `shape` from `pack`ed rows: u - 2^(bits - 1), or u - zero_point[row] (int16 (rows,)), which must fit s8.

    packed u8 (shape[0], row_bytes(prod(shape[1:]), bits)); bits 2 to 7.
    """
    _unpack_shape(packed, bits, shape, zero_point)
    codes = unpack_codes(packed, bits, prod(shape[1:])).to(torch.int16)
    zero = 1 << (bits - 1) if zero_point is None else zero_point.to(torch.int16).reshape(-1, 1)
    return (codes - zero).to(torch.int8).reshape(tuple(shape))
