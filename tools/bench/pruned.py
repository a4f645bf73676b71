"""Smaller networks, measured: what pruning does to latency, and what quantization costs after it.

python -m graphwright.tools.bench.tables pruned-latency resnet20-x4 -p 'canonicalize,prune-channels{ratio=0.3}'
python -m graphwright.tools.bench.tables pruned-latency resnet20 --file networks/taylor-global.onnx --file networks/thinet.onnx
python -m graphwright.tools.bench.tables pruned-int8 resnet20 -p 'canonicalize,prune-channels{ratio=0.3}'
python -m graphwright.tools.bench.tables pruned-int8 resnet20 --file recovered/resnet20-1.onnx
python -m graphwright.tools.bench.tables recovery rows.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...backends.base import example_inputs
from ...backends.loader import load
from ...backends.registry import backend_for
from ...backends.target import Target
from ...backends.tvm.executor import load_bytes
from ...ir.data import Calibration
from ...ir.errors import DataError, OptionError
from ...ir.load import load_program
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import parse
from ...search.cost.bops import products
from ..optimize import optimize
from ..predict import program_predict, single_output
from ..progress import TerminalProgress
from ..quick import PRECISIONS, quick_program
from ..recover import PERPLEXITY, Row
from ..sources import Source, resolve
from . import SETTLE_SECONDS
from .exactness import Count, run_here, take_samples
from .markdown import machine, markdown

Progress = Callable[[int, int, str], None]

#: Calibration samples of the passes, pruning included.
CALIBRATION_SAMPLES = 1024
#: Runs a turn; turns of both programs alternate.
RUNS = 10


@dataclass(frozen=True)
class Latency:
    """One network in one precision; milliseconds of the median run, and of the fastest one. macs: share of the original's."""

    network: str
    precision: str
    macs: float
    median: float
    least: float


@dataclass(frozen=True)
class Quantized:
    """Scores of the original, of the smaller float program and of its int8 artifact; inputs equal in every bit."""

    metric: str
    macs: float
    original: float
    smaller: float
    integer: float
    equal: Count


def smaller_program(source: Source, pipeline: str | None, file: Path | None, progress: Progress) -> Program:
    """The program a pipeline makes of the reference model, or a file that holds it already."""
    if (pipeline is None) == (file is None):
        raise OptionError("give the pipeline that makes the network smaller (-p), or a file that holds it (--file)")
    if file is not None:
        program = load_program(file)
        if [s.shape for s in program.input_specs] != [s.shape for s in source.program.input_specs]:
            raise DataError(f"'{file}' takes {program.input_specs}, but {source.program.name} {source.program.input_specs}")
        return program
    data = Calibration.for_program(source.program, source.calibration(None, CALIBRATION_SAMPLES) or [])
    context = PassContext(calibration=data, progress=progress)
    return PassManager().run(source.program, parse(pipeline or ""), context).program


def macs_left(source: Source, smaller: Program) -> float:
    """Share of the multiply-accumulates."""
    programs = [quick_program(Source(program), "float32") for program in (source.program, smaller)]
    whole, left = (sum(work.macs for work in products(program)) for program in programs)
    return left / whole


def measure_latency(source: Source, smaller: Mapping[str, Program], rounds: int, progress: Progress) -> list[Latency]:
    """Times the original and the smaller networks in turn, in float and as quickly quantized int8, in this process."""
    backend, target = backend_for(Target.parse("cpu")), Target.parse("cpu")
    networks = {"original": source.program, **smaller}
    rows = []
    for precision in PRECISIONS:
        programs = [quick_program(Source(p, source.reference), precision, progress) for p in networks.values()]
        runs = [load_bytes(backend.compile(program, target, progress).library) for program in programs]
        inputs = [x.numpy() for x in example_inputs(source.program)]
        times: list[list[float]] = [[] for _ in runs]
        for index in range(rounds):
            progress(index, rounds, f"time {precision}")
            for run, collected in zip(runs, times, strict=True):
                time.sleep(SETTLE_SECONDS)
                for turn in range(2 * RUNS):
                    start = time.perf_counter()
                    run(*inputs)
                    if turn >= RUNS:  # the first half wakes the workers and fills the caches
                        collected.append((time.perf_counter() - start) * 1e3)
        progress(rounds, rounds, f"time {precision}")
        for (name, program), found in zip(networks.items(), times, strict=True):
            rows.append(Latency(name, precision, macs_left(source, program), statistics.median(found), min(found)))
    return rows


