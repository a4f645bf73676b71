"""Mixed-integer linear programs over a problem's choices, solved by HiGHS (Huangfu and Hall, 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from ...ir.errors import GraphwrightError
from .tables import Tables

#: HiGHS compares in absolute terms; rows are scaled so that their largest coefficient is one.
TOLERANCE = 1e-9
#: Times a limit is tightened by what a plan exceeded it by, within the tolerance of HiGHS.
REPAIRS = 8


class UnsolvedError(GraphwrightError):
    """The solver found no plan in its time, and no proof that there is none."""


@dataclass(frozen=True)
class Relaxation:
    """The linear relaxation: its value, the share of each column, and what taking a column costs at least on top; (columns,)."""

    value: float
    share: np.ndarray
    reduced: np.ndarray


@dataclass
class _Row:
    index: int
    cost: np.ndarray
    room: float
    scale: float
    bound: float


class Model:
    """minimize objective x + ...  over binary x with one choice an item; callers add limits, rows and continuous columns.

    The limits are checked in plain arithmetic after each solve: a plan that HiGHS admits within its tolerance and that exceeds
    a limit is not returned. useful: (columns,) choices that plans may take; all where None.
    """

    def __init__(self, tables: Tables, objective: np.ndarray, offset: float = 0.0, useful: np.ndarray | None = None) -> None:
        self.tables = tables
        self._useful = np.ones(len(tables.item), dtype=bool) if useful is None else useful
        self._limits: list[_Row] = []
        self.highs = highs = highspy.Highs()
        # One thread: plans must not depend on the machine, and a pool of threads would outlive the call.
        options = {"output_flag": False, "parallel": "off", "mip_feasibility_tolerance": TOLERANCE, "mip_abs_gap": TOLERANCE}
        for name, value in options.items():
            highs.setOptionValue(name, value)
        self.add_columns(objective, 0.0, 1.0)
        highs.changeObjectiveOffset(offset)
        for first, end in zip(tables.start[:-1], tables.start[1:], strict=True):
            self.add_row(np.arange(first, end), np.ones(end - first), 1.0, 1.0)
        self.exclude(np.flatnonzero(~self._useful))

    def add_columns(self, objective: np.ndarray, lower: float, upper: float) -> int:
        """Continuous columns; returns the index of the first."""
        first, count = self.highs.getNumCol(), len(objective)
        none = np.zeros(0, dtype=np.int32)
        self.highs.addCols(count, objective, np.full(count, lower), np.full(count, upper), 0, none, none, np.zeros(0))
        return first

    def add_row(self, columns: np.ndarray, values: np.ndarray, lower: float, upper: float) -> None:
        self.highs.addRow(lower, upper, len(columns), columns.astype(np.int32), values)

    def add_limit(self, cost: np.ndarray, room: float, scale: float | None = None, slack: int | None = None) -> None:
        """sum of cost x <= room + scale * (column `slack`). cost: (columns,)."""
        least = self.tables.floor(np.where(self._useful, cost, np.inf))
        spread = np.where(self._useful, cost - least[self.tables.item], 0.0)
        scale = scale or float(spread.max(initial=0.0)) or 1.0
        used = np.flatnonzero(spread)
        columns, values = used, spread[used] / scale
        bound = (room - float(least.sum())) / scale
        if slack is None:
            self._limits.append(_Row(self.highs.getNumRow(), cost, room, scale, bound))
        else:
            columns, values = np.append(columns, slack), np.append(values, -1.0)
        self.add_row(columns, values, -highspy.kHighsInf, bound)

    def exclude(self, columns: np.ndarray) -> None:
        """Choices that no plan of interest takes."""
        count = len(columns)
        self.highs.changeColsBounds(count, columns.astype(np.int32), np.zeros(count), np.zeros(count))

    def relaxation(self) -> Relaxation | None:
        """None where even the relaxation does not meet the limits."""
        if self._run() == highspy.HighsModelStatus.kInfeasible:
            return None
        if not np.isfinite(self.highs.getInfo().objective_function_value):
            raise UnsolvedError(f"HiGHS cannot solve the relaxation ({self._status()}); solve by 'greedy'")
        solution, count = self.highs.getSolution(), len(self.tables.item)
        return Relaxation(
            self.highs.getInfo().objective_function_value,
            np.array(solution.col_value[:count]),
            np.array(solution.col_dual[:count]),
        )

    def solve(self, gap: float, seconds: float, start: np.ndarray | None = None) -> tuple[np.ndarray | None, float]:
        """(chosen (items,) or None where no plan meets the limits, proven lower bound of the objective).

        Raises:
            UnsolvedError: out of time without a plan.
        """
        count = len(self.tables.item)
        integer = np.full(count, highspy.HighsVarType.kInteger)
        self.highs.changeColsIntegrality(count, np.arange(count, dtype=np.int32), integer)
        self.highs.setOptionValue("mip_rel_gap", gap)
        self.highs.setOptionValue("time_limit", seconds)
        if start is not None:
            values = np.zeros(count)
            values[self.tables.columns(start)] = 1.0
            self.highs.setSolution(count, np.arange(count, dtype=np.int32), values)
        bound = -np.inf
        for _ in range(REPAIRS):
            if self._run() == highspy.HighsModelStatus.kInfeasible:
                return None, bound
            info = self.highs.getInfo()
            shares = np.array(self.highs.getSolution().col_value[:count])
            if len(shares) < count or not np.isfinite(info.objective_function_value):
                raise UnsolvedError(
                    f"HiGHS found no plan in {seconds:g} s ({self._status()}); give it more time, or solve by 'greedy'"
                )
            bound = max(bound, info.mip_dual_bound)
            chosen = self.tables.best(-shares)
            if not self._tighten(chosen):
                return chosen, bound
        raise UnsolvedError(f"HiGHS exceeds a limit within its tolerance even after {REPAIRS} repairs; solve by 'greedy'")

    def _run(self) -> highspy.HighsModelStatus:
        self.highs.run()
        if self.highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            # Presolve rounds in its own way and then refuses limits that a plan spends to the last digit.
            self.highs.setOptionValue("presolve", "off")
            self.highs.run()
        return self.highs.getModelStatus()

    def _status(self) -> str:
        return self.highs.modelStatusToString(self.highs.getModelStatus())

    def _tighten(self, chosen: np.ndarray) -> bool:
        """Whether a limit is exceeded; its row then excludes this plan."""
        columns, exceeded = self.tables.columns(chosen), False
        for row in self._limits:
            over = float(row.cost[columns].sum()) - row.room
            if over > 0:
                exceeded = True
                row.bound -= 2 * over / row.scale + 2 * TOLERANCE
                self.highs.changeRowBounds(row.index, -highspy.kHighsInf, row.bound)
        return exceeded
