"""`graphwright`: the command line. Thin verbs over the library; every expected failure prints one message and exits with 1."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..ir.errors import GraphwrightError, OptionError
from .interrupt import kept_interrupt

if TYPE_CHECKING:
    from ..passes.pipeline import Pipeline
    from .sources import Source

app = typer.Typer(
    name="graphwright", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compress a trained network with verified passes and compile it to one deployable artifact.",
)  # fmt: skip
out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="An .onnx file, a .pt2 archive, or a reference model's name.")]
Calibration = Annotated[Path | None, typer.Option(help="Samples, .npz (one array an input) or .npy.")]
Shapes = Annotated[list[str], typer.Option("--input-shape", help="ONNX input shape, NAME=1x3x224x224; repeatable.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print what would be done; write nothing.")]
Dump = Annotated[Path | None, typer.Option(help="Folder for numbered program dumps, one a pass.")]
Samples = Annotated[int, typer.Option(help="Calibration samples of a reference model.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def _settings(title: str, **values: Any) -> None:
    """Echoes what the options resolved to."""
    err.print(f"[bold]{title}[/bold]")
    for key, value in values.items():
        err.print(f"  {key.replace('_', ' '):<12} {value}", highlight=False, markup=False)


def _check_outputs(reads: Sequence[str | Path | None], outputs: Sequence[Path | None], overwrite: bool) -> None:
    """Refuses outputs that cannot be written, that are one and the same, or that would replace what this run reads."""
    from ..ir.errors import OutputError
    from ..ir.files import check_output

    taken = {Path(path).resolve(): "an input" for path in reads if path is not None}
    for path in outputs:
        if path is None:
            continue
        check_output(path, overwrite)
        place = path.resolve()
        if place in taken:
            raise OutputError(f"'{path}' is {taken[place]} of this run; choose another name")
        taken[place] = "another output"


def _calibration(source: Source, passes: Pipeline, path: Path | None, samples: int) -> list | None:
    """Batches for the pipeline, checked against the model's inputs; None where there are none and no pass needs them."""
    from ..ir.data import Calibration as Samples_
    from ..passes.base import PassContext

    batches = source.calibration(path, samples)
    context = PassContext(None if batches is None else Samples_.for_program(source.program, batches))
    for instance in passes:
        if instance.needs_calibration:
            context.require_calibration(instance.name)
    return batches


