"""Weights for a cut program that give back the outputs of the original one: least squares, layer by layer, no gradients.

    cut:  y' = W x'                      W, b <- argmin over calibration rows of || f(W x' + b + s') - f(y + s) ||^2

x' is what the layer reads in the cut program, whose layers before it are reconstructed already, y what it returns in the
original one (He et al. 2017, Channel Pruning, arXiv:1707.06168, section 3.2). Where the layer's output is added to another value
s, the sum is what counts, so that the layer also makes up for what s' has lost (section 3.3 there). f is the clamp behind the sum
(relu, relu6; the identity elsewhere): values on the far side of it are free (Zhang et al. 2016, arXiv:1505.06798, section 3.3),
so the weights serve the values that are seen. The problem with a clamp is convex; it is solved by majorization, one
back-substitution a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ...ir.data import Sample
from ...ir.errors import PassError
from ...ir.program import Program, origin_of, shape_of, single_user
from ..fold.layer import Layer, layer_of, set_parameters
from ..layerwise import gather_rows, relative_error, signal_of
from ..quantize.operators import clamp_bounds

aten = torch.ops.aten

#: Steps of the majorization, and the shares of the way from the cut weights to the solution that held-out rows choose from.
STEPS = 12
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)

#: What is left of a node's value: node name -> [(dimension, kept positions), ...].
Kept = Mapping[str, Sequence[tuple[int, torch.Tensor]]]


@dataclass(frozen=True)
class Settings:
    """rows: output positions of a layer used at most. damping: share of X^T X's mean diagonal that pulls to the cut weights."""

    rows: int
    damping: float
    seed: int


def reconstruct(
    original: Program,
    cut: Program,
    kept: Kept,
    samples: Sequence[Sample],
    settings: Settings,
    progress: Callable[[int, int, str], None],
    only: Collection[str] | None = None,
) -> dict[str, list[float]]:
    """Gives the layers of `cut` new weights, in place; relative squared errors before and after by layer.

    A layer is left alone as long as everything it reads and what it is added to is as in the original. The error of a layer is
    that of f above on the last quarter of the samples, which the solution has not seen and which decide, channel by channel, how
    far to go towards it.

    Args:
        kept: for the nodes of `original` whose value is cut, what is left of it.
        only: names of the nodes to fit, and the walk ends behind the last of them; None: all.
    """
    order = schedule(cut)
    if only is not None:
        order = order[: 1 + max((i for i, node in enumerate(order) if node.name in only), default=-1)]
    runs = _Runs(original, cut, kept, samples, order)
    generator = torch.Generator().manual_seed(settings.seed)
    errors: dict[str, list[float]] = {}
    for index, node in enumerate(order):
        runs.evaluate(node)
        layer = layer_of(cut, node)
        if layer is not None and not layer.transposed and (only is None or node.name in only):
            goal = Goal.of(runs, layer)
            if goal is not None:
                weight, bias, error = fit(layer, goal, runs.values[layer.input], settings, generator)
                set_parameters(cut, layer, weight, bias)
                runs.redo(node)
                errors[origin_of(node)] = [round(e, 6) for e in error]
        runs.drop_after(index)
        progress(index + 1, len(order), "reconstruct")
    cut.sweep()
    return errors


def schedule(program: Program) -> list[fx.Node]:
    """The nodes in an order where, of two layers that are added, the one with the larger sum comes last: it makes up for both."""
    order: dict[fx.Node, None] = {}

    def weight_of(node: object) -> int:
        layer = layer_of(program, node)
        return 0 if layer is None else layer.weight[0].numel()

    stack: list[tuple[fx.Node, bool]] = [(node, False) for node in reversed(program.outputs)]
    stack.extend((node, False) for node in reversed(program.inputs))
    while stack:
        node, ready = stack.pop()
        if node in order:
            continue
        if ready:
            order[node] = None
            continue
        stack.append((node, True))
        reads = list(node.all_input_nodes)
        if node.target is aten.add.Tensor:
            reads.sort(key=weight_of)
        stack.extend((read, False) for read in reversed(reads) if read not in order)
    return list(order)


