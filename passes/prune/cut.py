"""The cut: a program without the channels of chosen atoms, as smaller tensors and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.errors import OptionError, PassError, UnknownNameError, VerificationError
from ...ir.program import Program, Stage, origin_of, register_tensor
from ...ir.verify import verify
from ..fold.match import argument, aten
from .coupling import Analysis, Place, analyze
from .rules_shapes import shuffle_at


def cut(program: Program, removed: Mapping[str, Iterable[int]]) -> Program:
    """The program without these atoms of these groups. The given program is not changed.

        %h = linear(%x, W1[1024x256], b1[1024]);  %y = linear(gelu(%h), W2[256x1024], b2)
     -> %h = linear(%x, W1[600x256],  b1[600]);   %y = linear(gelu(%h), W2[256x600],  b2)

    Parameters are sliced and keep their names; sizes that the graph spells out (reshapes, slices, splits, groups of convolutions)
    follow. The result computes what the original computes with the same slices of all members set to zero.

    Args:
        program: canonical or compressed.
        removed: group name -> numbers of the atoms that go, each in 0 .. size - 1.

    Raises:
        UnknownNameError: no group has this name.
        PassError: the group is pinned, or nothing of it or of some value would be left.
        OptionError: an atom out of range.
    """
    result = program.clone()
    analysis = analyze(result)
    gone = _atoms(analysis, removed)
    if gone:
        sizes = _Sizes(analysis, gone)
        calls = [n for n in result.nodes if n.op == "call_function"]
        shuffles = [s for s in map(shuffle_at, calls) if s is not None]
        inside = {n for s in shuffles for n in (s.opens, s.moves)}
        expected = {n: _expected(n, sizes) for n in calls if n not in inside}
        for node in calls:
            if node.target in REWRITES:
                REWRITES[node.target](result, node, sizes)
        _slice_parameters(result, analysis, sizes)
        result.sweep()
        result.infer_shapes()
        _check(expected)
    result.stage = Stage.COMPRESSED
    verify(result)
    return result


def _atoms(analysis: Analysis, removed: Mapping[str, Iterable[int]]) -> set[int]:
    """The free atoms that go, once every request is known to make sense."""
    gone: set[int] = set()
    for name, wanted in removed.items():
        if name not in analysis.groups:
            raise UnknownNameError("group of channels", name, analysis.groups)
        group, atoms = analysis.groups[name]
        numbers = set(wanted)
        if not numbers:
            continue
        if group.pinned:
            raise PassError(f"group '{name}' cannot be cut: {group.pinned}")
        outside = sorted(n for n in numbers if not 0 <= n < group.size)
        if outside:
            raise OptionError(f"group '{name}' has atoms 0 to {group.size - 1}; there is no atom {outside[0]}")
        if len(numbers) == group.size:
            raise PassError(f"all {group.size} atoms of group '{name}' would go; keep at least one")
        gone.update(atoms[n] for n in numbers)
    return gone


class _Sizes:
    """Which indices stay along every dimension of the program as it was."""

    def __init__(self, analysis: Analysis, gone: set[int]) -> None:
        self.places = analysis.places
        self.masks = {key: analysis.stays(key, gone) for key in analysis.free}
        for place, key in self.places.items():
            if not self.masks[key].any():
                raise PassError(
                    f"nothing would be left of dimension {place.dim} of '{place.node}'; keep more atoms of its groups"
                )

    def stays(self, place: Place) -> np.ndarray | None:
        """True where an index stays; None where all do."""
        key = self.places.get(place)
        return None if key is None or self.masks[key].all() else self.masks[key]

    def mask(self, node: Any, dim: int, item: int | None = None) -> np.ndarray | None:
        dim %= _values(node)[item or 0].dim()
        parameter = node.op == "get_attr"
        return self.stays(Place(str(node.target) if parameter else node.name, dim, parameter, item))

    def of(self, node: Any, item: int | None = None) -> list[Any]:
        """The sizes of a node's value after the cut."""
        old = _values(node)[item or 0].shape
        masks = [self.mask(node, k, item) for k in range(len(old))]
        return [size if mask is None else int(mask.sum()) for size, mask in zip(old, masks, strict=True)]

    def before(self, node: Any, dim: int, index: int) -> int:
        """How many of the first `index` indices stay."""
        mask = self.mask(node, dim)
        return index if mask is None else int(mask[:index].sum())


def _values(node: fx.Node) -> Sequence[Any]:
    value = node.meta["val"]
    return value if isinstance(value, (tuple, list)) else (value,)


def _slice_parameters(program: Program, analysis: Analysis, sizes: _Sizes) -> None:
    for name, dims in analysis.coupling.parameters.items():
        value: torch.Tensor = getattr(program.graph_module, name)
        smaller = value.detach()
        for dim in range(len(dims)):
            mask = sizes.stays(Place(name, dim, True))
            if mask is not None:
                smaller = smaller.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
        if smaller.shape != value.shape:
            trainable = isinstance(value, torch.nn.Parameter)
            delattr(program.graph_module, name)
            register_tensor(
                program.graph_module, name, torch.nn.Parameter(smaller, value.requires_grad) if trainable else smaller
            )


