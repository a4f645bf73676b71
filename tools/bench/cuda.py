"""Artifacts for CUDA beside PyTorch on the same GPU: fp16, channels last, eager and `torch.compile(mode="reduce-overhead")`.

    python -m graphwright.tools.bench.cuda prepare resnet50 --batches 1,8,32,128 -o folder       # where the compiler is
    python -m graphwright.tools.bench.cuda measure folder --json rows.jsonl                      # where the GPU is

`prepare` needs no GPU and `measure` no compiler, so the two need not be one machine. Every system has a process of its own: all
build at once, then one runs while the others wait. Tensors stay on the GPU; a time is that of one call until its result is there,
the median over calls in interleaved turns. Each row carries how the outputs compare with the torch reference: the share of equal
values, which is 1 for an integer artifact, and the largest difference. The peers have random weights.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

from ...ir.errors import DataError, TargetError
from .cuda_worker import System, Worker

if TYPE_CHECKING:
    from ...ir.program import Program
    from ..zoo import ReferenceModel

app = typer.Typer(add_completion=False, no_args_is_help=True)

#: Calls timed in one turn of a system, and turns.
CALLS, TURNS = 20, 15
#: Samples that the torch reference computes for an artifact; larger batches repeat them.
SAMPLES = 4


#: Precisions of peers that do not run in float16.
PRECISIONS = {"torch torchao": "int8"}


@dataclass(frozen=True)
class Row:
    """One system at one batch. latency_ms: median of one call. equal: share of output values that are the reference's in every
    bit; difference: largest absolute difference to it, of values whose largest magnitude is `magnitude`."""

    model: str
    system: str
    precision: str
    batch: int
    latency_ms: float | None
    least_ms: float | None
    equal: float | None = None
    difference: float | None = None
    magnitude: float | None = None
    reason: str = ""


@app.command()
def prepare(
    models: list[str],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for artifacts and reference outputs.")],
    batches: str = "1,32",
    precisions: Annotated[str, typer.Option(help="Of int8, fp8, float16, bfloat16 and float32.")] = "int8",
    target: str = "cuda:sm_90",
) -> None:
    """Compiles every model at every batch size and precision, with inputs and what the torch reference makes of them."""
    from ...ir.batch import with_batch  # these bring the compiler, which `measure` does without
    from ..optimize import optimize
    from ..progress import TerminalProgress
    from ..quick import quick_program
    from ..sources import resolve

    out.mkdir(parents=True, exist_ok=True)
    with TerminalProgress() as progress:
        for model in models:
            source = resolve(model, dynamic_batch=True)
            if source.reference is None:
                raise DataError(f"'{model}' brings no samples along; name a reference model")
            for precision in precisions.split(","):
                program = quick_program(source, precision, progress)
                for batch in map(int, batches.split(",")):
                    stem = out / f"{model}.{batch}.{precision}"
                    inputs, outputs = _tiled(program, source.reference, batch)
                    named = {f"x{i}": x for i, x in enumerate(inputs)} | {f"y{i}": y for i, y in enumerate(outputs)}
                    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in named.items()}
                    np.savez_compressed(stem.with_name(f"{stem.name}.npz"), **arrays)
                    fixed = with_batch(program, batch)
                    artifact = optimize(fixed, target=target, pipeline="", measure=False, progress=progress).artifact
                    artifact.save(stem.with_name(f"{stem.name}.gw"), overwrite=True)


def _tiled(program: Program, reference: ReferenceModel, batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """At most SAMPLES samples and what the torch reference makes of them. `measure` repeats them until the batch is full: the
    reference need not run on more, and they travel once."""
    from ...ir.batch import with_batch

    count = min(batch, SAMPLES)
    columns = zip(*reference.calibration(count), strict=True)
    inputs = [torch.cat(column)[:count].contiguous() for column in columns]
    return inputs, list(with_batch(program, count)(*inputs))


@app.command()
def measure(
    folder: Path,
    json_file: Annotated[Path | None, typer.Option("--json", help="Rows, one a line, written as they are found.")] = None,
    peers: Annotated[str, typer.Option(help="Of eager, compile and torchao, which has to be installed.")] = "eager,compile",
    build_seconds: Annotated[float, typer.Option(help="A system that is not built by then is a row that says so.")] = 150,
) -> None:
    """Times every artifact of FOLDER and PyTorch on this machine's GPU."""
    if not torch.cuda.is_available():
        raise TargetError("PyTorch finds no GPU here; `prepare` runs anywhere, `measure` where the GPU is")
    groups = systems_of(folder, [f"torch {peer}" for peer in peers.split(",") if peer])
    count = sum(map(len, groups))
    threads = max(1, (os.cpu_count() or 1) // max(1, count // 4))
    deadline = time.monotonic() + build_seconds
    workers = [[Worker(system, threads) for system in group] for group in groups]
    # Nothing is timed while anything compiles.
    for worker in [worker for group in workers for worker in group]:
        worker.wait(max(0.0, deadline - time.monotonic()))
    for group in workers:
        for row in _measured(group):
            line = json.dumps(asdict(row))
            print(line, flush=True)
            if json_file is not None:
                with json_file.open("a") as stream:
                    stream.write(line + "\n")
        for worker in group:
            worker.close()


def systems_of(folder: Path, peers: Sequence[str]) -> list[list[System]]:
    """The systems of each model and batch: its artifacts, named MODEL.BATCH.PRECISION[.VARIANT].gw, and the peers."""
    groups: dict[tuple[str, int], list[System]] = {}
    for path in sorted(folder.glob("*.gw")):
        model, batch, precision, *variant = path.stem.split(".")
        name = "-".join(["graphwright", *variant])
        groups.setdefault((model, int(batch)), []).append(System(model, name, precision, int(batch), path))
    for (model, batch), group in groups.items():
        group += [System(model, peer, PRECISIONS.get(peer, "float16"), batch, group[0].file) for peer in peers]
    return [groups[key] for key in sorted(groups)]


def _measured(workers: Sequence[Worker]) -> list[Row]:
    """Turns of one system after another, the others waiting."""
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(TURNS):
        for worker, found in zip(workers, times, strict=True):
            if not worker.failure:
                found += worker.times(CALLS)
    rows = []
    for worker, found in zip(workers, times, strict=True):
        system, known = worker.system, worker.accuracy
        accuracy = (known.equal, known.difference, known.magnitude) if known else (None, None, None)
        latency = (round(statistics.median(found), 4), round(min(found), 4)) if found else (None, None)
        rows.append(Row(system.model, system.name, system.precision, system.batch, *latency, *accuracy, worker.failure))
    return rows


if __name__ == "__main__":
    app()
