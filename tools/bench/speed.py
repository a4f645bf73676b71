"""The tables of speed: verbs of `tables`, each resumable or shorter than ten minutes on a quiet machine.

python -m graphwright.tools.bench.tables rates
python -m graphwright.tools.bench.tables floors efficientnet-lite0 --threads 2
python -m graphwright.tools.bench.tables latency resnet50 --batches 1,8,32 --threads 1,2
python -m graphwright.tools.bench.tables cold-start efficientnet-lite0 resnet50
python -m graphwright.tools.bench.tables compile resnet50
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ...backends.host import host_threads
from ...backends.target import LEVELS, Target
from ...backends.tvm.target import target_rows
from ...ir.errors import GraphwrightError, OptionError
from ...ir.files import check_output, write_atomically
from ..progress import TerminalProgress
from .cold_start import measure_cold_start
from .latency import latency_rows, measure_latency
from .markdown import machine, markdown
from .peaks import peaks as measure_peaks
from .profile import KIND_COLUMNS, STEP_COLUMNS, kind_rows, profile_model, step_rows
from .systems import PEERS

Models = Annotated[list[str], typer.Argument()]


def numbers(text: str) -> list[int]:
    """`1,8,32` as numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise OptionError(f"'{text}' is no list of whole numbers such as 1,8,32")
    return [int(part) for part in parts]


def rates(
    threads: Annotated[str, typer.Option(help="Thread counts.")] = "",
    fresh: Annotated[bool, typer.Option(help="Measure again; the better of old and new is kept.")] = True,
) -> None:
    """What this machine can do at best, per level and thread count."""
    counts = numbers(threads) if threads else list(range(1, host_threads() + 1))
    levels = [info.target for info in target_rows() if info.runs and info.target.level in LEVELS["x86"]]
    body = []
    with TerminalProgress() as progress:
        for index, (target, count) in enumerate((t, c) for t in levels for c in counts):
            progress(index, len(levels) * len(counts), "measure rates")
            found = measure_peaks(target, count, fresh)
            units = [f"{found.units[name]:.0f}" if name in found.units else "-" for name in ("int8-tiles", "int8", "float32")]
            body.append([target.level, str(count), *units, *(f"{found.bandwidth[n]:.0f}" for n in ("l2", "l3", "memory"))])
        progress(len(body), len(body), "measure rates")
    typer.echo(f"\n{machine()}\n")
    head = ["level", "threads", "int8 tiles (GOP/s)", "int8 (GOP/s)", "float32 (GFLOP/s)"]
    typer.echo(markdown([*head, "L2 (GB/s)", "L3 (GB/s)", "memory (GB/s)"], body))


def floors(
    models: Models,
    threads: Annotated[int, typer.Option()] = 2,
    precision: Annotated[str, typer.Option(help="int8 or float32.")] = "int8",
    rounds: Annotated[int, typer.Option(help="Ten runs each.")] = 30,
    layers: Annotated[bool, typer.Option(help="A line a kernel, not only a line a kind.")] = True,
    as_json: Annotated[Path | None, typer.Option("--json", help="Folder for one JSON file a model.")] = None,
) -> None:
    """Time of every kernel in place beside the least time it could take."""
    for model in models:
        with TerminalProgress() as progress:
            found = profile_model(model, precision, threads, rounds, progress)
        typer.echo(f"\n{model} {precision}, batch 1, {threads} threads; {machine()}\n")
        if layers:
            typer.echo(markdown(STEP_COLUMNS, step_rows(found)) + "\n")
        typer.echo(markdown(KIND_COLUMNS, kind_rows(found)))
        typer.echo(f"\none run {found.total / 1e3:.3f} ms, floor {found.floor / 1e3:.3f} ms; {found.peaks.text}")
        if as_json is not None:
            path = as_json / f"floors-{model}-{precision}-{threads}.json"
            check_output(path, overwrite=True)
            write_atomically(path, (json.dumps(found.to_json(), indent=1) + "\n").encode())


def latency(
    models: Models,
    batches: Annotated[str, typer.Option()] = "1,8,32",
    threads: Annotated[str, typer.Option()] = "1,2",
    peers: str = ",".join(PEERS),
    rounds: Annotated[int, typer.Option()] = 30,
    seconds: Annotated[float, typer.Option(help="Longest timing of one batch size and thread count.")] = 180.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run of today finished.")] = False,
    keep: Annotated[Path, typer.Option(help="Folder of finished measurements.")] = Path("build/bench"),
) -> None:
    """Latency at several batch sizes and thread counts. An interrupted run continues with the same command."""
    sizes, counts = numbers(batches), numbers(threads)
    for model in models:
        store = keep / f"latency-{model}.json"
        with TerminalProgress() as progress:
            names = [p for p in peers.split(",") if p]
            timings = measure_latency(model, sizes, counts, names, store, progress, rounds, seconds, fresh)
        head, body = latency_rows(timings, sizes, counts)
        typer.echo(f"\n{model}, milliseconds a batch (ratio to our int8); {machine()}\n")
        typer.echo(markdown(head, body))
        for failed in (t for t in timings if t.median is None):
            typer.echo(f"\n{failed.system} did not run at batch {failed.batch}: {failed.reason}")


def cold_start(
    models: Models,
    threads: Annotated[int, typer.Option()] = 2,
    rounds: Annotated[int, typer.Option()] = 9,
    runner: Annotated[Path, typer.Option(help="gw-run of this machine.")] = Path("build/x86_64/gw-run"),
) -> None:
    """From a file on disk to the first answer, in a new process each time."""
    body = []
    for model in models:
        with TerminalProgress() as progress, tempfile.TemporaryDirectory() as name:
            found = measure_cold_start(model, threads, rounds, runner, Path(name), progress)
        body += [[model, row.system, row.precision, f"{row.process:.0f}", f"{row.load:.1f}"] for row in found]
    typer.echo(f"\n{threads} threads; {machine()}\n")
    head = ["model", "system", "precision", "process start to first answer (ms)", "load to first answer (ms)"]
    typer.echo(markdown(head, body))


def compile_(models: Models) -> None:
    """Compile time and peak memory without tuning, each model in a process of its own."""
    body = []
    for model in models:
        command = [sys.executable, "-m", f"{__package__}.compile_cost", model]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise GraphwrightError(f"compiling '{model}' failed with status {done.returncode}; its message stands above")
        for line in done.stdout.splitlines():
            row = json.loads(line)
            cells = [f"{row['seconds']:.1f}", f"{row['gib']:.2f}", str(row["kernels"]), f"{row['library'] / 1e6:.2f}"]
            body.append([model, row["precision"], *cells])
    typer.echo(f"\n{Target.parse('cpu')}; {machine()}\n")
    head = ["model", "precision", "compile (s)", "peak memory of the process (GiB)", "kernels", "library (MB)"]
    typer.echo(markdown(head, body))


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command of all tables."""
    for verb in (rates, floors, latency, cold_start):
        app.command()(verb)
    app.command("compile")(compile_)
