"""Whole plans against sums of layers: EvoPress beside the integer program at equal bits, on samples neither has seen.

python -m graphwright.tools.bench.evolution resnet20 --bits 2.75
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

import typer

from ...ir.data import Calibration
from ...passes.manager import PassManager
from ...passes.pipeline import parse
from ...passes.quantize.annotate import Quantize
from ...search.plan_loss import PlanLoss
from ...search.planner import average_bits
from ...search.problem import Problem
from ...search.sensitivity import parse_scorers
from ...search.sensitivity.base import Scores, Task
from ...search.sensitivity.layers import weight_layers
from ...search.solvers import evolutionary, ilp
from ..sources import resolve
from .markdown import machine, markdown

FORMATS = ("int8", "int6", "int4", "int3", "int2")


def _problem(task: Task, scores: Scores, bits: float) -> Problem:
    """Least sum of the layers' scores within `bits` a weight on average."""
    limit = average_bits(task.layers, task.choices, bits)
    return Problem(scores.layers, (task.choices,) * len(task.layers), tuple(scores.loss), (limit,))


def main(
    model: str,
    bits: Annotated[float, typer.Option(help="limit on the average bits of a weight")] = 2.75,
    samples: Annotated[int, typer.Option(help="samples that scorers and evolution see")] = 128,
    held_out: Annotated[int, typer.Option(help="further samples that only judge")] = 384,
    generations: int = 15,
    scorers: str = "sqnr,output-distortion{samples=64}",
) -> None:
    source = resolve(model)
    program = PassManager().run(source.program, parse("canonicalize")).program
    batches = Calibration.for_program(program, source.calibration(None, samples + held_out) or []).samples
    task = Task(program, weight_layers(program, Quantize(), FORMATS), FORMATS, Calibration(batches[:samples]))
    seen, unseen = PlanLoss(task), PlanLoss(replace(task, samples=Calibration(batches[samples:])))
    rows, start, problem = [], None, None

    def add(name: str, problem: Problem, chosen: tuple[int, ...], evaluations: int, seconds: float) -> None:
        single, used = problem.total_loss(chosen), problem.totals(chosen)["average_bits"]
        losses = [f"{loss(chosen, loss.samples):.4f}" for loss in (seen, unseen)]
        rows.append([name, f"{used:.3f}", f"{single:.4f}", *losses, str(evaluations), f"{seconds:.0f}"])

    for scorer in parse_scorers(scorers):
        problem = _problem(task, scorer.score(task), bits)
        begin = time.process_time()
        start = ilp.solve(problem).chosen
        add(f"ilp, {scorer.name}", problem, start, 0, time.process_time() - begin)
    assert problem is not None
    begin = time.process_time()
    stages = ((4, samples // 8), (2, samples // 2), (1, samples))
    found = evolutionary.solve(problem, seen, generations=generations, offspring=12, stages=stages, start=start)
    add("evolutionary, from the last", problem, found.solution.chosen, found.evaluations, time.process_time() - begin)
    typer.echo(f"\n{model}, {samples} samples, {held_out} held out; {machine()}\n")
    head = ["plan", "bits", "sum of its layers' scores", "loss on the samples", "loss held out", "evaluations", "CPU seconds"]
    typer.echo(markdown(head, rows))


if __name__ == "__main__":
    typer.run(main)
