"""The evidence of one optimization as data, as text for the terminal, and as one self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..backends.base import KernelRow
from ..ir.errors import GraphwrightError
from ..ir.files import write_atomically
from ..passes.manager import CertificateRow
from ..search.problem import Problem, Solution
from ..search.sensitivity.base import Scores
from ..search.solvers.bisection import Evaluation


class ConstraintError(GraphwrightError):
    """A limit the result does not meet; names each one and the value reached."""


@dataclass(frozen=True)
class Measurement:
    """One line of the result table. score: as evaluate() gives it; size in bytes; latency in milliseconds; None: not measured."""

    system: str
    score: float | None
    size_bytes: int
    latency_ms: float | None


@dataclass(frozen=True)
class SearchEvidence:
    """How the formats of the layers were found.

    Attributes:
        allocation: layer -> format, in graph order.
        problem: what was solved; `chosen` and `front` are plans of it.
        metric: what the front is drawn against, one of the problem's limits.
        evaluations: plans that were really run, with their scores.
        scores: one table a scorer.
    """

    allocation: Mapping[str, str]
    problem: Problem
    metric: str
    front: tuple[Solution, ...]
    chosen: Solution
    evaluations: tuple[Evaluation, ...] = ()
    scores: tuple[Scores, ...] = ()

    def to_json(self) -> dict[str, Any]:
        def plan(solution: Solution) -> dict[str, Any]:
            return {"chosen": self.problem.names(solution.chosen), "loss": solution.loss, "totals": solution.totals}

        return {
            "allocation": dict(self.allocation),
            "metric": self.metric,
            "front": [plan(solution) for solution in self.front],
            "chosen": plan(self.chosen),
            "evaluations": [{**plan(e.solution), "score": e.score} for e in self.evaluations],
            "scores": [scores.to_json() for scores in self.scores],
        }


@dataclass(frozen=True)
class Report:
    """rows[0] is the float model, rows[1] the result; search: None where no allocation was searched for."""

    name: str
    target: str
    pipeline: str
    certificate: tuple[CertificateRow, ...]
    kernels: tuple[KernelRow, ...]
    rows: tuple[Measurement, ...]
    seconds: float
    notes: tuple[str, ...] = field(default=())
    #: Bits of a weight on average, and bit operations over those of float32; None where the result is not integer arithmetic.
    average_bits: float | None = None
    bops: float | None = None
    #: Multiply-accumulates over those of the float model.
    macs: float | None = None
    search: SearchEvidence | None = None

    def to_json(self) -> dict[str, Any]:
        values = asdict(replace(self, search=None))
        return {**values, "search": self.search.to_json() if self.search else None}

    def reached(self) -> dict[str, float]:
        """The value reached for each constraint that was measured."""
        before, after = self.rows[0], self.rows[1]
        values = {"size": after.size_bytes / max(before.size_bytes, 1)}
        if before.score is not None and after.score is not None:
            values["max_drop"] = before.score - after.score
        if before.latency_ms and after.latency_ms:
            values["latency"] = after.latency_ms / before.latency_ms
        for name, value in (("average_bits", self.average_bits), ("bops", self.bops), ("macs", self.macs)):
            if value is not None:
                values[name] = value
        return values

    def unmet(self, limits: dict[str, float]) -> dict[str, str]:
        """Limit -> what is wrong with it, for every limit this result does not meet."""
        reached = self.reached()
        missed = {}
        for name, limit in limits.items():
            if name not in reached:
                missed[name] = (
                    "could not be measured (the target does not run here, and not all of its kernels' times are recorded)"
                )
            elif reached[name] > limit + 1e-9 * abs(limit):  # differences of scores carry rounding
                missed[name] = f"limit {limit:g}, reached {reached[name]:.4g}"
        return missed

    def require(self, limits: dict[str, float]) -> None:
        """Raises ConstraintError naming every limit that is not met and the value this pipeline reaches."""
        missed = self.unmet(limits)
        if missed:
            raise ConstraintError(
                f"'{self.name}' through '{self.pipeline}' misses {len(missed)} of {len(limits)} limits: "
                f"{'; '.join(f'{name}: {why}' for name, why in missed.items())}. "
                "Raise the limit to the value reached; for accuracy keep sensitive layers in float with quantize{skip=[...]}, "
                "for size, bops and latency choose among fewer bits with search=BitSearch() (CLI: --formats int8,int4,int2)"
            )

    def tables(self) -> list[Table]:
        """Result, passes, and kernel kinds as rich tables."""
        result = Table(title=f"{self.name} for {self.target}")
        for column in ("", "score", "size", "latency", "vs float"):
            result.add_column(column, justify="left" if not column else "right")
        base = self.rows[0].latency_ms
        for row in self.rows:
            ratio = f"{row.latency_ms / base:.2f}x" if base and row.latency_ms else "-"
            result.add_row(
                row.system, number_text(row.score, ".4f"), size_text(row.size_bytes), number_text(row.latency_ms, ".3f ms"), ratio
            )
        passes = Table(title="certificate")
        for column in ("pass", "effect", "changed", "max |diff|", "SQNR", "nodes", "parameters", "time"):
            # In 80 columns other cells wrap before a name is cut; its options stand in the plan.
            passes.add_column(column, justify="left" if column == "pass" else "right", no_wrap=column == "pass")
        for row in self.certificate:
            passes.add_row(
                row.name, row.effect, "yes" if row.modified else "no", f"{row.max_abs:.3g}", number_text(row.sqnr_db, ".1f dB"),
                f"{row.nodes_before} -> {row.nodes_after}", f"{size_text(row.bytes_before)} -> {size_text(row.bytes_after)}",
                f"{row.seconds:.1f} s",
            )  # fmt: skip
        return [result, passes]

    def __str__(self) -> str:
        console = Console(width=140, record=True, file=io.StringIO())
        for table in self.tables():
            console.print(table)
        for note in self.notes:
            console.print(f"note: {note}")
        return console.export_text()

    def save_html(self, path: str | Path) -> None:
        """Writes the page, tables and plots, about 5 MB; nothing is loaded from elsewhere when it is opened."""
        from .report_page import page  # plotly takes a second to import, and most runs write no page

        write_atomically(Path(path), page(self).encode())


def number_text(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    spec, _, unit = form.partition(" ")
    return f"{value:{spec}}{' ' + unit if unit else ''}"


def size_text(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
