"""Low-rank factorization, measured: every method at equal size, at 8 bits, one under limits on its time, and EoRA's branches.

python -m graphwright.tools.bench.lowrank size gpt-small minilm-l6
python -m graphwright.tools.bench.lowrank int8 minilm-l6 --keep 0.7
python -m graphwright.tools.bench.lowrank time gpt-small
python -m graphwright.tools.bench.lowrank branches gpt-small
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from ...backends.base import example_inputs
from ...backends.registry import backend_for
from ...backends.target import Target
from ...ir.data import Calibration
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.factorize.base import Factorize
from ...passes.manager import PassManager
from ...passes.pipeline import Pipeline, parse
from ...search.cost.ranks import priced
from ...search.cost.uniform import Pricing
from ...search.planner import Surroundings
from ...search.ranks import rank_tables
from ...search.store import Store
from ..defaults import default_pipeline
from ..predict import program_predict
from ..sources import Source, resolve
from ..zoo import Metric, perplexity
from .markdown import machine, markdown

app = typer.Typer(add_completion=False)

METHODS = "factorize-svd,factorize-fwsvd,factorize-whitened-svd,factorize-lord,factorize-afm"

#: The output layer of the GPT scores the vocabulary and stays whole, as in the papers on language models.
SKIP = {"gpt-small": ("head",)}


def size_plans(
    program: Program, method: Factorize, keep: float, around: Surroundings
) -> Iterator[tuple[str, Factorize | None, float]]:
    """(how ranks are chosen, the pass, seconds): `keep` of the weights of the layers that can be factorized."""
    yield "one ratio", dataclasses.replace(method, ratio=keep, multiple=1), 0.0
    start = perf_counter()
    tables = rank_tables(program, method, around)
    weights = sum(float(layer.weights[-1]) for layer in tables.layers)
    _, found = tables.allocate({"weight_bytes": tables.fixed_bytes + 4 * keep * weights})
    yield "solver", found, perf_counter() - start


def measure(source: Source, program: Program, context: PassContext, chosen: Factorize | None, count: int | None) -> list[str]:
    """[weights kept of the layers that can be factorized, score] of a plan."""
    passes = Pipeline(() if chosen is None else (chosen,))
    changed = PassManager().run(program, passes, context).program
    layers = [] if chosen is None else chosen.layers(program)[0]
    whole = sum(layer.weight.numel() for layer in layers)
    saved = sum(a.numel() for a in program.parameters().values()) - sum(a.numel() for a in changed.parameters().values())
    kept = 1.0 if not whole else 1 - saved / whole
    return [f"{kept:.3f}", _score(source, changed, count)]


@app.command()
def size(
    models: list[str],
    keep: Annotated[str, typer.Option(help="shares of the factorized layers' weights to keep")] = "0.8,0.7",
    methods: str = METHODS,
    samples: Annotated[int, typer.Option(help="calibration samples, none of them from the evaluation documents")] = 128,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the losses of ranks")] = None,
) -> None:
    """Weights of the factorized layers against accuracy: one ratio for all layers, and ranks by the solver."""
    for model in models:
        source, program, around = _prepared(model, samples, cache)
        context = PassContext(around.samples, memo=around.memo)
        typer.echo(f"\n{model}, {samples} calibration samples; {machine()}\n")
        rows = [["float", "", *measure(source, program, context, None, evaluate or None), ""]]
        for passes in parse(methods):
            assert isinstance(passes, Factorize)
            method = dataclasses.replace(passes, skip=SKIP.get(model, ()))
            for share in (float(x) for x in keep.split(",")):
                for how, chosen, seconds in size_plans(program, method, share, around):
                    rows.append(
                        [method.name, how, *measure(source, program, context, chosen, evaluate or None), f"{seconds:.0f}"]
                    )
                    typer.echo(" ".join(rows[-1]), err=True)
        typer.echo(markdown(["method", "ranks", "weights kept", score_name(source), "search (s)"], rows))


@app.command()
def int8(
    model: str,
    keep: Annotated[float, typer.Option(help="share of the factorized layers' weights to keep")] = 0.7,
    method: str = "factorize-whitened-svd",
    samples: Annotated[int, typer.Option(help="calibration samples of the factorization and of the ranges")] = 64,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the losses of ranks")] = None,
) -> None:
    """What 8 bits cost a network as it is, and one whose layers are factorized first (torch reference of the integers)."""
    source, program, around = _prepared(model, samples, cache)
    context = PassContext(around.samples, memo=around.memo)
    (passes,) = parse(method)
    assert isinstance(passes, Factorize)
    whole = dataclasses.replace(passes, skip=SKIP.get(model, ()))
    plans = [("as it is", None), *((how, found) for how, found, _ in size_plans(program, whole, keep, around))]
    rows = []
    for name, chosen in plans:
        kept, score = measure(source, program, context, chosen, evaluate or None)
        smaller = PassManager().run(program, Pipeline(() if chosen is None else (chosen,)), context).program
        integers = PassManager().run(smaller, parse(default_pipeline(smaller)), PassContext(around.samples)).program
        rows.append([name, kept, score, _score(source, integers, evaluate or None)])
        typer.echo(" ".join(rows[-1]), err=True)
    typer.echo(f"\n{model}, {method} at {keep:g}, {samples} calibration samples; {machine()}\n")
    typer.echo(markdown(["ranks", "weights kept", f"{score_name(source)}, float", "int8"], rows))


@app.command()
def branches(
    model: str,
    form: Annotated[str, typer.Option("--format", help="of the layers' weights")] = "int3g64",
    ranks: Annotated[str, typer.Option(help="of every branch; 0: none")] = "0,16,32",
    samples: Annotated[int, typer.Option(help="calibration samples")] = 24,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
) -> None:
    """Rounded weights with EoRA's branches of several ranks beside them."""
    source, program, around = _prepared(model, samples, None)
    context = PassContext(around.samples, memo=around.memo)
    rows = [["float", "", _score(source, program, evaluate or None)]]
    for rank in map(int, ranks.split(",")):
        rounded = f'quantize{{weights=["*={form}","*.eora.*=int8g64"]}}' if rank else f'quantize{{weights=["*={form}"]}}'
        text = f"eora{{format={form},rank={rank}}},{rounded}" if rank else rounded
        result = PassManager().run(program, parse(text), context)
        more = f"{result.certificate[0].stats['added']:.3f}" if rank else ""
        rows.append([f"rank {rank}" if rank else "none", more, _score(source, result.program, evaluate or None)])
        typer.echo(" ".join(rows[-1]), err=True)
    typer.echo(f"\n{model}, {form}, {samples} calibration samples; {machine()}\n")
    typer.echo(markdown(["branches", "their weights, of the layers'", score_name(source)], rows))


