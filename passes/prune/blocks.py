"""The blocks of a network: residual branches x + f(x), and the runs of them that repeat (the layers of a transformer)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import fx

from ...ir.errors import UnknownNameError
from ...ir.printer import type_text
from ...ir.program import Program, origin_of
from ..fold.match import aten, is_call, is_float, is_tensor, same_type

#: What may stand between the sum of one block and the next block: a block ends with it where its input came out of one, too.
TAILS = (
    aten.relu.default,
    aten.relu6.default,
    aten.clamp.default,
    aten.hardtanh.default,
    aten.gelu.default,
    aten.layer_norm.default,
)

WEIGHTED = (aten.convolution.default, aten.linear.default)

Unit = Literal["layer", "branch"]


@dataclass(frozen=True)
class Block:
    """A part of a program with one input and one output of the same type, so that the program runs without it.

    Attributes:
        name: the common module path of its layers, or their first and last.
        entry: the value it reads; further values it reads (masks) do not depend on `entry`.
        exit: the node of its result, `entry` + f(`entry`), or the norm or activation behind that sum.
        nodes: all its nodes, in graph order, the last one `exit`; parameters are not among them.
        structure: equal for blocks that do the same with parameters of the same shapes.
    """

    name: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    structure: str

    def parameters(self) -> list[fx.Node]:
        """The `get_attr` nodes it reads, in the order in which it reads them."""
        return list(dict.fromkeys(a for node in self.nodes for a in node.all_input_nodes if a.op == "get_attr"))


@dataclass(frozen=True)
class Blocks:
    """branches: every residual branch. layers: the shortest runs of consecutive branches that repeat; other branches alone."""

    branches: tuple[Block, ...]
    layers: tuple[Block, ...]

    def of(self, unit: Unit) -> tuple[Block, ...]:
        return self.layers if unit == "layer" else self.branches

    def named(self, names: Iterable[str]) -> list[Block]:
        """The blocks with these names, layers and branches alike, in graph order.

        Raises:
            UnknownNameError: with the nearest name.
        """
        known = {block.name: block for block in (*self.branches, *self.layers)}
        wanted = list(names)
        for name in wanted:
            if name not in known:
                raise UnknownNameError("block", name, known)
        return [block for name, block in known.items() if name in wanted]


def find_blocks(program: Program) -> Blocks:
    """Every residual branch and repeated block. A branch whose sum has a projection on both sides cannot go and is not listed."""
    order = {node: index for index, node in enumerate(program.nodes)}
    branches = [block for node in program.nodes if (block := _branch(node, order)) is not None]
    layers = [layer for chain in _chains(branches) for layer in _repeated(chain)]
    layers.sort(key=lambda block: order[block.exit])
    return Blocks(tuple(_named(program, branches)), tuple(_named(program, layers)))


def _branch(node: fx.Node, order: dict[fx.Node, int]) -> Block | None:
    """The residual branch whose sum is `node`."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or not is_float(node):
        return None
    for entry in node.args:
        if not isinstance(entry, fx.Node) or entry.op == "get_attr" or not same_type(entry, node):
            continue
        inside = _between(entry, node, order)
        if inside and _is_closed(inside, node):
            exit_ = _tail(entry, node)
            nodes = (*inside, node, *([exit_] if exit_ is not node else []))
            return Block(_path(nodes), entry, exit_, nodes, _structure(entry, nodes))
    return None


