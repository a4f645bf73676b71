"""Code for `Tail`: from s32 accumulators to stored values, bit-equal to `gw::rescale`, `rescale_dyadic`, `scale` and `add`.

The float path is one conversion, one multiply, a clamp and one rounding. Only `FloatAdd` adds floats; its product is fenced, so
that LLVM cannot fuse the two. Rounding is half to even under the default mode (`nearbyint`, `cvtps2dq`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ....ir.errors import OptionError
from .base import LANES, FloatAdd, ResidualAdd, Tail, padded
from .emit import Argument, arguments, bind, fence, shuffle, splat, store
from .isa import Isa, T


def tail_parameters(tail: Tail) -> tuple[tuple[str, str], ...]:
    """(name, dtype) of the packed parameter vectors a tail reads, in buffer order."""
    return {
        "rescale": (("scale", "float32"),),
        "scale": (("scale", "float32"),),
        "dyadic": (("multiplier", "int32"), ("shift", "int32")),
        "none": (),
    }[tail.kind]


def pack_tail(tail: Tail, channels: int, order: np.ndarray | None = None, **values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Expands each parameter ((1,) or (channels,)) to padded(channels) entries. order: channel of each packed lane.

    Padding lanes get 1: a shift must stay inside [1, 62].
    """
    packed = []
    for name, dtype in tail_parameters(tail):
        if values.get(name) is None:
            raise OptionError(f"tail '{tail.kind}' needs '{name}'; got {', '.join(sorted(values)) or 'nothing'}")
        vector = np.ones(padded(channels), dtype)
        vector[:channels] = np.asarray(values[name], dtype).reshape(-1)
        packed.append(vector if order is None else vector[order])
    return tuple(packed)


