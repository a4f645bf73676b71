"""Channels chosen for a measured time: the limit, what the times of the kernels predict, and what a run takes.

python -m graphwright.tools.bench.tables channel-plans resnet20 --shares 0.85,0.7 --samples 256 --evaluate 2000
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...backends.base import example_inputs
from ...backends.registry import backend_for
from ...backends.target import Target
from ...ir.data import Calibration
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import parse
from ...search.channels import macs_of
from ...search.planner import Surroundings
from ...search.store import Store
from ..channels import PipelinePlan, plan_channels
from ..predict import program_predict
from ..progress import TerminalProgress
from ..sources import Source, resolve
from .markdown import machine, markdown

Progress = Callable[[int, int, str], None]

PIPELINE = "canonicalize,prune-channels"
#: Runs of each network; they take turns.
RUNS = 200


@dataclass(frozen=True)
class Planned:
    """One network. share, predicted, macs: of the original's; `predicted` by the sum of its kernels. measured: microseconds."""

    share: float | None
    predicted: float | None
    measured: float
    macs: float
    score: float | None
    pipeline: str


def planned(
    source: Source, shares: Sequence[float], around: Surroundings, multiple: int | None, evaluate: int | None
) -> list[Planned]:
    """The float network as it is, then one plan a share of its time; all of them timed again, in turns."""
    found = [plan_channels(source.program, parse(PIPELINE), {"latency": share}, "cpu", around, multiple) for share in shares]
    context = PassContext(calibration=around.samples, progress=around.progress)
    run = PassManager().run
    networks = [run(source.program, parse("canonicalize")).program]
    networks += [run(source.program, plan.pipeline, context).program for plan in found]
    measured = _times(networks, around.progress)
    whole, score = macs_of(networks[0]), source.evaluate(evaluate)
    rows: list[tuple[float | None, PipelinePlan | None]] = [(None, None), *zip(shares, found, strict=True)]
    return [
        Planned(
            share,
            None if plan is None else plan.plan.totals["microseconds"] / plan.whole["microseconds"],
            spent,
            macs_of(network) / whole,
            None if score is None else score(program_predict(network)),
            "" if plan is None else str(plan.pipeline),
        )
        for (share, plan), network, spent in zip(rows, networks, measured, strict=True)
    ]


def _times(networks: Sequence[Program], progress: Progress) -> list[float]:
    target = Target.parse("cpu")
    backend = backend_for(target)
    timed = [(backend.compile(network, target, progress), example_inputs(network)) for network in networks]
    return [1e3 * spent for spent in backend.latencies(timed, RUNS)]


def channel_plans(
    model: str,
    shares: Annotated[str, typer.Option(help="Limits: shares of the measured time of a run of the float network.")] = "0.85,0.7",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 256,
    multiple: Annotated[int | None, typer.Option(help="Counts are multiples of this; default: what the target likes.")] = None,
    evaluate: Annotated[int, typer.Option(help="Evaluation samples; 0: all.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps what channels lose.")] = None,
) -> None:
    """Channels under limits on measured time: asked, predicted and measured, with the score, nothing fine-tuned."""
    source = resolve(model)
    with TerminalProgress() as progress:
        data = Calibration.for_program(source.program, source.calibration(None, samples) or [])
        around = Surroundings(data, store=Store(cache), progress=progress)
        rows = planned(source, [float(x) for x in shares.split(",")], around, multiple, evaluate or None)
    whole = rows[0].measured
    typer.echo(f"\n{model}, batch 1, {samples} calibration samples; {machine()}\n")
    score = "score" if source.reference is None else source.reference.metric_name
    body = [
        [
            "as it is" if r.share is None else f"{r.share:g}", "" if r.predicted is None else f"{r.predicted:.2f}",
            f"{r.measured / whole:.2f}", f"{r.measured:.0f}", f"{r.macs:.3f}", "" if r.score is None else f"{r.score:.4f}",
        ]
        for r in rows
    ]  # fmt: skip
    typer.echo(markdown(["limit", "predicted", "measured", "measured (us)", "MACs", score], body))
    for row in rows[1:]:
        typer.echo(f"\n{row.share:g}: {row.pipeline}")


def register(app: typer.Typer) -> None:
    """Adds the verb to the command of all tables."""
    app.command()(channel_plans)