@app.command()
def optimize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact to write (.gw).")],
    target: Annotated[str, typer.Option(help="cpu, x86[:level] or arm64[:core].")] = "cpu",
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Pass pipeline; default: int8 quantization.")] = None,
    calibration: Calibration = None,
    samples: Samples = 512,
    max_drop: Annotated[float | None, typer.Option(help="Largest loss of the score (reference models).")] = None,
    size: Annotated[float | None, typer.Option(help="Largest artifact size over the float parameters.")] = None,
    latency: Annotated[float | None, typer.Option(help="Largest latency over the float artifact's.")] = None,
    evaluate: Annotated[int, typer.Option(help="Evaluation samples of a reference model; 0: none.")] = 1000,
    measure: Annotated[bool, typer.Option(help="Time the float program and the result here.")] = True,
    report: Annotated[Path | None, typer.Option(help="Also write the HTML report.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Also write the plan (JSON) that replays this run.")] = None,
    dump: Dump = None,
    seed: Seed = 0,
    input_shape: Shapes = [],  # noqa: B006 (typer reads the default, nothing writes to it)
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Compress MODEL, compile it for a target, and write one artifact."""
    from ..backends.registry import backend_for
    from ..backends.target import Target
    from ..ir.files import write_atomically
    from ..passes.manager import Dump as DumpInstrument
    from ..passes.pipeline import parse
    from .optimize import DEFAULT_PIPELINE
    from .optimize import optimize as run
    from .progress import TerminalProgress
    from .sources import parse_shapes, resolve

    passes = parse(pipeline or DEFAULT_PIPELINE)
    chosen = Target.parse(target)
    backend_for(chosen)
    _check_outputs((model, calibration), (output, report, plan), overwrite)
    source = resolve(model, parse_shapes(input_shape))
    batches = _calibration(source, passes, calibration, samples)
    limits = {k: v for k, v in (("max_drop", max_drop), ("size", size), ("latency", latency)) if v is not None}
    _settings(
        "optimize", model=source.program.name, inputs=", ".join(map(str, source.program.input_specs)), target=chosen,
        pipeline=passes, calibration=calibration or (f"{samples} of the reference data" if batches else "none"),
        limits=limits or "none", output=output, seed=seed,
    )  # fmt: skip
    if dry_run:
        err.print("dry run: nothing was written")
        return
    with TerminalProgress(err) as progress:
        result = run(
            source.program, str(chosen), calibration=batches, evaluate=source.evaluate(evaluate) if evaluate else None,
            constraints=limits, pipeline=passes, measure=measure, seed=seed, progress=progress,
            instruments=[DumpInstrument(dump)] if dump else [],
        )  # fmt: skip
    for table in result.report.tables():
        out.print(table)
    for note in result.report.notes:
        out.print(f"note: {note}", highlight=False)
    result.artifact.save(output, overwrite=overwrite)
    if report is not None:
        result.report.save_html(report)
    if plan is not None:
        write_atomically(plan, (json.dumps(result.plan.to_json(), indent=2) + "\n").encode())
    out.print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")


@app.command()
def rewrite(
    model: ModelArgument,
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Pass pipeline text.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Take pipeline and seed from a plan.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="ONNX file to write; none: print the program.")] = None,
    calibration: Calibration = None,
    samples: Samples = 512,
    certificate: Annotated[Path | None, typer.Option(help="Also write the certificate (JSON).")] = None,
    print_after: Annotated[list[str], typer.Option(help="Print the program after this pass; repeatable.")] = [],  # noqa: B006
    dump: Dump = None,
    seed: Seed = 0,
    input_shape: Shapes = [],  # noqa: B006
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Run a pass pipeline over MODEL and write it back as ONNX (float, or QDQ once quantized)."""
    from ..ir.data import Calibration as Samples_
    from ..ir.files import write_atomically
    from ..ir.onnx_export import export_onnx
    from ..ir.printer import print_program
    from ..passes.base import PassContext, find
    from ..passes.manager import Dump as DumpInstrument
    from ..passes.manager import PassManager, PrintAfter
    from ..passes.pipeline import parse
    from .optimize import PassProgress
    from .plan import Plan
    from .progress import TerminalProgress
    from .sources import parse_shapes, resolve

    if (pipeline is None) == (plan is None):
        raise OptionError("rewrite takes a pipeline (-p) or a plan (--plan), exactly one of them")
    replay = Plan.read(plan) if plan is not None else None
    passes = parse(replay.pipeline if replay else pipeline or "")
    seed = replay.seed if replay else seed
    for name in print_after:
        find(name)
    _check_outputs((model, calibration, plan), (output, certificate), overwrite)
    source = resolve(model, parse_shapes(input_shape))
    batches = _calibration(source, passes, calibration, samples)
    data = None if batches is None else Samples_.for_program(source.program, batches)
    _settings("rewrite", model=source.program.name, pipeline=passes, output=output or "printed", seed=seed)
    if dry_run:
        err.print("dry run: nothing was written")
        return
    with TerminalProgress(err) as progress:
        instruments = [PassProgress(progress), PrintAfter(print_after, write=lambda t: out.print(t, markup=False))]
        if dump is not None:
            instruments.append(DumpInstrument(dump))
        context = PassContext(calibration=data, seed=seed, progress=progress)
        result = PassManager(instruments).run(source.program, passes, context)
    if output is None:
        out.print(print_program(result.program), markup=False, highlight=False, soft_wrap=True)
    else:
        export_onnx(result.program, output)
        err.print(f"wrote {output}")
    if certificate is not None:
        rows = [row.to_json() for row in result.certificate]
        write_atomically(certificate, (json.dumps(rows, indent=2) + "\n").encode())