@dataclass
class _Runs:
    """The values of the original program (`exact`, by node name) and of the cut one on all samples, while someone reads them.

    order: nodes of the cut program as they are evaluated.
    """

    original: Program
    cut: Program
    kept: Kept
    samples: Sequence[Sample]
    order: Sequence[fx.Node]
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    exact: dict[str, list[Any]] = field(default_factory=dict)
    #: Nodes of the cut program whose values differ from the original's, other than by channels left out.
    changed: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nodes = {n.name: n for n in self.original.nodes}
        #: Node -> the last place in `order` that reads it.
        self.last = {read: i for i, n in enumerate(self.order) for read in (n, *n.all_input_nodes)}
        missing = [n.name for n in self.cut.nodes if n.op == "call_function" and n.name not in self.nodes]
        if missing:
            raise PassError(f"the cut program has nodes that the original lacks: {', '.join(missing[:3])}")

    def evaluate(self, node: fx.Node) -> None:
        with torch.no_grad():
            if node.op == "get_attr":
                self.values[node] = [self.cut.parameter(node)]
                return
            twin = self.nodes[node.name]
            if node.op == "placeholder":
                position = self.cut.inputs.index(node)
                self.values[node] = self.exact[node.name] = [sample[position] for sample in self.samples]
                return
            for read in twin.all_input_nodes:
                if read.op == "get_attr":
                    self.exact[read.name] = [self.original.parameter(read)]
            self.values[node] = self._call(node, self.values, lambda n: n)
            self.exact[node.name] = self._call(twin, self.exact, lambda n: n.name)
        if self._loses(node):
            self.changed.add(node)

    def redo(self, node: fx.Node) -> None:
        """The cut program's value of a layer whose parameters are new."""
        with torch.no_grad():
            for read in node.all_input_nodes:
                if read.op == "get_attr":
                    self.values[read] = [self.cut.parameter(read)]
            self.values[node] = self._call(node, self.values, lambda n: n)
        self.changed.add(node)

    def of_original(self, name: str, index: int) -> torch.Tensor:
        """The original's value of a node on one sample, less the channels that were cut."""
        value = self.exact[name][index]
        for dim, positions in self.kept.get(name, ()):
            value = value.index_select(dim, positions)
        return value

    def drop_after(self, index: int) -> None:
        """Forgets what no node behind `order[index]` reads."""
        node = self.order[index]
        for read in (node, *node.all_input_nodes):
            if self.last.get(read, index) <= index:
                self.values.pop(read, None)
                self.exact.pop(read.name, None)

    def _loses(self, node: fx.Node) -> bool:
        """Whether a node reads anything that differs, or a layer fewer inputs than in the original."""
        if any(read in self.changed for read in node.all_input_nodes):
            return True
        layer = layer_of(self.cut, node)
        if layer is None:
            return False
        whole = layer_of(self.original, self.nodes[node.name])
        assert whole is not None
        return whole.weight.shape[1:] != layer.weight.shape[1:]

    def _call(self, node: fx.Node, known: Mapping[Any, list[Any]], key: Callable[[fx.Node], Any]) -> list[Any]:
        """The values of a call on every sample; one value where it reads none of them."""
        count = max((len(known[key(n)]) for n in node.all_input_nodes), default=1)

        def on(index: int) -> Any:
            def value(read: fx.Node) -> Any:
                found = known[key(read)]
                return found[index if len(found) == count else 0]

            args, kwargs = fx.map_arg((node.args, node.kwargs), value)  # type: ignore[misc]
            return node.target(*args, **kwargs)  # type: ignore[operator]

        return [on(index) for index in range(count)]


@dataclass(frozen=True)
class Goal:
    """What a layer's output shall be, one tensor a sample.

    Attributes:
        targets: the original's sum (or output, where nothing is added).
        offsets: what is added to the layer's output in the cut program; None for nothing.
        low, high: bounds of the clamp behind.
    """

    targets: list[torch.Tensor]
    offsets: list[torch.Tensor] | None
    low: float
    high: float

    @classmethod
    def of(cls, runs: _Runs, layer: Layer) -> Goal | None:
        """None where the layer, and what it is added to, are as in the original."""
        node, count = layer.node, len(runs.samples)
        targets = [runs.of_original(node.name, i) for i in range(count)]
        offsets, behind = None, single_user(node)
        other = _added(behind, node)
        changed = node in runs.changed
        if other is not None and other in runs.values:
            changed |= other in runs.changed
            offsets = runs.values[other]
            targets = [t + runs.of_original(other.name, i) for i, t in enumerate(targets)]
            behind = single_user(behind)  # type: ignore[arg-type]
        if not changed:
            return None
        low, high = (None if behind is None else clamp_bounds(behind)) or (-math.inf, math.inf)
        return cls(targets, offsets, low, high)


def _added(node: fx.Node | None, layer: fx.Node) -> fx.Node | None:
    """The other operand of a plain sum of two values of one shape."""
    if node is None or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is layer else node.args[0]
    if not isinstance(other, fx.Node) or other is layer or other.op == "get_attr":
        return None
    return other if shape_of(other)[1:] == shape_of(layer)[1:] else None


# -- the least-squares problem ------------------------------------------------------------------------------------------------