def _expected(node: fx.Node, sizes: _Sizes) -> list[list[Any]]:
    several = isinstance(node.meta["val"], (tuple, list))
    return [sizes.of(node, k if several else None) for k, v in enumerate(_values(node)) if isinstance(v, torch.Tensor)]


def _check(expected: Mapping[fx.Node, Sequence[Sequence[Any]]]) -> None:
    """Every value has the size that the analysis foresaw: a rule and a rewrite that disagree get no further."""
    for node, shapes in expected.items():
        found = [tuple(v.shape) for v in _values(node) if isinstance(v, torch.Tensor)]
        wanted = [tuple(s) for s in shapes]
        if found != wanted:
            raise VerificationError(
                f"the cut left {node.target} at '{node.name}' (from {origin_of(node)}) with sizes {found} instead of {wanted}; "
                "its coupling rule and its rewrite disagree"
            )


# -- operators that spell sizes out ------------------------------------------------------------------------------------------


def _sizes_argument(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    after = sizes.of(node)
    spelled = [after[k] if isinstance(s, int) and s != -1 else s for k, s in enumerate(node.args[1])]  # type: ignore[arg-type]
    node.args = (node.args[0], spelled, *node.args[2:])


def _reshape(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    shuffle = shuffle_at(node)
    mask = None if shuffle is None else sizes.mask(shuffle.x, shuffle.dim)
    if shuffle is None or mask is None:
        _sizes_argument(program, node, sizes)
        return
    grid = mask.reshape(shuffle.rows, shuffle.columns)
    rows, columns = grid.any(1), grid.any(0)
    if (grid == np.outer(rows, columns)).all():
        _sizes_argument(program, node, sizes)
        spelled: list[Any] = list(shuffle.opens.args[1])  # type: ignore[arg-type]
        spelled[shuffle.dim : shuffle.dim + 2] = int(rows.sum()), int(columns.sum())
        shuffle.opens.args = (shuffle.x, spelled)
    else:
        # What is left stands in no rows and columns: the same order, spelled out.
        order = shuffle.order()
        numbers = torch.from_numpy((np.cumsum(mask) - 1)[order[mask[order]]])
        index = program.add_parameter(f"{node.name}_order", numbers, before=node)
        node.target, node.args = aten.index_select.default, (shuffle.x, shuffle.dim, index)


def _slice(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    x: Any = node.args[0]
    dim, step = argument(node, 1, "dim", 0), argument(node, 4, "step", 1)
    if sizes.mask(x, dim) is None:
        return
    size = x.meta["val"].shape[dim]
    first, last, _ = slice(argument(node, 2, "start"), argument(node, 3, "end"), step).indices(size)
    # With a step, whole rows of `step` went, so that the first of each is where it was.
    start = sizes.before(x, dim, first) if step == 1 else first
    node.args, node.kwargs = (x, dim, start, sizes.before(x, dim, last), step), {}


def _select(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    x, dim, index = node.args
    size = x.meta["val"].shape[dim]  # type: ignore[union-attr, index]
    node.args = (x, dim, sizes.before(x, dim, index % size))  # type: ignore[arg-type, operator]


def _split(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    dim = argument(node, 2, "dim", 0)
    if sizes.mask(node.args[0], dim) is not None:
        lengths = [sizes.of(node, item)[dim] for item in range(len(node.meta["val"]))]
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], lengths, dim), {}


def _convolution(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    x, weight, transposed, groups = node.args[0], node.args[1], node.args[6], node.args[8]
    if groups != 1:
        channel = weight.meta["val"].dim() - 1  # type: ignore[union-attr]
        channels = sizes.of(node if transposed else x)[-channel]
        node.args = (*node.args[:8], channels // sizes.of(weight)[1])


def _group_norm(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    x, weight, bias, batch, channels, positions, groups, eps = node.args
    kept = sizes.of(x)[1]
    node.args = (x, weight, bias, batch, kept, positions, kept * groups // channels, eps)  # type: ignore[operator]


def _index_select(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    x, dim, index = node.args
    node.args = (x, dim, _numbers(program, node, sizes, x, dim, index))


def _index_tensor(program: Program, node: fx.Node, sizes: _Sizes) -> None:
    x, indices = node.args
    given = [k for k, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if len(given) == 1:
        dim = given[0]
        fresh = [None] * dim + [_numbers(program, node, sizes, x, dim, indices[dim])]  # type: ignore[index]
        node.args = (x, fresh)


def _numbers(program: Program, node: fx.Node, sizes: _Sizes, x: Any, dim: Any, index: Any) -> Any:
    """Where the gathered channels that stay are now, as a new parameter."""
    source, taken = sizes.mask(x, dim), sizes.mask(node, dim)
    if source is None:
        return index
    numbers = program.parameter(index)
    assert numbers is not None
    old = numbers.cpu().numpy() % len(source)
    new = (np.cumsum(source) - 1)[old if taken is None else old[taken]]
    return program.add_parameter(str(index.target), torch.from_numpy(new).to(numbers), before=node)


Rewrite = Callable[[Program, fx.Node, _Sizes], None]

REWRITES: dict[Any, Rewrite] = {
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.expand.default: _sizes_argument,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split,
    aten.chunk.default: _split,
    aten.convolution.default: _convolution,
    aten.native_group_norm.default: _group_norm,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index_tensor,
}