@app.command()
def passes(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the passes with their options and declared effects."""
    from ..passes.base import registry
    from ..passes.pipeline import type_text, value_text

    rows = []
    for name, cls in registry().items():
        hints = typing.get_type_hints(cls)
        options = [
            {
                "name": f.name,
                "type": type_text(hints[f.name]),
                "default": f.default_factory() if callable(f.default_factory) else f.default,  # type: ignore[misc]
            }
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        rows.append({"name": name, "effect": str(cls.effect), "options": options, "summary": summary})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("pass", "effect", "options (default)", "what it does")
    for row in rows:
        options = "\n".join(f"{o['name']}: {o['type']} ({value_text(o['default'])})" for o in row["options"])
        table.add_row(row["name"], row["effect"], options, row["summary"])
    out.print(table)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A model, or an artifact (.gw).")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    input_shape: Shapes = [],  # noqa: B006
) -> None:
    """Print a model's program, or an artifact's manifest and certificate."""
    if path.endswith(".gw"):
        from ..backends.artifact import Artifact

        artifact = Artifact.load(path)
        manifest = artifact.manifest.model_dump()
        if as_json:
            typer.echo(json.dumps({"manifest": manifest, "certificate": artifact.certificate}, indent=2))
            return
        out.print_json(json.dumps(manifest))
        table = Table("pass", "effect", "max |diff|", "stage", title="certificate")
        for row in artifact.certificate:
            table.add_row(row["text"], row["effect"], f"{row['max_abs']:.3g}", row["stage"])
        out.print(table)
        return
    from ..ir.printer import print_program
    from .sources import parse_shapes, resolve

    program = resolve(path, parse_shapes(input_shape)).program
    if as_json:
        ops: dict[str, int] = {}
        for node in program.nodes:
            if node.op == "call_function":
                ops[str(node.target)] = ops.get(str(node.target), 0) + 1
        specs = {"inputs": [str(s) for s in program.input_specs], "outputs": [str(s) for s in program.output_specs]}
        typer.echo(json.dumps({"name": program.name, "stage": program.stage.label, **specs, "ops": ops}, indent=2))
        return
    out.print(print_program(program), markup=False, highlight=False, soft_wrap=True)


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="An artifact (.gw).")],
    inputs: Annotated[Path, typer.Option("--input", "-i", help=".npz (one array an input) or .npy.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help=".npz to write; none: print a summary.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run an artifact on inputs from a file."""
    import io

    import numpy as np

    from ..backends.loader import load
    from ..ir.files import check_output, write_atomically
    from .sources import read_arrays

    if output is not None:
        check_output(output, overwrite)
    model = load(artifact)
    arrays = read_arrays(inputs, [spec.name for spec in model.input_specs], model.manifest.name)
    results = model(*arrays)
    results = results if isinstance(results, tuple) else (results,)
    if output is None:
        for index, value in enumerate(results):
            flat = np.asarray(value).ravel()
            out.print(
                f"output {index}: {value.dtype}{list(value.shape)} first {flat[:8]} argmax {int(flat.argmax())}", highlight=False
            )
        return
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"output{i}": v for i, v in enumerate(results)}
    np.savez(buffer, **named)
    write_atomically(output, buffer.getvalue())


@app.command()
def targets() -> None:
    """List targets: what this build can emit, what this machine can run, and what is missing for the rest."""
    from ..backends.tvm.backend import TVMBackend

    table = Table("target", "emits", "runs here", "missing")
    for info in TVMBackend().targets():
        table.add_row(str(info.target), "yes" if info.emits else "no", "yes" if info.runs else "no", info.missing)
    out.print(table)


