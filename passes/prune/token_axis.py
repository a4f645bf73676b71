"""The attentions of a transformer, what it reads out of its tokens, and shapes that follow when there are fewer of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...ir.errors import PassError, VerificationError
from ...ir.program import Program, infer_node, origin_of, shape_of, tensors_of
from ..fold.match import aten, is_call, normalized_dims
from .blocks import find_blocks

SOFTMAX = (aten.softmax.int, aten._softmax.default)
SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.add.Tensor)
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Attention:
    """One attention on the residual stream.

    Attributes:
        exit: the residual sum behind it, (N, T, C).
        softmax: the attention's weights, (N, H, T, T).
        keys: (N, H, T, D), or its transpose (N, H, D, T) where `transposed`.
    """

    name: str
    exit: fx.Node
    softmax: fx.Node
    keys: fx.Node
    transposed: bool


def find_attentions(program: Program) -> list[Attention]:
    """Every self-attention in a residual branch, in graph order.

    Raises:
        PassError: none, or one whose tokens are not those of the residual stream (windows, symbolic sizes).
    """
    found = []
    branches = sorted(find_blocks(program).branches, key=lambda branch: len(branch.nodes))
    for node in program.nodes:
        branch = next((b for b in branches if node in b.nodes), None)
        if not is_call(node, *SOFTMAX) or branch is None:
            continue
        product = _product(node)
        if product is None:
            continue
        exit_, scores = shape_of(branch.exit), shape_of(node)
        static = all(isinstance(d, int) for d in (*exit_[1:], *scores[1:]))
        if not static or len(exit_) != 3 or len(scores) != 4 or tuple(scores[2:]) != (exit_[1], exit_[1]):
            raise PassError(
                f"the attention at '{origin_of(node)}' has scores {tuple(scores)} beside a residual stream {tuple(exit_)}: "
                "tokens can be merged or dropped where these are (N, H, T, T) and (N, T, C), all but N known sizes"
            )
        keys = product.args[1]
        moved = is_call(keys, aten.permute.default, aten.transpose.int) and _swaps_last_two(keys)
        found.append(Attention(branch.name, branch.exit, node, keys.args[0] if moved else keys, not moved))  # type: ignore[union-attr, arg-type]
    if not found:
        raise PassError(f"'{program.name}' has no attention in a residual branch, so no tokens to merge or drop")
    return found


def _product(softmax: fx.Node) -> fx.Node | None:
    """The product of queries and keys behind a softmax over the keys."""
    value: Any = softmax.args[0]
    while is_call(value, *SCALINGS):
        value = value.args[0]
    last = int(softmax.args[1]) % len(shape_of(softmax)) == len(shape_of(softmax)) - 1  # type: ignore[arg-type]
    return value if last and is_call(value, aten.matmul.default) else None


def _swaps_last_two(node: fx.Node) -> bool:
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    return order == [*range(rank - 2), rank - 1, rank - 2]


def protected_tokens(program: Program, last: Attention) -> int:
    """How many leading tokens must stay because the network reads its result out of them; 0 where it takes the mean of all.

    Raises:
        PassError: the tokens behind the last attention are read in another way.
    """
    tokens, axis = shape_of(last.exit)[1], 1
    seen, stack, wanted = {last.exit}, [last.exit], set()
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            shape = shape_of(user) if user.op == "call_function" else ()
            if len(shape) == 3 and shape[axis] == tokens:
                stack.append(user)
            elif is_call(user, aten.mean.dim) and normalized_dims(user.args[1], 3) == [axis]:  # type: ignore[arg-type]
                wanted.add(0)
            elif is_call(user, aten.select.int) and int(user.args[1]) % 3 == axis and int(user.args[2]) >= 0:  # type: ignore[arg-type]
                wanted.add(int(user.args[2]) + 1)  # type: ignore[arg-type]
            elif is_call(user, aten.slice.Tensor) and len(shape) == 3 and shape[axis] < tokens:
                wanted.add(int(user.args[3]))  # type: ignore[arg-type]
            else:
                raise PassError(
                    f"'{user.name}' ({user.target}, from {origin_of(user)}) reads the tokens of '{program.name}': merging and "
                    "dropping know networks that take the mean of all tokens or read the first ones; say protected=N where the "
                    "first N tokens are what is read"
                )
    return max(wanted, default=0)


def shorten(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Every reader of `old` behind `new` reads `new`, which has fewer tokens, and all shapes that follow from it are right again.

    Raises:
        PassError: an op that needs the old number of tokens; named with its module.
    """
    order = {node: index for index, node in enumerate(program.nodes)}
    for user in [u for u in old.users if order[u] > order[new]]:
        user.replace_input_with(old, new)
    was: dict[fx.Node, tuple[int, ...]] = {new: shape_of(old)}
    for node in program.nodes:
        if node.op != "call_function" or order[node] <= order[new] or was.keys().isdisjoint(node.all_input_nodes):
            continue
        if is_call(node, *RESHAPES, aten.expand.default) and node.args[0] in was:
            node.update_arg(1, _new_sizes(node, was[node.args[0]]))  # type: ignore[index]
        before = shapes(node)
        try:
            infer_node(program, node)
        except VerificationError as error:
            raise PassError(
                f"'{node.name}' ({node.target}, from {origin_of(node)}) needs all {shape_of(old)[1]} tokens, so none can be "
                f"merged or dropped before it: {error}"
            ) from error
        if shapes(node) != before:
            was[node] = before[0]


def _new_sizes(node: fx.Node, old: tuple[int, ...]) -> list[int | fx.Node]:
    """The sizes of a reshape or expand of a value that was `old`: a shorter axis is found again where as much lies before it."""
    # As they are written: a free batch stands there as the node that reads it.
    sizes, given = list(node.args[1]), shape_of(node)  # type: ignore[arg-type]
    if node.target is aten.expand.default:
        old = (1,) * (len(given) - len(old)) + tuple(old)
    new = shape_of(node.args[0])  # type: ignore[arg-type]
    new = (1,) * (len(old) - len(new)) + tuple(new)
    for axis, (was, now) in enumerate(zip(old, new, strict=True)):
        if equal(was, now):
            continue
        places = [i for i, size in enumerate(given) if equal(size, was) and equal(prod(given[:i]), prod(old[:axis]))]
        if node.target is aten.expand.default:
            places = [axis]
        if not places:
            raise PassError(
                f"'{node.name}' ({node.target}, from {origin_of(node)}) folds the tokens into another axis, so none can be "
                "merged or dropped before it"
            )
        sizes[places[0]] = now
    return sizes


def equal(a: int, b: int) -> bool:
    """Whether two sizes are the same for every batch. Compared by `==`, a symbol would take the value that makes them so."""
    return statically_known_true(a == b)


def shapes(node: fx.Node) -> list[tuple[int, ...]]:
    """The shape of each result."""
    return [tuple(tensor.shape) for tensor in tensors_of(node)]


def readouts(program: Program, original: dict[fx.Node, list[tuple[int, ...]]]) -> Iterator[fx.Node]:
    """Nodes that read fewer tokens than in the `original` shapes and whose own shape is as it was: the tokens end there."""
    for node in program.nodes:
        if node.op == "call_function" and node in original and shapes(node) == original[node]:
            inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
            if any(n not in original or shapes(n) != original[n] for n in inputs):
                yield node
