"""The tables of docs/BENCHMARKS.md, one verb each, printed as Markdown with the machine class and the date.

python -m graphwright.tools.bench.tables peers resnet20 --peers ort,ort-int8
python -m graphwright.tools.bench.tables exactness resnet20 --inputs 1000 --arm64-inputs 50
python -m graphwright.tools.bench.tables cost efficientnet-lite0
"""

from __future__ import annotations

import datetime
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ...backends.host import host_arch, host_level, host_threads
from ...backends.loader import load
from ...ir.errors import GraphwrightError
from ...ir.program import Program
from ..optimize import optimize
from ..progress import TerminalProgress
from ..sources import resolve
from . import Row, run_bench
from .systems import PEERS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

QEMU = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]


def machine() -> str:
    """Machine class and date, the line every table carries."""
    return f"{host_arch()}:{host_level()}, {host_threads()} cores, {datetime.date.today().isoformat()}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@app.command()
def peers(
    models: Annotated[list[str], typer.Argument()],
    peers: str = ",".join(PEERS),
    rounds: int = 30,
    threads: int = 2,
    evaluate: Annotated[int, typer.Option(help="Evaluation samples; 0: all.")] = 0,
) -> None:
    """Accuracy and latency of float, int8 and the peers, one interleaved run a model."""
    for model in models:
        with TerminalProgress() as progress:
            bench = run_bench(model, [p for p in peers.split(",") if p], threads, rounds, 512, evaluate or None, progress)
        rows = bench.rows
        ours = next(r for r in rows if (r.system, r.precision) == ("graphwright", "int8")).latency_ms
        body = [_peer_row(r, ours) for r in rows]
        typer.echo(f"\n{model}, batch {rows[0].batch}, {threads} threads; {machine()}\n")
        typer.echo(markdown(["system", "precision", rows[0].metric, "latency (ms)", "vs ours int8", "size (MB)"], body))
        for peer, reason in bench.failures.items():
            typer.echo(f"\n{peer} did not run: {reason}")


def _peer_row(row: Row, ours: float) -> list[str]:
    score = "-" if row.score is None else f"{row.score:.4f}"
    ratio, size = f"{row.latency_ms / ours:.2f}x", f"{row.size_bytes / 1e6:.2f}"
    return [row.system, row.precision, score, f"{row.latency_ms:.3f}", ratio, size]


@app.command()
def exactness(
    models: Annotated[list[str], typer.Argument()],
    inputs: Annotated[int, typer.Option(help="Inputs a model on this machine.")] = 1000,
    arm64_inputs: Annotated[int, typer.Option(help="Inputs a model for AArch64 under qemu.")] = 10,
    runner: Annotated[Path, typer.Option(help="gw-run for AArch64.")] = Path("build/aarch64/gw-run"),
) -> None:
    """Bit-exactness of the artifact against the torch reference, every output value compared."""
    body = []
    for model in models:
        source = resolve(model)
        with TerminalProgress() as progress:
            result = optimize(source.program, calibration=source.calibration(None, 128), measure=False, progress=progress)
            samples = take_samples(source, max(inputs, arm64_inputs))
            expected = [[y.numpy() for y in result.program(*sample)] for sample in samples]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.gw"
                result.artifact.save(path)
                here = count_equal(expected[:inputs], run_here(path, samples[:inputs]))
            arm = count_equal(expected[:arm64_inputs], run_arm64(result.program, samples[:arm64_inputs], runner))
        values = sum(y.size for y in expected[0])
        body.append([model, str(values), f"{here} of {inputs}", f"{arm} of {arm64_inputs}"])
    typer.echo(f"\n{machine()}\n")
    typer.echo(
        markdown(
            ["model", "values an input", "x86: inputs equal in every bit", "AArch64 (qemu): inputs equal in every bit"], body
        )
    )


def take_samples(source, count: int) -> list[tuple[torch.Tensor, ...]]:
    """The first `count` evaluation inputs, cut to the program's batch size."""
    batch = source.program.input_specs[0].shape[0] or 1

    def pieces():
        for inputs, _ in source.reference.evaluation(count):
            yield from zip(*(x.split(batch) for x in inputs), strict=True)

    return list(itertools.islice(pieces(), count))


def run_here(path: Path, samples) -> list[list[np.ndarray]]:
    model = load(path)
    results = []
    for sample in samples:
        outputs = model(*[x.numpy() for x in sample])
        results.append(list(outputs) if isinstance(outputs, tuple) else [outputs])
    return results


def run_arm64(program: Program, samples, runner: Path) -> list[list[np.ndarray]]:
    """Cross-compiles the program and runs it with gw-run under the emulator, one process for all samples."""
    if not samples:
        return []
    if not runner.exists():
        raise GraphwrightError(f"no AArch64 runner at '{runner}'; build it with: make runner")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        optimize(program, "arm64:cortex-a76", pipeline="", measure=False).artifact.save(folder / "model.gw")
        command = [*QEMU, str(runner), str(folder / "model.gw"), "--each-sample"]
        for index, column in enumerate(zip(*samples, strict=True)):
            np.save(folder / f"in{index}.npy", torch.stack(column).numpy())
            command += ["--input", str(folder / f"in{index}.npy")]
        done = subprocess.run([*command, "--output", str(folder / "out")], capture_output=True, text=True)
        if done.returncode:
            raise GraphwrightError(f"gw-run under qemu failed with status {done.returncode}: {done.stderr.strip()}")
        columns = [np.load(path) for path in sorted(folder.glob("out*.npy"))]
    return [[column[i] for column in columns] for i in range(len(samples))]


def count_equal(expected: list[list[np.ndarray]], actual: list[list[np.ndarray]]) -> int:
    return sum(
        all(np.array_equal(e.view(np.uint8), a.view(np.uint8)) for e, a in zip(es, as_, strict=True))
        for es, as_ in zip(expected, actual, strict=True)
    )


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


if __name__ == "__main__":
    app()
