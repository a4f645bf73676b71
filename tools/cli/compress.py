"""Verbs that compress: optimize, rewrite, and the list of passes."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ...ir.errors import OptionError
from .options import (
    Cache,
    Calibration,
    Checkpoints,
    Device,
    DryRun,
    Dump,
    Finetune,
    FinetuneData,
    FinetuneSamples,
    Formats,
    Labels,
    Minimize,
    ModelArgument,
    Overwrite,
    Ratio,
    Samples,
    Scorer,
    Seed,
    Shapes,
    app,
    batches_of,
    check_outputs,
    data_text,
    err,
    finetune_of,
    out,
    ratio,
    search_of,
    settings,
)


@app.command()
def optimize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact to write (.gw).")],
    target: Annotated[str, typer.Option(help="cpu, x86[:level], arm64[:core] or cuda[:chip]; see `targets`.")] = "cpu",
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Default: 8 bits, fewer where limits ask.")] = None,
    calibration: Calibration = None,
    samples: Samples = 512,
    max_drop: Annotated[float | None, typer.Option(min=0, help="Largest loss of the score (reference models).")] = None,
    size: Ratio = None,
    latency: Ratio = None,
    bops: Ratio = None,
    macs: Annotated[str | None, typer.Option(help="Most multiply-accumulates, 0.5x, or a number: channels are cut.")] = None,
    average_bits: Annotated[float | None, typer.Option(min=0, help="Most bits of a weight on average.")] = None,
    minimize: Minimize = None,
    formats: Formats = None,
    scorer: Scorer = None,
    solver: Annotated[str | None, typer.Option(help="Of the bit search: ilp, dynamic, greedy or evolutionary.")] = None,
    labels: Labels = None,
    cache: Cache = None,
    finetune: Finetune = None,
    finetune_data: FinetuneData = None,
    finetune_samples: FinetuneSamples = None,
    checkpoints: Checkpoints = None,
    device: Device = None,
    evaluate: Annotated[int, typer.Option(min=0, help="Evaluation samples of a reference model; 0: none.")] = 1000,
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
    from ...backends.registry import backend_for
    from ...backends.target import Target
    from ...ir.files import write_atomically
    from ...passes.manager import Dump as DumpInstrument
    from ...passes.pipeline import parse
    from ...passes.prune.prune_channels import PruneChannels
    from ..channels import with_channels
    from ..defaults import default_pipeline
    from ..finetune import with_distill
    from ..optimize import optimize as run
    from ..progress import TerminalProgress
    from ..sources import parse_shapes, resolve

    if pipeline is not None:
        parse(pipeline)  # a wrong text is an error before the model is read
    ratios = {"size": size, "latency": latency, "bops": bops, "macs": macs}
    limits = {name: ratio(text, name) for name, text in ratios.items() if text is not None}
    limits |= {k: v for k, v in (("max_drop", max_drop), ("average_bits", average_bits)) if v is not None}
    chosen = Target.parse(target)
    backend_for(chosen)
    check_outputs((model, calibration, finetune_data, labels), (output, report, plan), overwrite, (dump, cache, checkpoints))
    source = resolve(model, parse_shapes(input_shape))
    passes = parse(default_pipeline(source.program) if pipeline is None else pipeline)
    if "macs" in limits and not any(isinstance(p, PruneChannels) for p in passes):
        passes = with_channels(passes, PruneChannels())
    search = search_of(source, samples, formats, scorer, solver, minimize, labels, calibration, cache)
    search.check()  # before calibration samples are read or made
    batches = batches_of(source, passes, calibration, samples)
    tuning = finetune_of(source, finetune, passes, finetune_data, finetune_samples, checkpoints, device)
    passes = passes if tuning is None else with_distill(passes, tuning.recipe)
    settings(
        "optimize", model=source.program.name, inputs=", ".join(map(str, source.program.input_specs)), target=chosen,
        pipeline=passes, calibration=data_text(calibration, samples, batches),
        limits=limits or "none", output=output, seed=seed,
    )  # fmt: skip
    if dry_run:
        err.print("dry run: nothing was written")
        return
    with TerminalProgress(err) as progress:
        result = run(
            source.program, str(chosen), calibration=batches, evaluate=source.evaluate(evaluate) if evaluate else None,
            constraints=limits, pipeline=pipeline, search=search, finetune=tuning, measure=measure, seed=seed, progress=progress,
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
    finetune_data: FinetuneData = None,
    finetune_samples: FinetuneSamples = None,
    checkpoints: Checkpoints = None,
    device: Device = None,
    certificate: Annotated[Path | None, typer.Option(help="Also write the certificate (JSON).")] = None,
    print_after: Annotated[list[str], typer.Option(help="Print the program after this pass; repeatable.")] = [],  # noqa: B006
    dump: Dump = None,
    seed: Seed = 0,
    input_shape: Shapes = [],  # noqa: B006
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Run a pass pipeline over MODEL and write it back as ONNX.

    Float programs as they are, quantized ones as QDQ, and what `lower-integer` leaves as operators with one result: a runtime
    that computes each operator as the standard says gives the artifact's bits then.
    """
    from ...ir.data import Calibration as Samples_
    from ...ir.files import write_atomically
    from ...ir.onnx_export import export_onnx
    from ...ir.printer import print_program
    from ...passes.base import PassContext, Training, find
    from ...passes.manager import Dump as DumpInstrument
    from ...passes.manager import PassManager, PrintAfter
    from ...passes.pipeline import parse
    from ..optimize import PassProgress
    from ..plan import Plan
    from ..progress import TerminalProgress
    from ..sources import parse_shapes, resolve

    if (pipeline is None) == (plan is None):
        raise OptionError("rewrite takes a pipeline (-p) or a plan (--plan), exactly one of them")
    replay = Plan.read(plan) if plan is not None else None
    passes = parse(replay.pipeline if replay else pipeline or "")
    seed = replay.seed if replay else seed
    for name in print_after:
        find(name)
    check_outputs((model, calibration, finetune_data, plan), (output, certificate), overwrite, (dump, checkpoints))
    source = resolve(model, parse_shapes(input_shape))
    if replay is not None:
        replay.require_model(source.program)
    batches = batches_of(source, passes, calibration, samples)
    data = None if batches is None else Samples_.for_program(source.program, batches)
    tuning = finetune_of(source, None, passes, finetune_data, finetune_samples, checkpoints, device)
    training = Training() if tuning is None else tuning.training(source.program)
    settings("rewrite", model=source.program.name, pipeline=passes, output=output or "printed", seed=seed)
    if dry_run:
        err.print("dry run: nothing was written")
        return
    with TerminalProgress(err) as progress:
        instruments = [PassProgress(progress), PrintAfter(print_after, write=lambda t: out.print(t, markup=False))]
        if dump is not None:
            instruments.append(DumpInstrument(dump))
        context = PassContext(calibration=data, training=training, seed=seed, progress=progress)
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
    from ...passes.base import registry
    from ...passes.pipeline import type_text, value_text

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