def _between(entry: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes on the ways from `entry` to `end`, without both."""
    reached, found = {entry}, []
    stack, below = [end], {end}
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in below and order[source] > order[entry]:
                below.add(source)
                stack.append(source)
    for node in sorted(below, key=order.__getitem__):
        if node is not end and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            found.append(node)
    return found


def _is_closed(inside: Sequence[fx.Node], end: fx.Node) -> bool:
    """Whether nobody outside reads what is computed inside."""
    own = {*inside, end}
    return all(user in own for node in inside for user in node.users)


def _tail(entry: fx.Node, end: fx.Node) -> fx.Node:
    """The op behind the sum that belongs to the block: the norm of a post-norm transformer, the ReLU of a ResNet."""
    reader = next(iter(end.users)) if len(end.users) == 1 else None
    same = reader is not None and is_call(reader, *TAILS) and is_call(entry, reader.target)
    return reader if same and reader is not None and same_type(reader, end) else end


def _chains(branches: Sequence[Block]) -> Iterator[list[Block]]:
    """Branches each of which reads the result of the one before."""
    after = {block.entry: block for block in branches}
    ends = {block.exit for block in branches}
    for first in branches:
        if first.entry in ends or after[first.entry] is not first:
            continue
        chain: list[Block] = [first]
        while chain[-1].exit in after:
            chain.append(after[chain[-1].exit])
        yield chain


def _repeated(chain: Sequence[Block]) -> Iterator[Block]:
    """Cuts a chain into the shortest runs that occur at least twice in succession; what does not repeat stays alone."""
    at = 0
    while at < len(chain):
        period = next((p for p in range(1, (len(chain) - at) // 2 + 1) if _alike(chain, at, p)), None)
        if period is None:
            yield chain[at]
            at += 1
            continue
        while at + period <= len(chain) and (_alike(chain, at, period) or _alike(chain, at - period, period)):
            yield _joined(chain[at : at + period])
            at += period


def _alike(chain: Sequence[Block], at: int, period: int) -> bool:
    first, second = chain[at : at + period], chain[at + period : at + 2 * period]
    return at >= 0 and [b.structure for b in first] == [b.structure for b in second]


def _joined(run: Sequence[Block]) -> Block:
    if len(run) == 1:
        return run[0]
    nodes = tuple(node for block in run for node in block.nodes)
    return Block(_path(nodes), run[0].entry, run[-1].exit, nodes, " ".join(block.structure for block in run))


def _structure(entry: fx.Node, nodes: Sequence[fx.Node]) -> str:
    """The nodes as text in which values are numbered from the entry on and parameters are shapes."""
    number = {entry: 0, **{node: index for index, node in enumerate(nodes, 1)}}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{number[value]}" if value in number else type_text(value.meta.get("val"))
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(text, value))}]"
        return str(value)

    return "; ".join(f"{node.target}({', '.join(map(text, (*node.args, *node.kwargs.items())))})" for node in nodes)


# -- names ---------------------------------------------------------------------------------------------------------------


def _layers(nodes: Sequence[fx.Node]) -> list[str]:
    """Origins of the layers with weights, or of all nodes where there are none."""
    origins = [origin_of(n) for n in nodes if is_call(n, *WEIGHTED) and is_tensor(n)]
    return origins or [origin_of(n) for n in nodes]


def _path(nodes: Sequence[fx.Node]) -> str:
    """The common module path of the layers, such as `blocks.3.attention`; their first and last where they share none."""
    origins = _layers(nodes)
    parts = [re.split(r"([./])", origin) for origin in origins]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    common = "".join(column[0] for column in shared).rstrip("./")
    return common or f"{origins[0]}..{origins[-1]}"


def _ends(block: Block) -> str:
    """The block's name with its first and last layer: `blocks.3.fc1..fc2`."""
    first, last = _layers(block.nodes)[0], _layers(block.nodes)[-1]
    cut = block.name + first[len(block.name) : len(block.name) + 1]
    return f"{first}..{last.removeprefix(cut)}" if first != last else first


def _named(program: Program, blocks: Sequence[Block]) -> Iterator[Block]:
    """The blocks, each with a name of its own: the path where it holds all layers of it, then first and last, then its result."""
    every = [n for n in program.nodes if is_call(n, *WEIGHTED)]
    taken: set[str] = set()
    for block in blocks:
        inside = set(block.nodes)
        shared = any(n not in inside and re.match(rf"{re.escape(block.name)}([./]|$)", origin_of(n)) for n in every)
        name = _ends(block) if shared else block.name
        name = f"{name}:{block.exit.name}" if name in taken else name
        taken.add(name)
        yield replace(block, name=name)


def blocks_text(program: Program) -> str:
    """One line a block: layers, and the branches they are made of, indented."""
    blocks = find_blocks(program)
    kinds: dict[str, int] = {}
    lines = []
    for layer in blocks.layers:
        kind = kinds.setdefault(layer.structure, len(kinds) + 1)
        lines.append(_line(program, layer, f"kind {kind}"))
        inside = set(layer.nodes)
        parts = [b for b in blocks.branches if b.exit in inside and b.nodes != layer.nodes]
        lines.extend(f"  {_line(program, b)}" for b in parts)
    return "\n".join(lines) or f"'{program.name}' has no residual block that could go"


def _line(program: Program, block: Block, kind: str = "") -> str:
    count = sum(p.numel() for n in block.parameters() if (p := program.parameter(n)) is not None and p.dtype != torch.bool)
    text = f"{block.name}: %{block.entry.name} -> %{block.exit.name}, {len(block.nodes)} nodes, {count} parameters"
    return f"{text}, {kind}" if kind else text
