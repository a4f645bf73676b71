"""Real factors as integers: dyadic numbers for rescaling, common-shift multipliers for adding."""

from __future__ import annotations

import math

import torch

#: Mantissa bits of a dyadic multiplier (m in [2^30, 2^31)) and of the larger multiplier of an add (in [2^20, 2^21)).
DYADIC_BITS = 31
ADD_BITS = 21
LARGEST_SHIFT = 62
LARGEST_ADD_SHIFT = 30


def dyadic(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(multiplier, shift), int32 each, with factor = multiplier / 2^shift to 31 bits (HAWQ-V3, arXiv:2011.10680, section 3.1).

    multiplier lies in [2^30, 2^31) and shift in [1, 62]; factors under 2^-32 keep shift 62 and a shorter multiplier.

    Raises:
        ValueError: a factor that is not positive, or 2^29 and more (the accumulator would need no rescaling).
    """
    pairs = [_dyadic(float(f)) for f in factor.flatten()]
    multiplier, shift = (torch.tensor(column, dtype=torch.int32) for column in zip(*pairs, strict=True))
    return multiplier, shift


def _dyadic(factor: float) -> tuple[int, int]:
    if not 0 < factor < 2**29:
        raise ValueError(f"a rescaling factor must lie in (0, 2^29), not {factor}")
    _, exponent = math.frexp(factor)  # factor = mantissa * 2^exponent, mantissa in [0.5, 1)
    shift = min(DYADIC_BITS - exponent, LARGEST_SHIFT)
    multiplier = round(math.ldexp(factor, shift))
    if multiplier == 1 << DYADIC_BITS:  # rounded up to the next power of two
        multiplier, shift = multiplier >> 1, shift - 1
    return multiplier, shift


def add_multipliers(a: float, b: float) -> tuple[int, int, int] | None:
    """(a multiplier, b multiplier, shift) of `gw::add`: the larger factor gets 21 bits, so every sum stays inside s32.

    None where the larger factor is outside [2^-10, 2^19): no shift in [1, 30] suits.
    """
    _, exponent = math.frexp(max(abs(a), abs(b)))
    shift = ADD_BITS - exponent
    multipliers = [round(math.ldexp(f, shift)) for f in (a, b)]
    if max(abs(m) for m in multipliers) == 1 << ADD_BITS:
        shift -= 1
        multipliers = [round(math.ldexp(f, shift)) for f in (a, b)]
    if not 1 <= shift <= LARGEST_ADD_SHIFT:
        return None
    return multipliers[0], multipliers[1], shift