@app.command()
def time(
    model: str,
    method: str = "factorize-whitened-svd",
    shares: Annotated[
        str, typer.Option(help="limits: shares of the measured time of a run of the program as it is")
    ] = "0.95,0.9",
    tail: Annotated[str, typer.Option(help="passes after the factorization; empty: float kernels")] = "",
    steps: Annotated[int, typer.Option(help="ranks of a layer to choose from, one compilation each")] = 4,
    samples: int = 32,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps losses and prices")] = None,
) -> None:
    """Ranks by measured time on this machine: predicted beside measured, and how many ranks were no faster."""
    source, program, around = _prepared(model, samples, cache)
    context = PassContext(around.samples, memo=around.memo)
    target = Target.parse("cpu")
    pricing = Pricing(backend_for(target), target, True)
    (passes,) = parse(method)
    assert isinstance(passes, Factorize)
    chosen = dataclasses.replace(passes, skip=SKIP.get(model, ()))
    after = parse(tail) if tail else Pipeline(())
    tables = rank_tables(program, chosen, around, pricing.backend.channel_multiple(target), steps)
    faster = priced(program, tables, after, pricing, around)
    offered, left = (sum(len(layer.ranks) - 1 for layer in x.layers) for x in (tables, faster))
    limit = faster.problem({}).limits[-1]
    whole = limit.total([len(row) - 1 for row in limit.cost])
    plans: list[tuple[str, float, Factorize | None]] = [("as it is", whole, None)]
    for share in (float(x) for x in shares.split(",")):
        solution, plan = faster.allocate({"microseconds": share * whole})
        plans.append((f"at most {share:g}", solution.totals["microseconds"], plan))
    measured = _timed(program, [plan for _, _, plan in plans], after, pricing, context)
    rows = [
        [name, f"{spent:.0f}", f"{took:.0f}", *measure(source, program, context, plan, evaluate or None)]
        for (name, spent, plan), took in zip(plans, measured, strict=True)
    ]
    typer.echo(f"\n{model}, {method}, {tail or 'float32'}: {left} of {offered} ranks are faster than their layer; {machine()}\n")
    typer.echo(markdown(["limit", "predicted (us)", "measured (us)", "weights kept", score_name(source)], rows))


def _prepared(model: str, samples: int, cache: Path | None) -> tuple[Source, Program, Surroundings]:
    source = resolve(model)
    program = PassManager().run(source.program, parse("canonicalize")).program
    calibration = Calibration.for_program(program, source.calibration(None, samples) or [])
    return source, program, Surroundings(calibration, store=Store(cache))


def _timed(
    program: Program, plans: Sequence[Factorize | None], tail: Pipeline, pricing: Pricing, context: PassContext
) -> list[float]:
    """Median microseconds of a run with each plan, timed in turns."""
    timed = []
    for chosen in plans:
        passes = Pipeline((*(() if chosen is None else (chosen,)), *tail))
        changed = PassManager().run(program, passes, context).program
        timed.append((pricing.backend.compile(changed, pricing.target), example_inputs(changed)))
    return [1e3 * spent for spent in pricing.backend.latencies(timed, pricing.repeats)]


def _score(source: Source, program: Program, count: int | None) -> str:
    evaluate, reference = source.evaluate(count), source.reference
    assert evaluate is not None and reference is not None
    score = evaluate(program_predict(program))
    return f"{perplexity(score):.3f}" if reference.metric is Metric.LOG_LIKELIHOOD else f"{score:.4f}"


def score_name(source: Source) -> str:
    assert source.reference is not None
    return "perplexity" if source.reference.metric is Metric.LOG_LIKELIHOOD else source.reference.metric_name


if __name__ == "__main__":
    app()