@dataclass
class TailCode:
    """Emits a tail: declare its buffers once, then `emit` for every vector of accumulators."""

    tail: Tail
    isa: Isa
    parameters: tuple[Any, ...]
    residual: Any
    output: Any

    def load(self, lane: Any) -> tuple[Any, ...]:
        """Parameter vectors of the LANES channels from packed lane `lane` on."""
        return tuple(
            bind(buffer.vload([lane], f"{dtype}x{LANES}"))
            for buffer, (_, dtype) in zip(self.parameters, tail_parameters(self.tail), strict=True)
        )

    def emit(self, acc: Any, parameters: tuple[Any, ...], offset: Any, valid: int = LANES) -> None:
        """Finishes one vector and stores its first `valid` lanes at output element `offset`."""
        value = self._finish(acc, parameters)
        if isinstance(self.tail.residual, FloatAdd):
            value = fence(value) + self._other(offset, valid)
        elif self.tail.residual is not None:
            value = add_residual(self.tail.residual, value, T.Cast(f"int32x{LANES}", self._other(offset, valid)))
        value = value if self.tail.dtype in ("int32", "float32") else T.Cast(f"{self.tail.dtype}x{LANES}", value)
        if valid == LANES:
            store(self.output, offset, value)
            return
        spill = T.alloc_buffer((LANES,), self.tail.dtype)
        store(spill, 0, value)
        with T.serial(0, valid) as lane:
            T.buffer_store(self.output, spill.vload([lane]), [offset + lane])

    @property
    def bytes(self) -> int:
        """Bytes read and written for one element of the output."""
        residual = self.tail.residual
        return np.dtype(self.tail.dtype).itemsize + (np.dtype(residual.b_dtype).itemsize if residual is not None else 0)

    @property
    def narrow(self) -> bool:
        """Four vectors at a time can be narrowed with saturating packs (8-bit output on AVX-512)."""
        return self.isa.avx512 and self.tail.dtype in ("uint8", "int8")

    def emit_four(
        self, accs: list[Any], parameters: list[tuple[Any, ...]], offsets: Any, pieces: tuple[int, int] | None = None
    ) -> None:
        """Finishes four vectors, needs `narrow`.

        Args:
            offsets: four output elements, each for one row of consecutive channels (None: do not store that row); two, each for
                a row of 2 * LANES channels that two vectors hold, or one for a row of four; or no list but a single element
                for 4 * LANES bytes whose s32 lanes are split as `interleaved_order`.
            pieces: (size, stride) stores those bytes as runs of `size`, `stride` elements apart.
        """
        rows = isinstance(offsets, list)
        steps = [self._steps(acc, vectors) for acc, vectors in zip(accs, parameters, strict=True)]
        if isinstance(self.tail.residual, ResidualAdd):
            steps = self._add_four(self.tail.residual, steps, offsets)
        packed = [x86_pack("packssdw", "int16x32", *pair) for pair in (steps[:2], steps[2:])]
        zero_point = self.tail.zero_point if self.tail.kind == "rescale" and self.tail.residual is None else 0
        if zero_point:
            shift = T.Broadcast(T.int16(zero_point), 32)
            packed = [T.call_llvm_pure_intrin("int16x32", "llvm.sadd.sat", half, shift) for half in packed]
        unsigned = self.tail.dtype == "uint8"
        value = x86_pack("packuswb" if unsigned else "packsswb", f"{self.tail.dtype}x64", *packed)
        lowest = 0 if unsigned else -128
        if self.tail.qmin > lowest and self.tail.residual is None:
            value = T.max(value, T.Broadcast(getattr(T, self.tail.dtype)(self.tail.qmin), 64))
        value = bind(value)
        if not rows:
            size, stride = pieces or (64, 0)
            for index in range(64 // size):
                part = value if size == 64 else shuffle([value], list(range(index * size, (index + 1) * size)))
                store(self.output, offsets + index * stride, part, size)
            return
        # In each 128-bit lane the packs leave four channels of each vector: gather the vectors.
        value = bind(shuffle([value], [16 * lane + 4 * row + e for row in range(4) for lane in range(4) for e in range(4)]))
        width = 64 // len(offsets)
        for row, offset in enumerate(offsets):
            if offset is not None:
                store(self.output, offset, shuffle([value], list(range(width * row, width * row + width))), width)

    def _steps(self, acc: Any, parameters: tuple[Any, ...]) -> Any:
        """As `_finish`; for a plain rescale without the zero point and the lower clamp, which the saturating packs supply."""
        if self.tail.kind != "rescale" or self.tail.residual is not None:
            return self._finish(acc, parameters)
        product = T.Cast(f"float32x{LANES}", acc) * parameters[0]
        if self.tail.shrinks and self.tail.qmax == (255 if self.tail.dtype == "uint8" else 127):
            return self._round(product)
        return self._round(T.min(product, splat(T.float32(self.tail.qmax - self.tail.zero_point))))

    def _add_four(self, add: ResidualAdd, steps: list[Any], offsets: Any) -> list[Any]:
        dtype = str(self.residual.dtype)
        if isinstance(offsets, list):
            first = next(offset for offset in offsets if offset is not None)
            places = [first if offset is None else offset for offset in offsets]
            width = 4 // len(places)
            places = [place + LANES * index if index else place for place in places for index in range(width)]
            others = [self.residual.vload([place], f"{dtype}x{LANES}") for place in places]
        else:
            block = bind(self.residual.vload([offsets], f"{dtype}x64"))
            others = [shuffle([block], [int(lane) for lane in lanes]) for lanes in interleaved_order()]
        return [
            add_residual(add, step, T.Cast(f"int32x{LANES}", other), self.tail.dtype)
            for step, other in zip(steps, others, strict=True)
        ]

    def _other(self, offset: Any, valid: int) -> Any:
        """The residual's vector at `offset`; never reads past its `valid` lanes."""
        kind = f"{self.residual.dtype}x{LANES}"
        if valid == LANES:
            return self.residual.vload([offset], kind)
        partial = T.alloc_buffer((LANES,), str(self.residual.dtype))
        with T.serial(0, valid) as lane:
            T.buffer_store(partial, self.residual.vload([offset + lane]), [lane])
        return partial.vload([0], kind)

    def _finish(self, acc: Any, parameters: tuple[Any, ...]) -> Any:
        tail = self.tail
        if tail.kind == "none":
            return acc
        if tail.kind == "dyadic":
            return dyadic(tail, acc, *parameters)
        product = T.Cast(f"float32x{LANES}", acc) * parameters[0]
        if tail.kind == "scale":
            return product
        low, high = (splat(T.float32(limit - tail.zero_point)) for limit in (tail.qmin, tail.qmax))
        steps = self._round(T.max(T.min(product, high), low))
        return steps + splat(T.int32(tail.zero_point)) if tail.zero_point else steps

    def _round(self, value: Any) -> Any:
        return rounded(self.isa, value)


def rounded(isa: Isa, value: Any) -> Any:
    """A vector of floats within +-2^22 as s32, half to even."""
    if isa.neon:
        # The sum's last bit is worth 1, so the addition rounds. AArch64 cores convert at half the rate or less.
        return T.reinterpret(f"int32x{LANES}", value + splat(T.float32(1.5 * 2**23))) - splat(T.int32(0x4B400000))
    if not isa.avx512:
        return T.Cast(f"int32x{LANES}", T.nearbyint(value))
    zero = splat(T.int32(0))
    name = "llvm.x86.avx512.mask.cvtps2dq.512"  # rounds by the current mode: nearest, ties to even
    return T.call_llvm_pure_intrin("int32x16", name, value, zero, T.int16(-1), T.int32(4))


def declare(
    tail: Tail, isa: Isa, channels: int, inputs: list[Argument], packed: list[Argument], out_shape: tuple[int, ...]
) -> tuple[list[Any], TailCode]:
    """Declares a kernel's buffers: inputs, the tail's residual (R, of the output's shape), packed parameters, the tail's
    parameters ([padded(channels)] each), output Y. Returns flat views of inputs and packed parameters, and the tail."""
    extra = [("R", out_shape, tail.residual.b_dtype)] if tail.residual else []
    vectors = [(name, (padded(channels),), dtype) for name, dtype in tail_parameters(tail)]
    flat = arguments(*inputs, *extra, *packed, *vectors, ("Y", out_shape, tail.dtype))
    first = len(inputs) + len(extra)
    last = first + len(packed)
    code = TailCode(tail, isa, tuple(flat[last:-1]), flat[len(inputs)] if extra else None, flat[-1])
    return [*flat[: len(inputs)], *flat[first:last]], code


def interleaved_order() -> np.ndarray:
    """[4][LANES]: which of 64 channels each s32 lane holds after two levels of in-lane byte unpacking."""
    vector, lane, element = np.meshgrid(np.arange(4), np.arange(4), np.arange(4), indexing="ij")
    return (16 * lane + 4 * vector + element).reshape(4, LANES)


def x86_pack(name: str, dtype: str, low: Any, high: Any) -> Any:
    """AVX-512 saturating narrow of two vectors, 128-bit lane by 128-bit lane."""
    return T.call_llvm_pure_intrin(dtype, f"llvm.x86.avx512.{name}.512", low, high)


def dyadic(tail: Tail, acc: Any, multiplier: Any, shift: Any) -> Any:
    wide, narrow = f"int64x{LANES}", f"int32x{LANES}"
    shift = T.Cast(wide, shift)
    one = splat(T.int64(1))
    half = T.shift_left(one, shift - one)
    steps = T.shift_right(T.Cast(wide, acc) * T.Cast(wide, multiplier) + half, shift) + splat(T.int64(tail.zero_point))
    return T.Cast(narrow, T.max(T.min(steps, splat(T.int64(tail.qmax))), splat(T.int64(tail.qmin))))


def add_residual(add: ResidualAdd, a: Any, b: Any, dtype: str = "") -> Any:
    """`gw::add` on s32 lanes: `a` is the rescaled value, `b` the second tensor.

    dtype: the 8-bit type to whose range the caller saturates the result; a clamp to that range itself is left to it then.
    """

    def lanes(value: int) -> Any:
        return splat(T.int32(value))

    before, after = (add.zero_point << add.shift, 0) if dtype and _early_zero_point(add, dtype) else (0, add.zero_point)
    total = (a - lanes(add.a_zero_point)) * lanes(add.a_multiplier) + (b - lanes(add.b_zero_point)) * lanes(add.b_multiplier)
    steps = T.shift_right(total + lanes((1 << (add.shift - 1)) + before), lanes(add.shift))
    steps = steps + lanes(after) if after or not dtype else steps
    limits = np.iinfo(dtype) if dtype else None
    if limits is None or add.qmax < limits.max:
        steps = T.min(steps, lanes(add.qmax))
    return T.max(steps, lanes(add.qmin)) if limits is None or add.qmin > limits.min else steps


def _early_zero_point(add: ResidualAdd, dtype: str) -> bool:
    """Whether the sum has room in s32 for the zero point before the shift, where it is one constant with the rounding's half."""

    def most(kind: str, zero_point: int, multiplier: int) -> int:
        limits = np.iinfo(kind)
        return max(abs(int(limit) - zero_point) for limit in (limits.min, limits.max)) * abs(multiplier)

    products = most(dtype, add.a_zero_point, add.a_multiplier) + most(add.b_dtype, add.b_zero_point, add.b_multiplier)
    return products + (1 << (add.shift - 1)) + (abs(add.zero_point) << add.shift) < 1 << 31
