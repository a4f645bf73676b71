"""The tables of docs/BENCHMARKS.md, one verb each, printed as Markdown with the machine class and the date.

python -m graphwright.tools.bench.tables peers resnet20 --peers ort,ort-int8
python -m graphwright.tools.bench.tables exactness resnet20 --inputs 1000 --arm64-inputs 50
python -m graphwright.tools.bench.tables export resnet20 mobilenetv2 vit-tiny
python -m graphwright.tools.bench.tables cost efficientnet-lite0

The verbs of speed.py come on top: rates, floors, latency, cold-start, compile; and those of mixed_tables.py: fronts, rounding,
predictions; those of pruned.py: pruned-latency, pruned-int8, recovery; that of pruning_tables.py: pruning; that of
channel_plans.py: channel-plans; and that of arm.py.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..optimize import optimize
from ..progress import TerminalProgress
from ..sources import resolve
from . import Row, arm, channel_plans, mixed_tables, pruned, pruning_tables, run_bench, score_column, score_text, speed
from .exactness import Exactness
from .exactness import measure as measure_exactness
from .export import measure as measure_export
from .markdown import machine, markdown
from .systems import PEERS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def peers(
    models: Annotated[list[str], typer.Argument()],
    peers: str = ",".join(PEERS),
    rounds: int = 30,
    threads: int = 2,
    evaluate: Annotated[int, typer.Option(help="Evaluation samples; 0: all.")] = 0,
    samples: Annotated[int, typer.Option(help="Calibration samples; 64 will do for resnet50, which has no accuracy.")] = 512,
) -> None:
    """Accuracy and latency of float, int8 and the peers, one interleaved run a model."""
    for model in models:
        with TerminalProgress() as progress:
            bench = run_bench(model, [p for p in peers.split(",") if p], threads, rounds, samples, evaluate or None, progress)
        rows = bench.rows
        ours = next(r for r in rows if (r.system, r.precision) == ("graphwright", "int8")).latency_ms
        body = [_peer_row(r, ours) for r in rows]
        typer.echo(f"\n{model}, batch {rows[0].batch}, {threads} threads; {machine()}\n")
        typer.echo(
            markdown(["system", "precision", score_column(rows[0].metric), "latency (ms)", "vs ours int8", "size (MB)"], body)
        )
        for peer, reason in bench.failures.items():
            typer.echo(f"\n{peer} did not run: {reason}")


def _peer_row(row: Row, ours: float) -> list[str]:
    ratio, size = f"{row.latency_ms / ours:.2f}x", f"{row.size_bytes / 1e6:.2f}"
    return [row.system, row.precision, score_text(row), f"{row.latency_ms:.3f}", ratio, size]


@app.command()
def exactness(
    models: Annotated[list[str], typer.Argument()],
    inputs: Annotated[int, typer.Option(help="Inputs a model on this machine.")] = 1000,
    arm64_inputs: Annotated[int, typer.Option(help="Inputs a model for AArch64 under qemu.")] = 10,
    runner: Annotated[Path, typer.Option(help="gw-run for AArch64.")] = Path("build/aarch64/gw-run"),
) -> None:
    """Bit-exactness of the artifact against the torch reference, every output value compared. Ctrl-C keeps what was found."""
    rows = []
    for model in models:
        with TerminalProgress() as progress:
            rows.append(measure_exactness(model, inputs, arm64_inputs, runner, progress, _log))
    typer.echo(f"\n{machine()}\n")
    head = ["model", "values an input", "x86: inputs equal in every bit", "AArch64 (qemu): inputs equal in every bit"]
    typer.echo(markdown(head, [[row.model, str(row.values), str(row.here), str(row.arm64)] for row in rows]))
    for row in rows:
        if row.held_out < max(inputs, arm64_inputs):
            typer.echo(f"\n{row.model} has {row.held_out} evaluation inputs; calibration inputs follow them.")


def _log(found: Exactness) -> None:
    """A line a chunk where no bar can be shown: a run in the background leaves its count in the log."""
    if not sys.stderr.isatty():
        typer.echo(f"{found.model}: here {found.here}; AArch64 {found.arm64}", err=True)


@app.command()
def export(
    models: Annotated[list[str], typer.Argument()],
    inputs: Annotated[int, typer.Option(help="Evaluation inputs a model; 0: all.")] = 0,
) -> None:
    """The ONNX exports of quantized classifiers in ONNX Runtime against the int8 artifact."""
    rows = []
    for model in models:
        with TerminalProgress() as progress:
            rows += measure_export(model, inputs or None, progress)
    typer.echo(f"\n{machine()}\n")
    head = ["model", "exported", "ONNX Runtime", "same class", "all outputs within one step", "one step", "largest difference",
            "median time, 1 thread (ms)"]  # fmt: skip
    body = [
        [r.model, r.export, r.mode, f"{r.same} of {r.inputs}", f"{r.within} of {r.inputs}", f"{r.step:.3g}", f"{r.largest:.2g}",
         f"{1e3 * statistics.median(r.seconds):.2f}" if r.seconds else ""]
        for r in rows
    ]  # fmt: skip
    typer.echo(markdown(head, body))


@app.command()
def cost(model: str, samples: int = 512) -> None:
    """Wall time and peak memory of optimize() on one model, in a process of its own."""
    code = f"import sys; from graphwright.tools.bench.tables import _cost; _cost({model!r}, {samples})"
    subprocess.run([sys.executable, "-c", code], check=True)


def _cost(model: str, samples: int) -> None:
    source = resolve(model)
    batches = source.calibration(None, samples)
    start = time.perf_counter()
    result = optimize(source.program, calibration=batches, measure=False)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    typer.echo(f"\n{model}, {samples} calibration samples; {machine()}\n")
    typer.echo(markdown(["step", "seconds"], [[row.text, f"{row.seconds:.1f}"] for row in result.report.certificate]))
    typer.echo(f"\noptimize(): {seconds:.0f} s in all, peak memory {peak:.2f} GiB (samples included)")


arm.register(app)
channel_plans.register(app)
speed.register(app)
mixed_tables.register(app)
pruned.register(app)
pruning_tables.register(app)

if __name__ == "__main__":
    app()
