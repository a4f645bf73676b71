"""Which values get an encoding: the integer regions of a canonical program.

Layers (convolution, linear, matmul) read codes. Every other op is integer only where its result ends up in an integer op, so
that nothing is quantized for its own sake: logits, masks and what feeds a layer norm stay float. A value has one encoding, placed
after the ops that fuse into its producer (relu, clamp) and before the ops that only move it (view, slice, max pool).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx

from ...ir.program import Program, single_user
from . import operators as ops
from .lower_forms import is_float


@dataclass
class Placement:
    """A value that gets an encoding. `readers` read its codes; `signed` asks for s8 with zero point 0."""

    source: fx.Node
    signed: bool = False
    readers: set[fx.Node] = field(default_factory=set)

    @property
    def bounded_by_softmax(self) -> bool:
        return self.source.target in ops.SOFTMAX


@dataclass(frozen=True)
class Regions:
    """Layers that become integer, and every activation that gets an encoding, both in graph order."""

    layers: tuple[fx.Node, ...]
    placements: tuple[Placement, ...]


def find_regions(program: Program, skip: Iterable[fx.Node] = ()) -> Regions:
    """Plans the integer regions; the nodes in `skip` stay float."""
    planner = _Planner(program, frozenset(skip))
    return Regions(tuple(planner.layers), tuple(planner.placements()))


class _Planner:
    def __init__(self, program: Program, skip: frozenset[fx.Node]) -> None:
        self.program, self.skip = program, skip
        self.nodes = list(program.nodes)
        self.layers = [n for n in self.nodes if n not in skip and self._is_layer(n)]
        self.integer = set(self.layers)
        self.wanted: set[fx.Node] = set()
        self._choose_soft_ops()
        self._keep_float_sums()

    # -- which ops are integer ---------------------------------------------------------------------------------------------

    def _is_layer(self, node: fx.Node) -> bool:
        if node.target in (ops.CONVOLUTION, ops.LINEAR):
            constant = all(self.program.parameter(a) is not None for a in node.args[1:3] if isinstance(a, fx.Node))
            return constant and is_float(node) and not ops.is_transposed(node)
        return node.target in ops.MATMUL and is_float(node)

    def _passes(self, node: fx.Node) -> bool:
        """Whether codes pass through `node` as they are (a constant factor changes their scale only)."""
        return ops.keeps_encoding(node) or ops.positive_factor(self.program, node) is not None

    def _is_soft(self, node: fx.Node) -> bool:
        """Ops that can be integer between integer ops."""
        if node in self.skip or node.op != "call_function" or not is_float(node):
            return False
        if node.target in ops.ADD or node.target is ops.MULTIPLY:
            if ops.is_unary(self.program, node):
                return True
            pair = node.args[:2]
            plain = not any(self.program.parameter(a) is not None or not isinstance(a, fx.Node) for a in pair)
            return plain and all(is_float(a) for a in pair) and node.kwargs.get("alpha", 1) == 1  # type: ignore[arg-type]
        if node.target is ops.AVERAGE_POOL:
            return not isinstance(ops.average_pool(node), str)
        return node.target is ops.CONCAT or ops.mean_dims(node) is not None or ops.is_unary(self.program, node)

    def _choose_soft_ops(self) -> None:
        """Backwards: an op is integer where some reader wants its codes, unless it is part of a float residual stream."""
        for node in reversed(self.nodes):
            if any(self._wants(user, node) for user in node.users):
                self.wanted.add(node)
                if not self._passes(node) and self._is_soft(node) and not self._feeds_normalization(node):
                    self.integer.add(node)

    def _wants(self, reader: fx.Node, value: fx.Node) -> bool:
        if self._passes(reader) and reader not in self.skip:
            return reader in self.wanted and reader.args[0] is value
        return reader in self.integer and value in self._operands(reader)

    def _feeds_normalization(self, node: fx.Node) -> bool:
        """An add whose result flows, through adds and moves, into a layer norm: the residual stream of a transformer."""
        if node.target not in ops.ADD:
            return False
        pending, seen = [node], {node}
        while pending:
            for user in pending.pop().users:
                if user.target is ops.LAYER_NORM:
                    return True
                if user not in seen and (user.target in ops.ADD or ops.keeps_encoding(user)):
                    seen.add(user)
                    pending.append(user)
        return False

    def _keep_float_sums(self) -> None:
        """Forwards: sums, products, means and clamps of values that are float anyway stay float; their result is quantized."""
        for node in self.nodes:
            if node in self.integer and node not in self.layers:
                cheap = ops.mean_dims(node) is not None or ops.clamp_bounds(node) is not None
                binary = (node.target in ops.ADD or node.target is ops.MULTIPLY) and not ops.is_unary(self.program, node)
                if (cheap or binary) and all(self._float_made(self.trace(v)[0]) for v in self._operands(node)):
                    self.integer.discard(node)

    def _float_made(self, source: fx.Node) -> bool:
        return source not in self.integer and source.op != "placeholder"

    # -- which values get an encoding --------------------------------------------------------------------------------------

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The activation operands of an integer op."""
        if node.target is ops.CONCAT:
            return list(node.args[0])  # type: ignore[arg-type]
        two = node.target in ops.MATMUL or (
            (node.target in ops.ADD or node.target is ops.MULTIPLY) and not ops.is_unary(self.program, node)
        )
        return [a for a in node.args[: 2 if two else 1] if isinstance(a, fx.Node)]

    def trace(self, value: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The value whose codes `value` moves around, and the first mover (None where there is none)."""
        first = None
        while self._passes(value) and value not in self.skip:
            first, value = value, value.args[0]  # type: ignore[assignment]
        return value, first

    def _absorbs(self, reader: fx.Node, value: fx.Node) -> bool:
        """Whether `reader` fuses with the op that makes `value`, so that nothing is rounded between them."""
        if single_user(value) is None:
            return False
        if ops.positive_factor(self.program, value) is not None:
            return self._absorbs_from(reader, value.args[0])  # type: ignore[arg-type]
        return self._absorbs_from(reader, value)

    def _absorbs_from(self, reader: fx.Node, value: fx.Node) -> bool:
        if single_user(value) is None or value not in self.integer:
            return False
        if reader.target is ops.CONCAT:
            return True
        is_clamp = ops.clamp_bounds(value) is not None
        if ops.clamp_bounds(reader) is not None:
            return value.target is not ops.CONCAT
        return ops.is_unary(self.program, reader) and ops.is_unary(self.program, value) and not is_clamp

    def _demands(self) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
        """(reader, operand, signed) for every operand that must be codes."""
        for node in self.nodes:
            if node in self.integer:
                fuses = node.target is ops.CONCAT or ops.is_unary(self.program, node)
                for index, operand in enumerate(self._operands(node)):
                    if not (fuses and self._absorbs(node, operand)):
                        yield node, operand, node.target in ops.MATMUL and index == 1

    def placements(self) -> Iterator[Placement]:
        found: dict[fx.Node, Placement] = {}
        for reader, operand, signed in self._demands():
            source, mover = self.trace(operand)
            placement = found.setdefault(source, Placement(source))
            placement.signed |= signed
            placement.readers.add(mover or reader)
        for node in self.nodes:
            if node in found:
                placement = found[node]
                if node in self.integer:
                    placement.readers.update(user for user in node.users if user.op != "output")
                yield placement
