"""The tables of mixed precision in docs/BENCHMARKS.md: verbs of tables.py.

python -m graphwright.tools.bench.tables fronts resnet20 --scorers sqnr,hessian-trace --bits 4.5,3.5
python -m graphwright.tools.bench.tables rounding resnet20 --bits 4,3
python -m graphwright.tools.bench.tables predictions mobilenetv2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...passes.pipeline import Pipeline, parse
from ...passes.quantize.rounding import Rounding
from ...search.sensitivity import parse_scorers
from ..defaults import default_pipeline
from ..progress import TerminalProgress
from .markdown import machine, markdown
from .mixed import Bench, Point, with_bits
from .mixed import fronts as front_points
from .mixed import predictions as predicted

Models = Annotated[list[str], typer.Argument()]
Cache = Annotated[Path | None, typer.Option(help="Folder for scores: a second run takes them from there.")]
Evaluate = Annotated[int, typer.Option(help="Samples scored; 0: all.")]
HeldOut = Annotated[bool, typer.Option("--held-out", help="Score on held-out calibration samples: what choices rest on.")]

FORMATS = "int8,int4,int2"
SCORERS = "sqnr,output-distortion,hessian-trace,hessian-eigenvalue,fisher,relevance,entropy"


def fronts(
    models: Models,
    scorers: str = SCORERS,
    bits: Annotated[str, typer.Option(help="Limits on the average bits of a weight.")] = "6,5,4.5,4,3.5,3",
    formats: str = FORMATS,
    pipeline: Annotated[str | None, typer.Option(help="Default: that of a bit search, see tools/defaults.py.")] = None,
    samples: int = 512,
    evaluate: Evaluate = 0,
    held_out: HeldOut = False,
    cache: Cache = None,
) -> None:
    """Score of the plan each scorer chooses under each limit: the same solver, quantizer and calibration set for all."""
    for model in models:
        with TerminalProgress() as progress:
            bench = Bench.of(model, samples, evaluate or None, cache, progress, held_out)
            limits = [float(b) for b in bits.split(",")]
            points = front_points(bench, parse_scorers(scorers), limits, formats.split(","), bench.pipeline(pipeline))
        _print(model, points, samples, held_out)


def rounding(
    models: Models,
    methods: Annotated[str, typer.Option(help="Passes between align-scales and correct-bias; `nearest` is none.")] = (
        "nearest,gpfq,gptq,adaround,adaquant"
    ),
    bits: str = "4,3",
    samples: int = 512,
    evaluate: Evaluate = 0,
    held_out: HeldOut = False,
) -> None:
    """Score of each rounding method with one width throughout, beside 8 bits and plain nearest rounding with min-max ranges."""
    for model in models:
        with TerminalProgress() as progress:
            bench = Bench.of(model, samples, evaluate or None, None, progress, held_out)
            plain = parse(default_pipeline(bench.source.program))
            points = [bench.point("int8, default pipeline", plain)]
            for width in map(int, bits.split(",")):
                points.append(bench.point(f"{width} bits, nearest, min-max ranges", with_bits(plain, width)))
                for method in methods.split(","):
                    points.append(
                        bench.point(f"{width} bits, {method}", with_bits(with_rounding(bench.pipeline(), method), width))
                    )
        _print(model, points, samples, held_out)


def with_rounding(pipeline: Pipeline, method: str) -> Pipeline:
    """The pipeline of a bit search with another rounding pass behind align-scales; `nearest` is none."""
    place = next(i for i, p in enumerate(pipeline) if p.name == "align-scales") + 1
    rest = [p for p in pipeline.passes[place:] if not isinstance(p, Rounding)]
    return Pipeline((*pipeline.passes[:place], *(() if method == "nearest" else parse(method)), *rest))


def predictions(
    models: Models,
    shares: Annotated[
        str, typer.Option(help="Where limits lie between the fastest plan (0) and the slowest (1).")
    ] = "0.1,0.3,0.5,0.7,0.9",
    scorer: str = "sqnr",
    formats: str = FORMATS,
    samples: int = 64,
) -> None:
    """Plans under limits on measured time: what the sum of their kernels predicts beside what a run takes."""
    body = []
    for model in models:
        with TerminalProgress() as progress:
            bench = Bench.of(model, samples, None, None, progress)
            # Which codes a weight has changes no time.
            passes = with_rounding(bench.pipeline(), "nearest")
            found = predicted(bench, parse_scorers(scorer)[0], formats.split(","), passes, [float(s) for s in shares.split(",")])
        for p in found:
            times = [f"{spent:.1f}" for spent in (p.limit, p.predicted, p.measured)]
            errors = [f"{100 * error:+.1f}%" for error in (p.error, p.error_at_one_clock)]
            body.append([p.model, f"{p.bits:.2f}", *times, *errors])
    typer.echo(f"\n{machine()}\n")
    head = ["model", "average bits", "limit (us)", "predicted (us)", "measured (us)", "predicted over measured", "at one clock"]
    typer.echo(markdown(head, body))


def _print(model: str, points: Sequence[Point], samples: int, held_out: bool) -> None:
    where = "held-out calibration samples" if held_out else "evaluation samples"
    typer.echo(f"\n{model}, {samples} calibration samples, scored on {where}; {machine()}\n")
    body = [
        [p.method, f"{p.bits:.2f}", f"{p.score:.4f}", f"{p.drop:+.2f}", f"{p.seconds:.1f}" if p.seconds else "-"] for p in points
    ]
    typer.echo(
        markdown(["method", "average bits", f"score (float {points[0].float_score:.4f})", "points lost", "scoring (s)"], body)
    )


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command of all tables."""
    for verb in (fronts, rounding, predictions):
        app.command()(verb)
