"""A problem's tables as flat arrays, and local search on them: giving up loss until the limits hold, and polishing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..problem import Limit, Problem

#: Sweeps over all exchanges of two items; each sweep either lowers the loss or ends the polishing.
SWEEPS = 20


@dataclass(frozen=True)
class Tables:
    """Choice c of item i is column `start[i] + c`; only limits that bind something (finite) are rows.

    Attributes:
        start: (items + 1,) first column of each item.
        item: (columns,) the item of each column.
        loss: (columns,)
        limits: the finite limits, in the problem's order.
        cost: (limits, columns)
        room: (limits,) what the choices may cost together: the bound less what is fixed.
        pair: (columns, columns), symmetric: loss on top where both columns are chosen; None without pairs.
    """

    start: np.ndarray
    item: np.ndarray
    loss: np.ndarray
    limits: tuple[Limit, ...]
    cost: np.ndarray
    room: np.ndarray
    pair: np.ndarray | None

    @classmethod
    def of(cls, problem: Problem) -> Tables:
        sizes = np.array([len(row) for row in problem.loss], dtype=np.int64)
        start = np.concatenate([[0], np.cumsum(sizes)])
        limits = tuple(limit for limit in problem.limits if np.isfinite(limit.most))
        cost = np.array([_flat(limit.cost) for limit in limits]).reshape(len(limits), int(start[-1]))
        # Half of the tolerance of Problem.meets: sums in another order stay inside it.
        room = np.array([limit.most + 0.5e-9 * abs(limit.most) - limit.fixed for limit in limits])
        pair = np.zeros((start[-1], start[-1])) if problem.pairs else None
        for (i, j), table in problem.pairs.items():
            assert pair is not None
            pair[start[i] : start[i + 1], start[j] : start[j + 1]] = table
            pair[start[j] : start[j + 1], start[i] : start[i + 1]] = table.T
        return cls(start, np.repeat(np.arange(len(sizes)), sizes), _flat(problem.loss), limits, cost, room, pair)

    @property
    def items(self) -> int:
        return len(self.start) - 1

    def columns(self, chosen: np.ndarray) -> np.ndarray:
        """(items,) the column of each item's choice."""
        return self.start[:-1] + chosen

    def floor(self, values: np.ndarray) -> np.ndarray:
        """(columns,) -> (items,): the smallest value of each item."""
        return np.minimum.reduceat(values, self.start[:-1])

    def best(self, values: np.ndarray) -> np.ndarray:
        """(items,) the choice of smallest value of each item; the first where several are equal."""
        return np.array([int(values[a:b].argmin()) for a, b in zip(self.start[:-1], self.start[1:], strict=True)])

    def over(self, chosen: np.ndarray) -> np.ndarray:
        """(limits,) by how much each limit is exceeded; negative: room that is left."""
        return self.cost[:, self.columns(chosen)].sum(axis=1) - self.room

    def fits(self, chosen: np.ndarray) -> bool:
        return bool((self.over(chosen) <= 0).all())

    def total(self, chosen: np.ndarray) -> float:
        columns = self.columns(chosen)
        paired = 0.0 if self.pair is None else 0.5 * float(self.pair[np.ix_(columns, columns)].sum())
        return float(self.loss[columns].sum()) + paired

    def changes(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every column what the loss (columns,) and the costs (limits, columns) change by where its item moves to it."""
        columns = self.columns(chosen)
        loss = self.loss if self.pair is None else self.loss + self.pair[:, columns].sum(axis=1)
        return loss - loss[columns][self.item], self.cost - self.cost[:, columns][:, self.item]


def _flat(rows: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *rows]).astype(np.float64)


def shrink(tables: Tables, chosen: np.ndarray) -> np.ndarray | None:
    """Moves one item at a time to the choice that loses least for what it saves, until every limit holds.

    Savings of several limits are added, each relative to the spread of its costs, and count only up to the limit. None where
    no single move saves anything although a limit is exceeded; this cannot happen with one limit that a plan meets.
    """
    chosen = chosen.copy()
    spread = tables.cost.max(axis=1, initial=-np.inf) - tables.cost.min(axis=1, initial=np.inf)
    scale = np.where(spread > 0, spread, 1.0)[:, None]
    while (over := tables.over(chosen)[:, None]).max(initial=0.0) > 0:
        loss, cost = tables.changes(chosen)
        saved = ((np.maximum(over, 0) - np.maximum(over + cost, 0)) / scale).sum(axis=0)
        saves = saved > 1e-12
        if not saves.any():
            return None
        column = int(np.where(saves, loss / np.where(saves, saved, 1.0), np.inf).argmin())
        chosen[tables.item[column]] = column - tables.start[tables.item[column]]
    return chosen


def polish(tables: Tables, chosen: np.ndarray) -> np.ndarray:
    """Lowers the loss of a plan that meets the limits by moves of one item and exchanges of two, until none helps."""
    chosen = chosen.copy()
    for _ in range(SWEEPS):
        _move_single(tables, chosen)
        lowered = [_exchange(tables, chosen, item) for item in range(tables.items)]
        if not any(lowered):
            break
    return chosen


def _move_single(tables: Tables, chosen: np.ndarray) -> None:
    while True:
        loss, cost = tables.changes(chosen)
        allowed = (tables.over(chosen)[:, None] + cost <= 0).all(axis=0)
        column = int(np.where(allowed, loss, np.inf).argmin())
        if not allowed.any() or loss[column] >= -_noise(tables):
            return
        chosen[tables.item[column]] = column - tables.start[tables.item[column]]


def _exchange(tables: Tables, chosen: np.ndarray, item: int) -> bool:
    """Applies the best pair of moves of `item` and any other item, if it lowers the loss."""
    loss, cost = tables.changes(chosen)
    mine = slice(tables.start[item], tables.start[item + 1])
    gain = loss[mine, None] + loss[None, :]
    if tables.pair is not None:
        now = tables.columns(chosen)
        mine_now, other_now = now[item], now[tables.item]
        gain += tables.pair[mine] - tables.pair[mine][:, other_now] - tables.pair[mine_now] + tables.pair[mine_now, other_now]
    gain[:, mine] = np.inf
    for over, change in zip(tables.over(chosen), cost, strict=True):
        gain[change[mine, None] + change[None, :] + over > 0] = np.inf
    first, second = np.unravel_index(int(gain.argmin()), gain.shape)
    if not gain[first, second] < -_noise(tables):
        return False
    chosen[item] = first
    chosen[tables.item[second]] = second - tables.start[tables.item[second]]
    return True


def _noise(tables: Tables) -> float:
    """Gains below this are rounding: moves there and back would never end."""
    return 1e-12 * float(np.abs(tables.loss).max(initial=0.0))