def measure_int8(source: Source, smaller: Program, inputs: int, evaluate: int | None, progress: Progress) -> Quantized:
    """Quantizes the smaller program by the default pipeline; scores all three, and compares artifact and torch reference."""
    reference = source.reference
    if reference is None:
        raise DataError(f"'{source.program.name}' brings no data along; name a reference model")
    result = optimize(smaller, calibration=source.calibration(None, 512), measure=False, progress=progress)
    predicts = [single_output(program_predict(p)) for p in (source.program, smaller, result.program)]
    original, score, integer = reference.evaluate_all(predicts, evaluate)
    equal = Count(inputs)
    samples, _ = take_samples(source, inputs)
    with tempfile.TemporaryDirectory() as folder:
        result.artifact.save(Path(folder) / "int8.gw")
        loaded = load(Path(folder) / "int8.gw")
        expected = [[y.numpy() for y in result.program(*sample)] for sample in samples]
        equal.add(expected, run_here(loaded, samples))
    return Quantized(reference.metric_name, macs_left(source, smaller), original, score, integer, equal)


def pruned_latency(
    model: str,
    pipeline: Annotated[list[str], typer.Option("--pipeline", "-p", help="Makes the network smaller; repeatable.")] = [],  # noqa: B006
    file: Annotated[list[Path], typer.Option(help="An ONNX file that holds a smaller network; repeatable.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Turns of each program.")] = 20,
) -> None:
    """Latency of a network and of the smaller ones made of it, float and int8, all in interleaved turns."""
    if not pipeline and not file:
        raise OptionError("give pipelines that make the network smaller (-p), or files that hold smaller ones (--file)")
    source = resolve(model)
    with TerminalProgress() as progress:
        smaller = {text: smaller_program(source, text, None, progress) for text in pipeline}
        smaller |= {path.stem: smaller_program(source, None, path, progress) for path in file}
        rows = measure_latency(source, smaller, rounds, progress)
    typer.echo(f"\n{model}, batch 1; {machine()}\n")
    head = ["network", "precision", "MACs", "median (least) ms", "median (least) of the original's"]
    original = {row.precision: row for row in rows if row.network == "original"}
    body = [
        [
            row.network, row.precision, f"{row.macs:.3f}x", f"{row.median:.3f} ({row.least:.3f})",
            f"{row.median / original[row.precision].median:.2f}x ({row.least / original[row.precision].least:.2f}x)",
        ]
        for row in rows
    ]  # fmt: skip
    typer.echo(markdown(head, body))


def pruned_int8(
    model: str,
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Makes the network smaller.")] = None,
    file: Annotated[Path | None, typer.Option(help="Instead: an ONNX file that holds the smaller network.")] = None,
    inputs: Annotated[int, typer.Option(help="Inputs whose every output bit is compared.")] = 1000,
    evaluate: Annotated[int, typer.Option(help="Evaluation samples; 0: all.")] = 0,
) -> None:
    """What 8 bits cost a network that was made smaller, and whether its artifact equals the reference bit for bit."""
    source = resolve(model)
    with TerminalProgress() as progress:
        found = measure_int8(source, smaller_program(source, pipeline, file, progress), inputs, evaluate or None, progress)
    typer.echo(f"\n{model}, {pipeline or file}; {machine()}\n")
    head = ["MACs", f"float, {found.metric}", "smaller float", "smaller int8", "points lost by int8", "inputs equal in every bit"]
    scores = [f"{score:.4f}" for score in (found.original, found.smaller, found.integer)]
    lost = f"{100 * (found.smaller - found.integer):.2f}"
    typer.echo(markdown(head, [[f"{found.macs:.3f}x", *scores, lost, str(found.equal)]]))


def lost(row: Row) -> str:
    """Points lost without and with recovery; what a perplexity grew by, in percent."""
    return ", ".join(
        f"{100 * (score / row.float_score - 1):.1f}%" if row.metric == PERPLEXITY else f"{100 * (row.float_score - score):.2f}"
        for score in (row.before, row.after)
    )


def recovery(rows: Annotated[Path, typer.Argument(help="Written by python -m graphwright.tools.recover --json.")]) -> None:
    """What distillation won back: a table of the rows that `tools.recover` wrote."""
    found = [Row(**row) for row in json.loads(rows.read_text())]
    head = ["model", "pipeline", "recipe", "split", "MACs", "float", "without", "with", "points lost without, with", "s"]
    body = [
        [
            r.model, f"`{r.pipeline}`", f"`{r.recipe}`", r.split, f"{r.macs:.3f}x",
            *(f"{score:.4f}" for score in (r.float_score, r.before, r.after)),
            lost(r), f"{r.seconds:.0f} ({r.device})",
        ]
        for r in found
    ]  # fmt: skip
    typer.echo(markdown(head, body))


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command of all tables."""
    for verb in (pruned_latency, pruned_int8, recovery):
        app.command()(verb)
