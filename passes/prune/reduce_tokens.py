"""reduce-tokens: a transformer merges or drops tokens on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.tokens import mergeable
from ...ir.errors import OptionError, PassError
from ...ir.program import Program, Stage, dtype_of, origin_of, shape_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..fold.match import aten, is_call
from .token_axis import Attention, find_attentions, protected_tokens, readouts, shapes, shorten


@register
@dataclass(frozen=True)
class ReduceTokens(Pass):
    """After an attention, merges similar tokens (ToMe) or drops those it hardly looks at; counts are fixed, shapes stay known.

        %y = aten.add.Tensor(%x, attention(%x));  mlp(%y)                                  # (N, T, C)
     -> %place = gw.match_tokens(%keys, r, p)                                              # which token goes where
        %z = gw.sum_tokens(%y * %size, %place, T - r) / %size';  mlp(%z)                   # (N, T - r, C)
        %size' = gw.sum_tokens(%size, %place, T - r)                                       # patches in a token

    Merging: bipartite soft matching on the attention's keys, averages weighted by size, sizes in the final mean over tokens and,
    where `proportional`, as log(size) in the scores of the attentions behind (Bolya et al. 2023, arXiv:2210.09461). Dropping: by
    the attention that a token gets from the class token, or from all tokens where there is none (Liang et al. 2022, EViT,
    arXiv:2202.07800). A layer may do both, dropping first (Chen et al. 2023, DiffRate, arXiv:2305.17997, with given counts).

    Args:
        merge: tokens merged at each attention in order, such as [4,4,4]; attentions past the end merge none.
        prune: tokens dropped at each attention, the same way.
        per_layer: merge so many at every attention, as far as there are enough. Instead of `merge` and `prune`.
        proportional: merged tokens count in attention as often as they have patches.
        protected: leading tokens that stay as they are; by default those the network reads its result out of (class token).

    Raises:
        OptionError: no counts, or negative ones. PassError: more counts than attentions, more tokens than a layer has to give,
        or a network that needs all its tokens, with the op that does.
    """

    merge: tuple[int, ...] = ()
    prune: tuple[int, ...] = ()
    per_layer: int = 0
    proportional: bool = True
    protected: int | None = None

    name = "reduce-tokens"
    effect = LOSSY
    accepts = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves = Stage.COMPRESSED

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        counts = (*self.merge, *self.prune, self.per_layer, self.protected or 0)
        if min(counts) < 0 or not any((*self.merge, *self.prune, self.per_layer)):
            raise OptionError("reduce-tokens: say how many tokens go: merge=[4,4,4], prune=[0,8] or per_layer=4, none negative")
        if self.per_layer and (self.merge or self.prune):
            raise OptionError("reduce-tokens: per_layer stands for merge=[N,N,...]; give one of them")

    def run(self, program: Program, context: PassContext) -> PassResult:
        attentions = find_attentions(program)
        longest = max(len(self.merge), len(self.prune))
        if longest > len(attentions):
            raise PassError(f"counts for {longest} attentions, but '{program.name}' has {len(attentions)}")
        protected = protected_tokens(program, attentions[-1]) if self.protected is None else self.protected
        state = _Tokens(program, attentions, protected, self.proportional)
        merged = []
        for index in range(len(attentions)):
            left = shape_of(attentions[index].exit)[1]
            merge = self.merge[index] if index < len(self.merge) else min(self.per_layer, mergeable(left, protected))
            prune = self.prune[index] if index < len(self.prune) else 0
            state.reduce(index, merge, prune)
            merged.append(merge)
        state.finish()
        left = shape_of(state.value)[1]
        text = ", ".join(map(str, merged))
        return PassResult(program, True, {"merged": text, "pruned": sum(self.prune), "tokens": left, "protected": protected})


@dataclass
class _Tokens:
    """The rewrite on its way through the network.

    Attributes:
        sizes: patches in each token (N, T, 1); None while every token is one. weight: its logarithm for attention scores
            (N, 1, 1, T), once one asked for it.
        dropped: tokens dropped so far.
        original: the shapes of all nodes before the rewrite.
    """

    program: Program
    attentions: Sequence[Attention]
    protected: int
    proportional: bool
    sizes: fx.Node | None = None
    weight: fx.Node | None = None
    dropped: int = 0
    original: dict[fx.Node, list[tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.original = {n: shapes(n) for n in self.program.nodes if n.op != "output"}
        self.tokens = shape_of(self.attentions[0].exit)[1]
        self.value = self.attentions[0].exit

    def reduce(self, index: int, merge: int, prune: int) -> None:
        attention = self.attentions[index]
        self._weigh(attention)
        self.value, left = attention.exit, shape_of(attention.exit)[1]
        if prune > left - self.protected - 1 or merge > mergeable(left - prune, self.protected):
            raise PassError(
                f"'{attention.name}' has {left} tokens, {self.protected} of them protected: it cannot drop {prune} and merge "
                f"{merge} (at most {mergeable(left - prune, self.protected)} of what is left, every second one)"
            )
        if not merge and not prune:
            return
        before = self.value.next
        at = _At(self.program, before, attention.name)
        value, keys = self.value, self._keys(attention, at)
        if prune:
            place = at(gw.keep_tokens.default, self._score(attention, at), left - prune, self.protected)
            value = at(gw.sum_tokens.default, value, place, left - prune)
            if self.sizes is not None:
                self.sizes = at(gw.sum_tokens.default, self.sizes, place, left - prune)
            keys = self._kept_keys(at, keys, place, left - prune) if merge else keys
            self.dropped += prune
        if merge:
            place = at(gw.match_tokens.default, keys, merge, self.protected)
            value = self._merged(at, value, place, left - prune - merge)
        shorten(self.program, attention.exit, value)
        self.value, self.weight = value, None

    def _keys(self, attention: Attention, at: _At) -> fx.Node:
        return at(aten.permute.default, attention.keys, [0, 1, 3, 2]) if attention.transposed else attention.keys

    def _score(self, attention: Attention, at: _At) -> fx.Node:
        """The attention that each token gets, (N, T): from the first token where that is protected, else from all."""
        weights = attention.softmax
        if self.protected:
            weights = at(aten.slice.Tensor, weights, 2, 0, 1)
        return at(aten.mean.dim, weights, [1, 2])

    def _kept_keys(self, at: _At, keys: fx.Node, place: fx.Node, tokens: int) -> fx.Node:
        batch, (_, heads, old, depth) = at.batch(keys), shape_of(keys)
        rows = at(aten.reshape.default, at(aten.permute.default, keys, [0, 2, 1, 3]), [batch, old, heads * depth])
        kept = at(aten.reshape.default, at(gw.sum_tokens.default, rows, place, tokens), [batch, tokens, heads, depth])
        return at(aten.permute.default, kept, [0, 2, 1, 3])

    def _merged(self, at: _At, value: fx.Node, place: fx.Node, tokens: int) -> fx.Node:
        """The mean of the patches in each token."""
        sizes = self.sizes
        if sizes is None:
            sizes = self._ones(at, value)
        else:
            value = at(aten.mul.Tensor, value, sizes)
        self.sizes = at(gw.sum_tokens.default, sizes, place, tokens)
        return at(aten.div.Tensor, at(gw.sum_tokens.default, value, place, tokens), self.sizes)

    def _ones(self, at: _At, value: fx.Node) -> fx.Node:
        """A size of 1 for every token of `value`."""
        batch, tokens = at.batch(value), shape_of(value)[1]
        rows = batch if isinstance(batch, int) else 1
        ones = self.program.add_parameter("token_sizes", torch.ones(rows, tokens, 1, dtype=dtype_of(value)), at.before, at.origin)
        return ones if rows == batch else at(aten.expand.default, ones, [batch, tokens, 1])

    def _weigh(self, attention: Attention) -> None:
        """Adds log(size) to the attention's scores. The logarithm of a whole number is looked up: the same bits everywhere."""
        if self.sizes is None or not self.proportional:
            return
        softmax = attention.softmax
        at = _At(self.program, softmax, softmax.meta.get("origin", ""))
        if self.weight is None:
            batch, tokens = at.batch(self.sizes), shape_of(self.sizes)[1]
            table = torch.cat([torch.zeros(1, dtype=torch.float64), torch.arange(1, self.tokens + 1).double().log()])
            entries = self.program.add_parameter("log_sizes", table[:, None].to(dtype_of(self.value)), softmax, at.origin)
            index = at(aten._to_copy.default, at(aten.reshape.default, self.sizes, [batch, tokens]), dtype=torch.int32)
            self.weight = at(aten.reshape.default, at(aten.embedding.default, entries, index), [batch, 1, 1, tokens])
        softmax.update_arg(0, at(aten.add.Tensor, softmax.args[0], self.weight))

    def finish(self) -> None:
        """Means over the tokens count every token as often as it has patches; other readers of all tokens are refused."""
        for node in list(readouts(self.program, self.original)):
            if is_call(node, aten.mean.dim):
                if self.sizes is not None:
                    self._weighted(node)
            elif not is_call(node, aten.select.int, aten.slice.Tensor):
                raise PassError(
                    f"'{node.name}' ({node.target}, from {origin_of(node)}) reads the tokens of '{self.program.name}': merging "
                    "and dropping know networks that take the mean of all tokens or read the first ones"
                )

    def _weighted(self, mean: fx.Node) -> None:
        """mean(x) becomes mean(x * size / mean(size)); where none was dropped, the mean size of T' tokens is T / T'."""
        assert self.sizes is not None
        at = _At(self.program, mean, mean.meta.get("origin", ""))
        source: fx.Node = mean.args[0]  # type: ignore[assignment]
        if self.dropped:
            share = at(aten.div.Tensor, self.sizes, at(aten.mean.dim, self.sizes, [1], True))
        else:
            share = at(aten.mul.Tensor, self.sizes, shape_of(self.sizes)[1] / self.tokens)
        mean.update_arg(0, at(aten.mul.Tensor, source, share))


@dataclass(frozen=True)
class _At:
    """Inserts calls at one place of a program."""

    program: Program
    before: fx.Node
    origin: str

    def __call__(self, target, *args, **kwargs) -> fx.Node:
        return self.program.insert(target, args, self.before, self.origin, **kwargs)

    def batch(self, value: fx.Node) -> int | fx.Node:
        """The first size of `value`: a number, or where the batch is free a node that reads it."""
        size = shape_of(value)[0]
        return size if isinstance(size, int) else self(aten.sym_size.int, value, 0)