@app.command()
def bench(
    model: ModelArgument,
    peers: Annotated[
        str,
        typer.Option(help="Comma-separated: ort, ort-int8, ort-dynamic, openvino, openvino-f32, openvino-nncf, torch-compile."),
    ] = "",
    threads: Annotated[int, typer.Option(help="Threads of every system.")] = 2,
    rounds: Annotated[int, typer.Option(help="Interleaved timing rounds.")] = 20,
    samples: Samples = 512,
    evaluate: Annotated[int, typer.Option(help="Evaluation samples; 0: all.")] = 0,
    profile: Annotated[bool, typer.Option("--profile", help="Instead: time of every kernel beside its floor.")] = False,
    precision: Annotated[str, typer.Option(help="Of the profiled program: int8 or float32.")] = "int8",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the rows.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Measure accuracy and latency of float, ours and peers in one interleaved run, or profile our program kernel by kernel."""
    from ..ir.files import check_output, write_atomically
    from .bench import check_peers, run_bench, table
    from .progress import TerminalProgress
    from .sources import resolve

    if as_json is not None:
        check_output(as_json, overwrite)
    if profile:
        _profile(model, precision, threads, rounds, as_json, dry_run)
        return
    names = [p for p in peers.split(",") if p]
    check_peers(names)
    _settings("bench", model=model, peers=", ".join(names) or "none", threads=threads, rounds=rounds, evaluate=evaluate or "all")
    if dry_run:
        resolve(model)
        err.print("dry run: nothing was measured or written")
        return
    with TerminalProgress(err) as progress:
        result = run_bench(model, names, threads, rounds, samples, evaluate or None, progress)
    out.print(table(result))
    for peer, reason in result.failures.items():
        err.print(f"{peer} did not run: {reason}", markup=False, highlight=False)
    if as_json is not None:
        write_atomically(as_json, (json.dumps([dataclasses.asdict(r) for r in result.rows], indent=2) + "\n").encode())


def _profile(model: str, precision: str, threads: int, rounds: int, as_json: Path | None, dry_run: bool) -> None:
    from ..ir.files import write_atomically
    from .bench import profile as bench_profile
    from .progress import TerminalProgress
    from .quick import check_precision

    check_precision(precision)
    _settings("profile", model=model, precision=precision, threads=threads, runs=rounds * bench_profile.RUNS_A_ROUND)
    if dry_run:
        err.print("dry run: nothing was measured or written")
        return
    with TerminalProgress(err) as progress:
        found = bench_profile.profile_model(model, precision, threads, rounds, progress)
    wide = Console(width=max(out.width, 120))  # one line a kernel, also where the output is no terminal
    for columns, rows in (
        (bench_profile.STEP_COLUMNS, bench_profile.step_rows(found)),
        (bench_profile.KIND_COLUMNS, bench_profile.kind_rows(found)),
    ):
        table = Table(*(Column(name, justify="left" if i < 2 else "right") for i, name in enumerate(columns)))
        for row in rows:
            table.add_row(*row)
        wide.print(table)
    out.print(
        f"one run: {found.total / 1e3:.3f} ms (median), floor of its kernels {found.floor / 1e3:.3f} ms\n"
        f"{found.peaks.text}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if as_json is not None:
        write_atomically(as_json, (json.dumps(found.to_json(), indent=1) + "\n").encode())


@app.command()
def tune(
    models: Annotated[list[str] | None, typer.Argument(help="Model files or reference models' names.")] = None,
    all_zoo: Annotated[bool, typer.Option("--all-zoo", help="Every reference model.")] = False,
    target: Annotated[str, typer.Option(help="cpu or x86[:level]; it must run here.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads the kernels are tuned for; 0: every core.")] = 0,
    precision: Annotated[list[str], typer.Option(help="int8 or float32; repeatable.")] = ["int8"],  # noqa: B006
    budget: Annotated[float, typer.Option(help="Minutes; what is left over waits for the next run.")] = 30.0,
    database: Annotated[Path | None, typer.Option(help="Rows are kept here; default: the user's own database.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure kernels anew that have a row.")] = False,
    compare: Annotated[bool, typer.Option(help="Time each whole model with the guesses and with its rows.")] = True,
    dry_run: DryRun = False,
) -> None:
    """Measure how the kernels of MODELS are best cut on this machine. Ctrl-C is safe: finished kernels are kept."""
    from ..backends.host import host_threads
    from ..backends.target import Target
    from ..backends.tvm.target import require_run
    from . import tune as tuning
    from . import zoo
    from .progress import TerminalProgress
    from .quick import check_precision, quick_program
    from .sources import resolve

    names = list(zoo.names()) if all_zoo else list(models or [])
    if not names or (all_zoo and models):
        raise OptionError("tune takes MODELS or --all-zoo, exactly one of them")
    for name in precision:
        check_precision(name)
    chosen, threads = Target.parse(target), threads or host_threads()
    require_run(chosen)
    path = database or tuning.default_path(chosen)
    _settings(
        "tune", models=", ".join(names), target=chosen, threads=threads, precision=", ".join(precision),
        budget=f"{budget:g} min", database=path,
    )  # fmt: skip
    with TerminalProgress(err) as progress:
        programs = {(n, p): quick_program(resolve(n), p, progress) for n in names for p in precision}
        kernels = {k.key: k for program in programs.values() for k in tuning.kernels_of(program, chosen)}
        if dry_run:
            for key in kernels:
                out.print(key, highlight=False, markup=False)
            err.print(f"dry run: {len(kernels)} kernels; nothing was measured or written")
            return
        outcome = tuning.tune(list(kernels.values()), chosen, threads, path, budget, again, progress)
    table = Table("kernel", "guess (us)", "tuned (us)", "choice")
    for row in outcome.measured:
        choice = " ".join(f"{k}={v}" for k, v in row.choice.items()) if row.choice else "the guess"
        table.add_row(row.key, f"{row.guess_microseconds:.1f}", f"{row.microseconds:.1f}", choice)
    Console(width=max(out.width, 120)).print(table)
    out.print(f"{len(outcome.measured)} kernels measured, {outcome.kept} had rows, {outcome.remaining} remain", highlight=False)
    for (name, kind), program in programs.items() if compare and not outcome.remaining else ():
        found = tuning.end_to_end(program, chosen, threads, path)
        out.print(
            f"{name} {kind}: guess {found.guess[0]:.3f} ms (median {found.guess[1]:.3f}), "
            f"tuned {found.tuned[0]:.3f} ms (median {found.tuned[1]:.3f})", highlight=False,
        )  # fmt: skip


def main() -> None:
    """Entry point: expected errors are one message on stderr and exit status 1; Ctrl-C exits with 130."""
    try:
        with kept_interrupt():
            app()
    except GraphwrightError as error:
        err.print(f"[bold red]error:[/bold red] {type(error).__name__}: ", end="")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted: nothing half-written is left behind")
        sys.exit(130)


if __name__ == "__main__":
    main()
