"""Data movement as an index map, composed before anything is copied.

A permutation, slice, selection, squeeze or expansion of a row-major tensor reads element start + step * i along each of its
axes; so does any chain of them. A chain is copied once, when its dense form is read, and never where nobody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

#: One axis of the source: the output axis it follows (None: it stays at `start`), where it starts, and its step.
Axis = tuple[int | None, int, int]


@dataclass(frozen=True)
class Strided:
    """out[i] = source[start_k + step_k * i[axis_k] for each source axis k]."""

    source: tuple[int, ...]
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Strided:
        return cls(tuple(shape), tuple((d, 0, 1) for d in range(len(shape))), tuple(shape))

    @property
    def moves_nothing(self) -> bool:
        """Whether the output holds the source's elements in the same order: axes of size 1 do not count."""
        followed = [axis for axis, size in zip(self.axes, self.source, strict=True) if size != 1]
        kept = [(d, 0, 1) for d, size in enumerate(self.shape) if size != 1]
        return followed == kept and [n for n in self.source if n != 1] == [n for n in self.shape if n != 1]

    @property
    def contiguous(self) -> bool:
        """Whether neighbours along the last output axis are neighbours in the source."""
        return bool(self.shape) and bool(self.axes) and self.axes[-1][0] == len(self.shape) - 1 and self.axes[-1][2] == 1

    @property
    def start(self) -> int:
        """Element of the source that output element 0 reads."""
        return sum(start * stride for (_, start, _), stride in zip(self.axes, _row_major(self.source), strict=True))

    @property
    def strides(self) -> tuple[int, ...]:
        """How far apart, in elements of the source, neighbours along each output axis lie; 0 along a broadcast axis."""
        strides = [0] * len(self.shape)
        for (axis, _, step), stride in zip(self.axes, _row_major(self.source), strict=True):
            if axis is not None:
                strides[axis] += step * stride
        return tuple(strides)

    def _renumbered(self, number: dict[int, int | None], shape: Sequence[int]) -> Strided:
        axes = tuple((None if d is None else number[d], start, step) for d, start, step in self.axes)
        return replace(self, axes=axes, shape=tuple(shape))

    def permute(self, order: Sequence[int]) -> Strided:
        return self._renumbered({d: place for place, d in enumerate(order)}, [self.shape[d] for d in order])

    def slice(self, dim: int, begin: int, step: int, length: int) -> Strided:
        axes = tuple((d, s + p * begin, p * step) if d == dim else (d, s, p) for d, s, p in self.axes)
        shape = tuple(length if d == dim else n for d, n in enumerate(self.shape))
        return replace(self, axes=axes, shape=shape)

    def select(self, dim: int, index: int) -> Strided:
        return self.slice(dim, index, 1, 1).squeeze([dim])

    def squeeze(self, dims: Sequence[int]) -> Strided:
        """Drops axes of size 1."""
        kept = [d for d in range(len(self.shape)) if d not in dims]
        number: dict[int, int | None] = dict.fromkeys(dims)
        number.update({d: place for place, d in enumerate(kept)})
        return self._renumbered(number, [self.shape[d] for d in kept])

    def unsqueeze(self, dim: int) -> Strided:
        shape = [*self.shape[:dim], 1, *self.shape[dim:]]
        return self._renumbered({d: d + (d >= dim) for d in range(len(self.shape))}, shape)

    def reshape(self, shape: Sequence[int]) -> Strided | None:
        """Drops and adds axes of size 1; None where `shape` asks for more."""
        if [n for n in self.shape if n != 1] != [n for n in shape if n != 1]:
            return None
        result = self.squeeze([d for d, n in enumerate(self.shape) if n == 1])
        for d, n in enumerate(shape):
            if n == 1:
                result = result.unsqueeze(d)
        return result

    def expand(self, shape: Sequence[int]) -> Strided:
        """Broadcasts axes of size 1, and adds axes in front."""
        added = len(shape) - len(self.shape)
        number = {d: d + added if size == shape[d + added] else None for d, size in enumerate(self.shape)}
        return self._renumbered(number, shape)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
