"""The verb that shows what a bit search knows: analyze."""

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
    from ...ir.files import check_output, write_atomically
    from ...passes.pipeline import parse
    from ...search.sensitivity import scorer_text
    from ...search.sensitivity.statistics import calibration_warning
    from ..analyze import analyze as run
    from ..analyze import chosen_scorers
    from ..defaults import search_pipeline
    from ..progress import TerminalProgress
    from ..sources import parse_shapes, resolve
    from .options import batches_of, search_of

    if output is not None:
        check_output(output, overwrite)
    chosen_scorers(scorers, with_samples=True, with_labels=True)  # a wrong name is an error before the model is read
    source = resolve(model, parse_shapes(input_shape))
    passes = parse(pipeline or search_pipeline(source.program))
    batches = batches_of(source, passes, calibration, samples)
    options = search_of(source, samples, formats, None, None, None, labels, calibration, cache)
    chosen = chosen_scorers(scorers, with_samples=batches is not None, with_labels=options.labels is not None)
    settings(
        "analyze", model=source.program.name, scorers=", ".join(map(scorer_text, chosen)), formats=", ".join(options.formats),
        calibration=calibration or (f"{samples} of the reference data" if batches else "none"), pipeline=passes, seed=seed,
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
