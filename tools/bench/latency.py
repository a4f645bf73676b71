"""Latency at several batch sizes and thread counts, ours and the peers', without accuracy.

The model is quantized once with a symbolic batch and compiled at each size. Every finished combination is written down, so an
interrupted run continues; rows of another day or another machine class are measured anew.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.batch import with_batch
from ...ir.errors import DataError
from ...ir.files import write_atomically
from ...ir.onnx_export import export_onnx
from ...ir.program import Program
from ..optimize import optimize
from ..quick import PRECISIONS, quick_program
from ..sources import Source, resolve
from . import check_peers, interleave
from .markdown import machine
from .worker import Worker, WorkerError

Progress = Callable[[int, int, str], None]

#: Samples in samples.npz: the peers calibrate on them, and the first is what is timed.
SAMPLES = 2


@dataclass(frozen=True)
class Timing:
    """One system at one batch and thread count; milliseconds of a whole batch. median None: it did not run, and why."""

    system: str
    precision: str
    batch: int
    threads: int
    median: float | None
    least: float | None
    reason: str = ""


def measure_latency(
    model: str,
    batches: Sequence[int],
    threads: Sequence[int],
    peers: Sequence[str],
    store: Path,
    progress: Progress,
    rounds: int = 30,
    seconds: float = 240.0,
    fresh: bool = False,
) -> list[Timing]:
    """Times all systems at every batch and thread count.

    Args:
        store: JSON file of finished combinations. seconds: longest timing of one combination, builds not counted.
        fresh: measure again what `store` holds.

    Raises:
        UnknownNameError: a peer that does not exist. DataError: the model brings no data along.
    """
    check_peers(peers)
    done = {} if fresh else _read(store, model)
    wanted = [(b, t) for b in batches for t in threads if f"{b}x{t}" not in done]
    if wanted:
        source = resolve(model, dynamic_batch=True)
        programs = {precision: quick_program(source, precision, progress) for precision in PRECISIONS}
        for batch in sorted({b for b, _ in wanted}):
            with tempfile.TemporaryDirectory() as name:
                prepare(source, programs, batch, Path(name), progress)
                for count in (t for b, t in wanted if b == batch):
                    rows = _combination(Path(name), batch, count, peers, rounds, seconds, progress)
                    done[f"{batch}x{count}"] = rows
                    _write(store, model, done)
    return [row for b in batches for t in threads for row in done[f"{b}x{t}"]]


def prepare(source: Source, programs: dict[str, Program], batch: int, folder: Path, progress: Progress) -> None:
    """float.onnx, samples.npz, float.gw and int8.gw at one batch size: what `systems.build` reads."""
    if source.reference is None:
        raise DataError(f"'{source.program.name}' brings no samples along; name a reference model")
    fixed = {precision: with_batch(program, batch) for precision, program in programs.items()}
    export_onnx(fixed["float32"], folder / "float.onnx")
    samples = source.reference.calibration(SAMPLES * batch)
    columns = [torch.cat(column).unflatten(0, (SAMPLES, batch)).numpy() for column in zip(*samples, strict=True)]
    names = [spec.name for spec in source.program.input_specs]
    arrays: dict[str, Any] = dict(zip(names, columns, strict=True))
    np.savez(folder / "samples.npz", **arrays)
    for precision, file in (("float32", "float.gw"), ("int8", "int8.gw")):
        optimize(fixed[precision], pipeline="", measure=False, progress=progress).artifact.save(folder / file)


def _combination(
    folder: Path, batch: int, threads: int, peers: Sequence[str], rounds: int, seconds: float, progress: Progress
) -> list[Timing]:
    workers: list[Worker] = []
    failures: list[Timing] = []
    try:
        for index, system in enumerate(("graphwright-float", "graphwright-int8", *peers)):
            progress(index, len(peers) + 2, f"build systems, batch {batch}, {threads} threads")
            try:
                workers.append(Worker(system, folder, threads))
            except WorkerError as error:
                failures.append(Timing(system, "", batch, threads, None, None, str(error)))
        progress(len(peers) + 2, len(peers) + 2, f"build systems, batch {batch}, {threads} threads")
        times = interleave(workers, rounds, progress, seconds)
    finally:
        for worker in workers:
            worker.close()
    rows = [
        Timing(w.system_name, w.precision, batch, threads, round(statistics.median(t), 4), round(min(t), 4))
        for w, t in zip(workers, times, strict=True)
    ]
    return [*rows, *failures]


def _read(store: Path, model: str) -> dict[str, list[Timing]]:
    if not store.exists():
        return {}
    kept = json.loads(store.read_text())
    if (kept["model"], kept["machine"]) != (model, machine()):
        return {}
    return {key: [Timing(**row) for row in rows] for key, rows in kept["rows"].items()}


def _write(store: Path, model: str, done: dict[str, list[Timing]]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    rows = {key: [asdict(row) for row in rows] for key, rows in done.items()}
    write_atomically(store, (json.dumps({"model": model, "machine": machine(), "rows": rows}, indent=1) + "\n").encode())


def latency_rows(timings: Sequence[Timing], batches: Sequence[int], threads: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """(head, body): a line a system, a column a combination, milliseconds and the ratio to our int8 artifact."""
    head = ["system", "precision", *(f"batch {b}, {t} threads" for b in batches for t in threads)]
    found = {(x.system, x.precision, x.batch, x.threads): x.median for x in timings if x.median is not None}
    body = []
    for system, precision in dict.fromkeys((x.system, x.precision) for x in timings if x.median is not None):
        cells = []
        for batch in batches:
            for count in threads:
                mine, ours = found.get((system, precision, batch, count)), found.get(("graphwright", "int8", batch, count))
                ratio = "" if mine is None or ours is None else f" ({mine / ours:.2f}x)"
                cells.append("-" if mine is None else f"{mine:.3f}{ratio}")
        body.append([system, precision, *cells])
    return head, body