def fit(
    layer: Layer, goal: Goal, values: list[torch.Tensor], settings: Settings, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """New weight and bias of a layer, and the relative errors on held-out rows before and after."""
    problem = Problem.of(layer, goal, values, settings, generator)
    start = problem.start
    solution = problem.solve(start, settings.damping)
    # Each channel goes so far towards the solution as the rows that were not fitted agree.
    steps = torch.stack([problem.errors(torch.lerp(start, solution, share)) for share in SHARES])
    share = torch.tensor(SHARES, dtype=torch.float64)[steps.argmin(0)]
    chosen = torch.lerp(start, solution, share[:, None, :])
    signal = problem.signal
    before, after = (relative_error(float(problem.errors(w).sum()), signal) for w in (start, chosen))
    weight, bias = chosen[:, :-1].transpose(1, 2), chosen[:, -1]
    return weight.reshape(layer.weight.shape), bias.reshape(-1), (before, after)


@dataclass(frozen=True)
class Problem:
    """min over W (G, K + 1, O) of || f(A W + S) - f(T) ||^2, the bias in the last row of W.

    Attributes:
        inputs: A, (G, M, K + 1) float32 with a column of ones.
        targets: T, (G, M, O) float32; offsets: S, of the same shape, or None.
        start: the weight and bias that the layer has, (G, K + 1, O) float64.
        fitted: rows before this one are fitted, the others check.
        low, high: bounds of f.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    offsets: torch.Tensor | None
    start: torch.Tensor
    fitted: int
    low: float
    high: float

    @classmethod
    def of(cls, layer: Layer, goal: Goal, values: list[torch.Tensor], settings: Settings, generator: torch.Generator) -> Problem:
        # Every unknown of a sum gets many rows; small sums (depthwise) need fewer.
        count = min(settings.rows, max(2048, 32 * layer.weight[0].numel()))
        both = goal.targets
        if goal.offsets is not None:
            # Interleaved by channel, so that both are gathered at the same positions and split alike into groups.
            pairs = zip(goal.targets, goal.offsets, strict=True)
            both = [torch.stack((t, s.expand_as(t)), layer.axis + 1).flatten(layer.axis, layer.axis + 1) for t, s in pairs]
        rows = gather_rows(layer.node, layer.weight, layer.bias, values, values, both, count, generator)
        targets, offsets = rows.targets, None
        if goal.offsets is not None:
            targets, offsets = rows.targets.unflatten(2, (-1, 2)).unbind(3)
        start = torch.cat([rows.weight.transpose(1, 2), rows.bias], 1).to(torch.float64)
        inputs = F.pad(rows.inputs, (0, 1), value=1.0)
        return cls(inputs, targets, offsets, start, rows.fitted, goal.low, goal.high)

    @property
    def signal(self) -> float:
        """What errors are relative to, over the rows that check, see `signal_of`."""
        return signal_of(self.targets[:, self.fitted :].clamp(self.low, self.high))

    def sums(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """A W + S, (G, rows, O)."""
        made = self.inputs[:, rows] @ weight.to(torch.float32)
        return made if self.offsets is None else made + self.offsets[:, rows]

    def errors(self, weight: torch.Tensor) -> torch.Tensor:
        """Squared errors over the rows that check, (G, O) float64."""
        rows = slice(self.fitted, None)
        gap = self.sums(weight, rows).clamp(self.low, self.high) - self.targets[:, rows].clamp(self.low, self.high)
        return gap.square().sum(1, dtype=torch.float64)

    def solve(self, start: torch.Tensor, damping: float) -> torch.Tensor:
        """The minimum over the fitted rows, (G, K + 1, O), with a ridge around `start` that leaves the bias free."""
        rows = slice(0, self.fitted)
        inputs, targets = self.inputs[:, rows], self.targets[:, rows]
        offsets = None if self.offsets is None else self.offsets[:, rows]
        gram = (inputs.transpose(1, 2) @ inputs).to(torch.float64)
        ridge = damping * gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1).clamp_min(1e-30)
        diagonal = ridge[:, None].repeat(1, gram.shape[1])
        diagonal[:, -1] = 1e-6 * gram[:, -1, -1]
        factor = torch.linalg.cholesky(gram + torch.diag_embed(diagonal))
        pull = diagonal[:, :, None] * start

        def least_squares(wanted: torch.Tensor) -> torch.Tensor:
            wanted = wanted if offsets is None else wanted - offsets
            return torch.cholesky_solve((inputs.transpose(1, 2) @ wanted).to(torch.float64) + pull, factor)

        weight = least_squares(targets)
        if math.isinf(self.low) and math.isinf(self.high):
            return weight
        for _ in range(STEPS):
            # Where the target is clamped, any sum beyond the bound is as good: there the sum at hand is the target.
            made = self.sums(weight, rows)
            wanted = torch.where(targets <= self.low, made.clamp_max(self.low), targets)
            wanted = torch.where(targets >= self.high, made.clamp_min(self.high), wanted)
            weight = least_squares(wanted)
        return weight
