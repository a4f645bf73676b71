"""The verbs that show what a search knows: analyze for bits, ranks for factorizations, channels for pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .options import Cache, Calibration, Formats, Labels, ModelArgument, Overwrite, Samples, Seed, Shapes, app, err, out, settings


@app.command()
def analyze(
    model: ModelArgument,
    scorers: Annotated[str, typer.Option(help="Comma-separated scorers, or all that the data at hand allows.")] = "all",
    formats: Formats = None,
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Its passes before quantize run first.")] = None,
    calibration: Calibration = None,
    samples: Samples = 64,
    labels: Labels = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the scores (JSON).")] = None,
    cache: Cache = None,
    seed: Seed = 0,
    input_shape: Shapes = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Score every layer of MODEL in every weight format: what would be lost, with a 95% interval."""
    from ...ir.files import write_atomically
    from ...passes.pipeline import parse
    from ...search.sensitivity import scorer_text
    from ...search.sensitivity.statistics import calibration_warning
    from ..analyze import analyze as run
    from ..analyze import chosen_scorers
    from ..defaults import search_pipeline
    from ..progress import TerminalProgress
    from ..sources import parse_shapes, resolve
    from .options import batches_of, check_outputs, data_text, search_of

    check_outputs((model, calibration, labels), (output,), overwrite, (cache,))
    named = chosen_scorers(scorers, with_samples=True, with_labels=True)  # a wrong name is an error before the model is read
    source = resolve(model, parse_shapes(input_shape))
    passes = parse(pipeline or search_pipeline(source.program))
    options = search_of(source, samples, formats, None, None, None, labels, calibration, cache)
    for scorer in named if scorers != "all" else ():
        scorer.require_labels(options.labels)  # before calibration samples are read or made
    batches = batches_of(source, passes, calibration, samples)
    chosen = chosen_scorers(scorers, with_samples=batches is not None, with_labels=options.labels is not None)
    settings(
        "analyze", model=source.program.name, scorers=", ".join(map(scorer_text, chosen)), formats=", ".join(options.formats),
        calibration=data_text(calibration, samples, batches), pipeline=passes, seed=seed,
    )  # fmt: skip
    with TerminalProgress(err) as progress:
        tables = run(source.program, passes, chosen, options, batches, seed, progress)
    for scores in tables:
        table = Table("layer", *scores.choices, title=f"{scores.scorer} ({scores.count} samples, {scores.seconds:.1f} s)")
        for layer, loss, half_width in zip(scores.layers, scores.loss, scores.half_width, strict=True):
            table.add_row(layer, *(f"{value:.3g} ± {half:.1g}" for value, half in zip(loss, half_width, strict=True)))
        out.print(table)
        warning = calibration_warning(scores)
        if warning is not None:
            err.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    if output is not None:
        write_atomically(output, (json.dumps([s.to_json() for s in tables], indent=1) + "\n").encode())
        err.print(f"wrote {output}")


