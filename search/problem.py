"""The one question every solver answers: pick one choice for each item, least loss, within the limits. Plain tables only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..ir.errors import GraphwrightError


class InfeasibleError(GraphwrightError):
    """No plan meets the limits. `smallest` holds, for each unmet metric, the least value any plan reaches."""

    def __init__(self, message: str, smallest: Mapping[str, float]) -> None:
        super().__init__(message)
        self.smallest = dict(smallest)


@dataclass(frozen=True)
class Limit:
    """fixed + sum over items of cost[item][choice] <= most.

    Attributes:
        metric: what is bounded, with its unit, such as `weight_bytes`. Several limits may share a metric whose value is the
            largest of several sums (peak memory has one sum a moment of the run).
        cost: for each item an array (choices of the item,).
        most: the bound; infinity only counts.
        fixed: what is spent whatever is chosen.
    """

    metric: str
    cost: tuple[np.ndarray, ...]
    most: float = np.inf
    fixed: float = 0.0

    def total(self, chosen: Sequence[int]) -> float:
        return self.fixed + float(sum(row[c] for row, c in zip(self.cost, chosen, strict=True)))

    @property
    def allowed(self) -> float:
        """The bound, with room for the rounding of a sum."""
        return self.most + 1e-9 * abs(self.most)

    @property
    def least(self) -> float:
        """The smallest total of any plan."""
        return self.fixed + float(sum(row.min() for row in self.cost))


@dataclass(frozen=True)
class Problem:
    """Items, their choices, what each choice loses, and what the plan may cost.

    Attributes:
        items: names, such as layer origins.
        choices: for each item the names of its choices, such as weight formats.
        loss: for each item an array (choices,), >= -inf < inf; the plan's loss is their sum plus `pairs`.
        limits: every limit holds at once.
        pairs: (i, j) with i < j -> array (choices of i, choices of j): loss on top where both are chosen.
    """

    items: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    loss: tuple[np.ndarray, ...]
    limits: tuple[Limit, ...] = ()
    pairs: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [len(names) for names in self.choices]
        tables = {"loss": self.loss, **{f"cost '{limit.metric}'": limit.cost for limit in self.limits}}
        if len(sizes) != len(self.items) or not all(sizes):
            raise ValueError(f"{len(self.items)} items need as many non-empty lists of choices, not {sizes}")
        for name, table in tables.items():
            if [row.shape for row in table] != [(size,) for size in sizes]:
                raise ValueError(f"{name} must have one array of {sizes} values an item, not {[row.shape for row in table]}")
            if not all(np.isfinite(row).all() for row in table):
                raise ValueError(f"{name} holds a value that is not finite")
        for (i, j), table in self.pairs.items():
            if not 0 <= i < j < len(sizes) or table.shape != (sizes[i], sizes[j]):
                raise ValueError(f"pair ({i}, {j}) must have i < j and a table of the two items' choices, not {table.shape}")

    def total_loss(self, chosen: Sequence[int]) -> float:
        single = sum(float(row[c]) for row, c in zip(self.loss, chosen, strict=True))
        return single + sum(float(table[chosen[i], chosen[j]]) for (i, j), table in self.pairs.items())

    def totals(self, chosen: Sequence[int]) -> dict[str, float]:
        """Metric -> value; the largest where several limits share a metric."""
        found: dict[str, float] = {}
        for limit in self.limits:
            found[limit.metric] = max(found.get(limit.metric, -np.inf), limit.total(chosen))
        return found

    def meets(self, chosen: Sequence[int]) -> bool:
        return all(limit.total(chosen) <= limit.allowed for limit in self.limits)

    def names(self, chosen: Sequence[int]) -> dict[str, str]:
        """Item -> name of its choice."""
        return {item: names[c] for item, names, c in zip(self.items, self.choices, chosen, strict=True)}


@dataclass(frozen=True)
class Solution:
    """A plan that meets every limit.

    Attributes:
        chosen: index of the choice of each item.
        loss: its loss in the problem's terms.
        totals: metric -> value.
        bound: no plan loses less than this; None where the solver proves nothing.
    """

    chosen: tuple[int, ...]
    loss: float
    totals: dict[str, float]
    bound: float | None = None

    @property
    def gap(self) -> float | None:
        """Proven distance from the optimum, relative to the loss."""
        return None if self.bound is None else max(0.0, self.loss - self.bound) / max(abs(self.loss), 1e-300)

    @classmethod
    def of(cls, problem: Problem, chosen: Sequence[int], bound: float | None = None) -> Solution:
        return cls(tuple(chosen), problem.total_loss(chosen), problem.totals(chosen), bound)
