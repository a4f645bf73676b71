"""Atoms: the smallest things that can be cut, joined where the graph ties them together and split where it takes them apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: The label of an index that never goes.
KEPT = -1


class Atoms:
    """Union-find whose elements may stand for a product of others.

    Every index of every dimension carries one atom. A reshape of 64 channels into (4 heads, 16) makes each of the 64 a product of
    a head and a position in the head: channel (h, d) goes where head h goes or position d goes. `resolve` gives the free atoms
    behind an atom; an index goes when any of its free atoms does. Joining is always sound, never an error: two atoms that are
    joined go together, and what cannot be matched factor by factor is tied into fewer atoms.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._products: dict[tuple[int, ...], int] = {}
        self._pins: list[tuple[int, str]] = []

    def fresh(self, count: int) -> np.ndarray:
        """`count` new free atoms."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def product(self, parts: Sequence[int]) -> int:
        """The atom that goes where any of `parts` goes; KEPT parts have no say."""
        key = tuple(dict.fromkeys(self.find(p) for p in parts if p != KEPT))
        if len(key) < 2:
            return key[0] if key else KEPT
        if key not in self._products:
            atom = int(self.fresh(1)[0])
            self._products[key] = atom
            self._parts[atom] = key
        return self._products[key]

    def find(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """`find` of every label; KEPT stays."""
        return np.array([KEPT if a == KEPT else self.find(a) for a in labels.ravel().tolist()]).reshape(labels.shape)

    def resolve(self, atom: int) -> tuple[int, ...]:
        """The free atoms behind an atom, outermost factor first; none for KEPT."""
        if atom == KEPT:
            return ()
        root = self.find(atom)
        if root not in self._parts:
            return (root,)
        return tuple(dict.fromkeys(free for part in self._parts[root] for free in self.resolve(part)))

    def pin(self, atom: int, reason: str) -> None:
        """Everything behind this atom stays."""
        self._pins.append((atom, reason))

    def pins(self) -> dict[int, str]:
        """Free atom -> why it stays; the first reason found in graph order."""
        found: dict[int, str] = {}
        for atom, reason in self._pins:
            for free in self.resolve(atom):
                found.setdefault(free, reason)
        return found

    def join(self, a: int, b: int, reason: str) -> None:
        """From now on `a` goes exactly where `b` goes. Joined with KEPT, an atom is pinned for `reason`."""
        if a == KEPT or b == KEPT:
            if a != b:
                self.pin(b if a == KEPT else a, reason)
            return
        left, right = self.resolve(a), self.resolve(b)
        if left == right:
            return
        if len(left) > len(right):
            a, b, left, right = b, a, right, left
        if len(left) > 1:
            # Factor by factor from the outside; the innermost of the shorter takes what is left of the longer.
            *outer, last = range(len(left))
            rest = self.product(right[last:])
            for k in outer:
                self.join(left[k], right[k], reason)
            self.join(left[last], rest, reason)
            return
        free = next(iter(left))
        if free in right:
            for other in right:
                self._parent[self.find(other)] = self.find(free)
        else:
            self._parent[free] = self.find(b)