@app.command()
def ranks(
    model: ModelArgument,
    size: Annotated[str | None, typer.Option(help="Most parameter bytes, relative: 0.7 or 0.7x.")] = None,
    macs: Annotated[str | None, typer.Option(help="Most multiply-accumulates, relative.")] = None,
    latency: Annotated[str | None, typer.Option(help="Most time of a run, relative, from kernels timed here.")] = None,
    pipeline: Annotated[
        str, typer.Option("--pipeline", "-p", help="With one factorization pass, whose ranks are searched.")
    ] = "canonicalize,factorize-whitened-svd",
    target: Annotated[str, typer.Option(help="Whose kernels the ranks suit; with --latency it must run here.")] = "cpu",
    calibration: Calibration = None,
    samples: Samples = 64,
    cache: Cache = None,
    seed: Seed = 0,
    input_shape: Shapes = [],  # noqa: B006
) -> None:
    """Choose the rank of every layer of MODEL within limits, and print the pipeline that makes them."""
    from ...backends.cache import cache_folder
    from ...ir.data import Calibration as Samples_
    from ...passes.pipeline import parse
    from ...search.planner import Surroundings
    from ...search.ranks import WHOLE
    from ...search.store import Store
    from ..progress import TerminalProgress
    from ..ranks import plan_ranks
    from ..sources import parse_shapes, resolve
    from .options import batches_of, check_outputs, data_text, limits_of, limits_text

    check_outputs((), (), folders=(cache,))
    limits = limits_of("--size 0.7, --macs 0.7 or --latency 0.8", size=size, macs=macs, latency=latency)
    passes = parse(pipeline)
    source = resolve(model, parse_shapes(input_shape))
    batches = batches_of(source, passes, calibration, samples)
    settings(
        "ranks", model=source.program.name, limits=limits_text(limits),
        pipeline=passes, target=target,
        calibration=data_text(calibration, samples, batches), seed=seed,
    )  # fmt: skip
    with TerminalProgress(err) as progress:
        data = None if batches is None else Samples_.for_program(source.program, batches)
        around = Surroundings(data, store=Store(cache or cache_folder() / "search"), seed=seed, progress=progress)
        plan = plan_ranks(source.program, passes, limits, target, around)
    table = Table("layer", "rank", "expected loss")
    for layer, choice in zip(plan.tables.layers, plan.solution.chosen, strict=True):
        table.add_row(layer.origin, layer.ranks[choice], "" if layer.ranks[choice] == WHOLE else f"{layer.loss[choice]:.3g}")
    err.print(table)
    for metric, value in plan.solution.totals.items():
        err.print(f"{metric}: {value:.4g}, {value / plan.whole[metric]:.3f} of the whole", highlight=False)
    out.print(str(plan.pipeline), highlight=False, markup=False, soft_wrap=True)


@app.command()
def channels(
    model: ModelArgument,
    size: Annotated[str | None, typer.Option(help="Most parameter bytes, relative: 0.5 or 0.5x.")] = None,
    macs: Annotated[str | None, typer.Option(help="Most multiply-accumulates, relative.")] = None,
    latency: Annotated[str | None, typer.Option(help="Most time of a run, relative, as measured here; by itself.")] = None,
    pipeline: Annotated[
        str, typer.Option("--pipeline", "-p", help="With one prune-channels, whose counts are searched.")
    ] = "canonicalize,prune-channels",
    target: Annotated[str, typer.Option(help="Whose kernels the counts suit; with --latency it must run here.")] = "cpu",
    multiple: Annotated[int | None, typer.Option(help="Counts are multiples of this; default: what the target likes.")] = None,
    calibration: Calibration = None,
    samples: Samples = 512,
    seed: Seed = 0,
    input_shape: Shapes = [],  # noqa: B006
) -> None:
    """Choose how many channels of every group of MODEL stay, within limits, and print the pipeline that cuts the others."""
    from ...ir.data import Calibration as Samples_
    from ...ir.errors import OptionError
    from ...passes.pipeline import parse
    from ...search.planner import Surroundings
    from ..channels import plan_channels
    from ..progress import TerminalProgress
    from ..sources import parse_shapes, resolve
    from .options import batches_of, data_text, limits_of, limits_text

    limits = limits_of("--size 0.5, --macs 0.5 or --latency 0.6", size=size, macs=macs, latency=latency)
    if multiple is not None and multiple < 1:
        raise OptionError(f"--multiple must be at least 1, not {multiple}")
    passes = parse(pipeline)
    source = resolve(model, parse_shapes(input_shape))
    batches = batches_of(source, passes, calibration, samples)
    settings(
        "channels", model=source.program.name, limits=limits_text(limits),
        pipeline=passes, target=target, multiple=multiple or "the target's",
        calibration=data_text(calibration, samples, batches), seed=seed,
    )  # fmt: skip
    with TerminalProgress(err) as progress:
        data = None if batches is None else Samples_.for_program(source.program, batches)
        around = Surroundings(data, seed=seed, progress=progress)
        found = plan_channels(source.program, passes, limits, target, around, multiple)
    table = Table("group", "channels", "stay")
    for name, count in found.plan.counts.items():
        table.add_row(name, str(found.sizes[name]), str(count))
    err.print(table)
    for metric, value in found.plan.totals.items():
        err.print(f"{metric}: {value:.4g}, {value / found.whole[metric]:.3f} of the whole", highlight=False)
    if found.plan.latency is not None:
        before, after = found.plan.latency
        err.print(f"measured in turns: {after:.4g} us, {after / before:.3f} of {before:.4g} us", highlight=False)
    out.print(str(found.pipeline), highlight=False, markup=False, soft_wrap=True)
