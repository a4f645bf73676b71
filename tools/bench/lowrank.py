"""Low-rank factorization, measured: every method at equal size, with one ratio for all layers and with ranks by the solver.

python -m graphwright.tools.bench.lowrank gpt-small minilm-l6
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ...ir.data import Calibration
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.factorize.base import Factorize
from ...passes.manager import PassManager
from ...passes.pipeline import Pipeline, parse
from ...search.planner import Surroundings
from ...search.ranks import rank_tables
from ...search.store import Store
from ..predict import program_predict
from ..sources import Source, resolve
from ..zoo import Metric, perplexity
from .markdown import machine, markdown

METHODS = "factorize-svd,factorize-fwsvd,factorize-whitened-svd,factorize-lord,factorize-afm"

#: The output layer of the GPT scores the vocabulary and stays whole, as in the papers on language models.
SKIP = {"gpt-small": ("head",)}


def plans(
    program: Program, method: Factorize, keep: float, around: Surroundings
) -> Iterator[tuple[str, Factorize | None, float]]:
    """(how ranks are chosen, the pass, seconds): `keep` of the weights of the layers that can be factorized."""
    yield "one ratio", dataclasses.replace(method, ratio=keep, multiple=1), 0.0
    start = time.perf_counter()
    tables = rank_tables(program, method, around)
    weights = sum(float(layer.weights[-1]) for layer in tables.layers)
    _, found = tables.allocate({"weight_bytes": tables.fixed_bytes + 4 * keep * weights})
    yield "solver", found, time.perf_counter() - start


def measure(source: Source, program: Program, context: PassContext, chosen: Factorize | None, count: int | None) -> list[str]:
    """[weights kept of the layers that can be factorized, score] of a plan."""
    passes = Pipeline(() if chosen is None else (chosen,))
    changed = PassManager().run(program, passes, context).program
    evaluate, reference = source.evaluate(count), source.reference
    assert evaluate is not None and reference is not None
    score = evaluate(program_predict(changed))
    layers = [] if chosen is None else chosen.layers(program)[0]
    whole = sum(layer.weight.numel() for layer in layers)
    saved = sum(a.numel() for a in program.parameters().values()) - sum(a.numel() for a in changed.parameters().values())
    kept = 1.0 if not whole else 1 - saved / whole
    return [f"{kept:.3f}", f"{perplexity(score):.3f}" if reference.metric is Metric.LOG_LIKELIHOOD else f"{score:.4f}"]


def main(
    models: list[str],
    keep: Annotated[str, typer.Option(help="shares of the factorized layers' weights to keep")] = "0.8,0.7",
    methods: str = METHODS,
    samples: Annotated[int, typer.Option(help="calibration samples, none of them from the evaluation documents")] = 128,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the losses of ranks")] = None,
) -> None:
    for model in models:
        source = resolve(model)
        program = PassManager().run(source.program, parse("canonicalize")).program
        calibration = Calibration.for_program(program, source.calibration(None, samples) or [])
        around = Surroundings(calibration, store=Store(cache))
        context = PassContext(calibration, memo=around.memo)
        typer.echo(f"\n{model}, {samples} calibration samples; {machine()}\n")
        rows = [["float", "", *measure(source, program, context, None, evaluate or None), ""]]
        for passes in parse(methods):
            assert isinstance(passes, Factorize)
            method = dataclasses.replace(passes, skip=SKIP.get(model, ()))
            for share in (float(x) for x in keep.split(",")):
                for how, chosen, seconds in plans(program, method, share, around):
                    rows.append(
                        [method.name, how, *measure(source, program, context, chosen, evaluate or None), f"{seconds:.0f}"]
                    )
                    typer.echo(" ".join(rows[-1]), err=True)
        typer.echo(markdown(["method", "ranks", "weights kept", score_name(source), "search (s)"], rows))


def score_name(source: Source) -> str:
    assert source.reference is not None
    return "perplexity" if source.reference.metric is Metric.LOG_LIKELIHOOD else source.reference.metric_name


if __name__ == "__main__":
    typer.run(main)
