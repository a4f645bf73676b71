"""Side-by-side measurement: our float and int8 artifacts and the peers, in one interleaved run.

Every system lives in its own process (thread pools pin cores and spin, and would disturb each other), builds itself from
the same float ONNX file and the same calibration samples, and answers two requests: predict this batch, time yourself.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ...ir.data import Calibration
from ...ir.errors import UnknownNameError
from ...ir.onnx_export import export_onnx
from ...ir.program import Program
from ...passes.manager import PassManager
from ...passes.pipeline import parse
from ..defaults import fp8_pipeline, half_pipeline
from ..optimize import Result, optimize
from ..predict import single_output
from ..quick import CALIBRATED, FP8, HALF_PRECISIONS, check_precision
from ..report import Measurement
from ..sources import resolve
from ..zoo import Metric, ReferenceModel, perplexity
from .systems import ARTIFACTS, PEERS, ours
from .worker import Worker, WorkerError

#: Pause before each timing; TVM's workers spin for about 60 ms after a run, other runtimes for less.
SETTLE_SECONDS = 0.15

#: Least warm-up of a turn: cores that have paused need milliseconds until they run as in a loop, many runs of a small network.
WARM_UP_SECONDS = 0.1

#: Length of one system's turn, and rounds that are run in any case.
TURN_SECONDS, LEAST_ROUNDS = 0.3, 5


@dataclass(frozen=True)
class Row:
    """One system on one model. score is the metric of the model (higher is better); latency the median of one run, in ms."""

    model: str
    system: str
    precision: str
    batch: int
    threads: int
    metric: str
    score: float | None
    float_score: float | None
    latency_ms: float
    size_bytes: int


@dataclass(frozen=True)
class Bench:
    """Rows of the systems that ran, and for each peer that could not be built the reason."""

    rows: tuple[Row, ...]
    failures: dict[str, str]


def check_peers(names: Sequence[str]) -> None:
    """Raises UnknownNameError for a peer that does not exist, with the nearest name."""
    for name in names:
        if name not in PEERS:
            raise UnknownNameError("peer", name, PEERS)


def run_bench(
    model: str,
    peers: Sequence[str],
    threads: int,
    rounds: int,
    samples: int,
    evaluate: int | None,
    progress: Callable[[int, int, str], None],
    keep: Path | None = None,
    precisions: Sequence[str] = ("int8",),
) -> Bench:
    """Builds, scores and times every system. A peer that fails on the model is reported beside the rows, not in them.

    Args:
        evaluate: bounds the evaluation samples; None takes all of them.
        keep: a folder that receives the artifact of the first precision and its HTML report, named after the model.
        precisions: of our artifacts beside the float32 one.
    """
    check_peers(peers)
    for precision in precisions:
        check_precision(precision)
    source = resolve(model)
    batches = source.calibration(None, samples)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = _prepare(source.program, batches, folder, precisions, progress)
        workers = [Worker(ours(precision), folder, threads) for precision in results]
        failures: dict[str, str] = {}
        try:
            for index, peer in enumerate(peers, len(results)):
                progress(index, len(results) + len(peers), "build systems")
                try:
                    workers.append(Worker(peer, folder, threads))
                except WorkerError as error:
                    failures[peer] = str(error)
            progress(len(results) + len(peers), len(results) + len(peers), "build systems")
            scores = _scores(source.reference, workers, evaluate)
            latencies = interleave(workers, rounds, progress)
        finally:
            for worker in workers:
                worker.close()
        batch = source.program.input_specs[0].shape[0] or 1
        metric = source.reference.metric_name if source.reference else ""
        rows = [
            Row(
                source.program.name, w.system_name, w.precision, batch, threads, metric, s, scores[0],
                round(statistics.median(t), 4), w.size_bytes,
            )
            for w, s, t in zip(workers, scores, latencies, strict=True)
        ]  # fmt: skip
    if keep is not None:
        result = results[precisions[0]]
        result.artifact.save(keep / f"{model}.gw", overwrite=True)
        measured = tuple(Measurement(f"{r.system} {r.precision}", r.score, r.size_bytes, r.latency_ms) for r in rows)
        replace(result.report, rows=measured, notes=()).save_html(keep / f"{model}.html")
    return Bench(tuple(rows), failures)


def _prepare(program: Program, batches: list | None, folder: Path, precisions: Sequence[str], progress) -> dict[str, Result]:
    """Writes float.onnx, samples.npz and our artifacts, all that the systems are built from; returns ours, float32 first."""
    canonical = PassManager().run(program, parse("canonicalize")).program
    export_onnx(canonical, folder / "float.onnx")
    data = Calibration.for_program(program, batches or [])
    names = [spec.name for spec in program.input_specs]
    columns = [torch.stack(column).numpy() for column in zip(*data.samples, strict=True)]
    arrays: dict[str, Any] = dict(zip(names, columns, strict=True))
    np.savez(folder / "samples.npz", **arrays)
    pipelines = {"float32": "canonicalize", "int8": None, FP8: fp8_pipeline(program)}
    pipelines |= {p: half_pipeline(program, p) for p in HALF_PRECISIONS}
    results = {}
    for precision in dict.fromkeys(("float32", *precisions)):
        data = batches if precision in CALIBRATED else None
        results[precision] = optimize(
            program, pipeline=pipelines[precision], calibration=data, measure=False, progress=progress
        )  # fmt: skip
        results[precision].artifact.save(folder / ARTIFACTS[precision])
    return results


def _scores(reference: ReferenceModel | None, workers: Sequence[Worker], count: int | None) -> list[float | None]:
    if reference is None:
        return [None] * len(workers)
    return list(reference.evaluate_all([single_output(w.predict) for w in workers], count))


def interleave(
    workers: Sequence[Worker], rounds: int, progress: Callable[[int, int, str], None], seconds: float = float("inf")
) -> list[list[float]]:
    """Times every system once a round, in turn, so that a drift of the machine's speed hits all alike; ms, one list a system.

    A turn is ten runs, or as many as fit TURN_SECONDS. After LEAST_ROUNDS rounds it ends where `seconds` have passed.
    """
    times: list[list[float]] = [[] for _ in workers]
    turns = []
    for worker in workers:
        (first,) = worker.time(warm_up=2, runs=1)
        runs = max(1, min(10, int(1e3 * TURN_SECONDS / first)))
        (settled,) = worker.time(warm_up=2 * runs - 2, runs=1)
        turns.append((max(1, runs // 3, int(1e3 * WARM_UP_SECONDS / settled)), runs))
    start = time.monotonic()
    for index in range(rounds):
        progress(index, rounds, "time systems")
        if index >= LEAST_ROUNDS and time.monotonic() - start > seconds:
            break
        for worker, collected, (warm_up, runs) in zip(workers, times, turns, strict=True):
            # Idle worker threads of the system before spin for a while and would take a core from this one.
            time.sleep(SETTLE_SECONDS)
            collected.extend(worker.time(warm_up=warm_up, runs=runs))
    progress(rounds, rounds, "time systems")
    return times


def score_column(metric: str) -> str:
    """Heading of the column of scores: a log-likelihood is shown as the perplexity it stands for."""
    return "perplexity" if metric == Metric.LOG_LIKELIHOOD else metric or "score"


def score_text(row: Row) -> str:
    """The score as its column shows it."""
    if row.score is None:
        return "-"
    return f"{perplexity(row.score):.3f}" if row.metric == Metric.LOG_LIKELIHOOD else f"{row.score:.4f}"


def table(bench: Bench) -> Table:
    """The rows with ratios to our int8 artifact, or to the first one asked for (above 1: slower than ours)."""
    rows = bench.rows
    result = Table(title=f"{rows[0].model}, batch {rows[0].batch}, {rows[0].threads} threads")
    for column in ("system", "precision", score_column(rows[0].metric), "latency", "vs ours", "size"):
        result.add_column(column, justify="left" if column in ("system", "precision") else "right")
    asked = [row for row in rows if row.system == "graphwright"][1:] or [rows[0]]
    base = next((row for row in asked if row.precision == "int8"), asked[0]).latency_ms
    for row in rows:
        size = f"{row.size_bytes / 1e6:.2f} MB" if row.size_bytes else "-"
        result.add_row(
            row.system, row.precision, score_text(row), f"{row.latency_ms:.3f} ms", f"{row.latency_ms / base:.2f}x", size
        )
    return result
