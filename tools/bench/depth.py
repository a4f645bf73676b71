"""Accuracy against depth and against tokens: blocks left out or sharing weights, activations made lines and the layers around
them one, tokens merged or dropped; no fine-tuning.

python -m graphwright.tools.bench.depth blocks vit-tiny --most 3
python -m graphwright.tools.bench.depth blocks gpt-small --batch 8 --evaluate 256
python -m graphwright.tools.bench.depth lines vit-tiny --most 3
python -m graphwright.tools.bench.depth tokens vit-tiny --rates 0,2,4,6,8
python -m graphwright.tools.bench.depth tokens vit-tiny --latency          (builds artifacts; on a quiet machine)

Choices see calibration samples alone; the scores are of the test split.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ...ir.batch import with_batch
from ...ir.data import Calibration
from ...ir.errors import OptionError
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import parse
from ...passes.prune.blocks import find_blocks
from ...passes.prune.linearize_activations import candidates
from ...passes.prune.token_axis import find_attentions
from ...search.block_drop import drop_blocks
from ...search.cost.bops import products
from ..defaults import default_pipeline
from ..optimize import optimize
from ..progress import silent
from ..sources import Source, resolve
from ..zoo import Metric, perplexity
from . import interleave
from .markdown import machine, markdown
from .worker import Worker

app = typer.Typer(add_completion=False, help=__doc__)

#: Pass of each row of the table of blocks, with the number of blocks in place of N.
CURVES = {
    "block influence": "remove-blocks{count=N}",
    "angular distance": "remove-blocks{count=N,criterion=angular-distance}",
    "output distortion": "remove-blocks{count=N,criterion=output-distortion}",
    "shared, block influence": "share-blocks{count=N,criterion=block-influence}",
    "shared, output distortion": "share-blocks{count=N}",
}


@dataclass(frozen=True)
class Subject:
    """A reference model as a canonical program of a fixed batch, with calibration samples of that batch."""

    source: Source
    program: Program
    samples: Calibration
    evaluate: int | None

    @classmethod
    def load(cls, model: str, batch: int, samples: int, evaluate: int | None) -> Subject:
        source = resolve(model, dynamic_batch=True)
        program = with_batch(PassManager().run(source.program, parse("canonicalize")).program, batch)
        data = Calibration.for_program(program, source.calibration(None, samples) or [])
        return cls(source, program, data, evaluate)

    def compressed(self, text: str, seed: int = 0) -> tuple[Program, dict]:
        result = PassManager().run(self.program, parse(text), PassContext(calibration=self.samples, seed=seed))
        return result.program, result.certificate[-1].stats

    def score(self, program: Program) -> float:
        """The model's metric; a log-likelihood as the perplexity it stands for."""
        batch = int(program.input_specs[0].shape[0] or 1)

        def predict(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
            parts = []
            for first in range(0, len(inputs[0]), batch):
                part = [x[first : first + batch] for x in inputs]
                count = len(part[0])
                filled = [torch.cat([x, x[-1:].expand(batch - count, *x.shape[1:])]) for x in part]
                parts.append(program(*filled)[0][:count])
            return torch.cat(parts)

        assert self.source.reference is not None
        return shown(self.source, self.source.reference.evaluate(predict, self.evaluate))


def shown(source: Source, score: float) -> float:
    assert source.reference is not None
    return perplexity(score) if source.reference.metric is Metric.LOG_LIKELIHOOD else score


def macs(program: Program) -> int:
    return sum(work.macs for work in products(program))


@app.command()
def blocks(
    model: str,
    most: Annotated[int, typer.Option(help="layers that go at most")] = 3,
    batch: int = 32,
    samples: Annotated[int, typer.Option(help="calibration samples that the criteria see")] = 256,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
    seeds: Annotated[int, typer.Option(help="random choices; mean and range are shown")] = 5,
    generations: Annotated[int, typer.Option(help="of the evolutionary search; 0: leave it out")] = 10,
) -> None:
    """Score against the number of layers removed or sharing their neighbour's weights."""
    if generations and samples < 8 * batch:
        raise OptionError(f"the evolutionary search judges 8 batches or more: --samples {8 * batch}, or --generations 0")
    subject = Subject.load(model, batch, samples, evaluate or None)
    base = f"{subject.score(subject.program):.4f}"
    rows = {name: [base] for name in (*CURVES, "random", "evolutionary, branches")}
    layers = find_blocks(subject.program).layers
    whole, each = macs(subject.program), 0
    for count in range(1, most + 1):
        for name, text in CURVES.items():
            program, stats = subject.compressed(text.replace("N", str(count)))
            chosen = stats.get("removed") or stats["groups"]
            rows[name].append(f"{subject.score(program):.4f}")
            typer.echo(f"{name}, {count} of {len(layers)}: {chosen}: {rows[name][-1]}", err=True)
            each = macs(program) if name == "block influence" else each
        drawn = [
            subject.score(subject.compressed(f"remove-blocks{{count={count},criterion=random}}", s)[0]) for s in range(seeds)
        ]
        rows["random"].append(f"{statistics.mean(drawn):.4f} ({min(drawn):.4f}-{max(drawn):.4f})")
        if generations:
            found = drop_blocks(subject.program, subject.samples, each / whole, generations=generations, offspring=12)
            rows["evolutionary, branches"].append(f"{subject.score(subject.compressed(found.pipeline)[0]):.4f}")
            typer.echo(
                f"evolutionary, {each / whole:.3f} of MACs: {found.pipeline}: {rows['evolutionary, branches'][-1]}", err=True
            )
    metric = subject.source.reference.metric_name if subject.source.reference else ""
    typer.echo(f"\n{model}, {metric} by layers of {len(layers)}; {samples} samples; {machine()}\n")
    typer.echo(markdown(["criterion", *map(str, range(most + 1))], [[n, *cells] for n, cells in rows.items() if len(cells) > 1]))


@app.command()
def lines(
    model: str,
    most: Annotated[int, typer.Option(help="activations that go at most")] = 3,
    batch: int = 32,
    samples: Annotated[int, typer.Option(help="calibration samples that lines and criteria see")] = 64,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
) -> None:
    """What every activation between two layers would save as a line, and the score against the number that went."""
    subject = Subject.load(model, batch, samples, evaluate or None)
    found, whole = candidates(subject.program), macs(subject.program)
    prices = [[c.name, *(f"{n / batch / 1e6:.2f}" for n in c.macs), f"{(c.macs[1] - c.macs[0]) / whole:+.3f}"] for c in found]
    typer.echo(f"\n{model}, multiply-accumulates of the layers around an activation (M), and as one; {machine()}\n")
    typer.echo(markdown(["activation", "two layers", "one", "of the network's"], prices))
    rows = [["0", "", "1.000", f"{subject.score(subject.program):.4f}"]]
    for count in range(1, 1 + min(most, sum(c.macs[1] < c.macs[0] for c in found))):
        for criterion in ("output-distortion", "fit", "random"):
            text = f"linearize-activations{{count={count},criterion={criterion},samples={-(-samples // batch)}}}"
            program, stats = subject.compressed(text)
            share = f"{macs(program) / whole:.3f}"
            rows.append([str(count), f"{criterion}: {stats['linearized']}", share, f"{subject.score(program):.4f}"])
            typer.echo(" ".join(rows[-1]), err=True)
    metric = subject.source.reference.metric_name if subject.source.reference else ""
    typer.echo(f"\n{model}, {samples} samples\n")
    typer.echo(markdown(["activations", "which", "MACs", metric], rows))


@app.command()
def tokens(
    model: str,
    rates: Annotated[str, typer.Option(help="tokens a layer, merged or dropped")] = "0,2,4,6,8",
    batch: int = 32,
    evaluate: Annotated[int, typer.Option(help="evaluation samples; 0: all")] = 0,
    samples: Annotated[int, typer.Option(help="calibration samples of the int8 artifacts")] = 128,
    latency: Annotated[bool, typer.Option(help="build artifacts and time them, batch 1")] = False,
    threads: int = 1,
    rounds: int = 20,
) -> None:
    """Score against tokens merged a layer; with --latency the artifacts' time, and the int8 artifacts' score."""
    subject = Subject.load(model, batch, batch, evaluate or None)
    layers = len(find_attentions(subject.program))
    whole = macs(subject.program)
    rows = []
    for rate in [int(r) for r in rates.split(",")]:
        counts = ",".join([str(rate)] * (layers - 1))
        texts = [
            "reduce-tokens{per_layer=N}",
            "reduce-tokens{per_layer=N,proportional=false}",
            f"reduce-tokens{{prune=[{counts}]}}",
        ]
        variants = [subject.compressed(t.replace("N", str(rate)))[0] if rate else subject.program for t in texts]
        scores = [f"{subject.score(program):.4f}" for program in variants]
        rows.append([str(rate), f"{macs(variants[0]) / whole:.2f}", f"{macs(variants[2]) / whole:.2f}", *scores])
        typer.echo(" ".join(rows[-1]), err=True)
    head = ["tokens a layer", "MACs merged", "MACs dropped", "merged", "merged, not proportional", "dropped"]
    if latency:
        head += ["float ms", "int8 ms", "int8 score"]
        for row, cells in zip(
            rows, _timed(model, [row[0] for row in rows], samples, evaluate or None, threads, rounds), strict=True
        ):
            row += cells
    typer.echo(f"\n{model}, {layers} attentions, {threads} threads; {machine()}\n")
    typer.echo(markdown(head, rows))


def _timed(model: str, rates: Sequence[str], samples: int, evaluate: int | None, threads: int, rounds: int) -> list[list[str]]:
    """[float ms, int8 ms, int8 score] of the artifacts of each rate, timed in turn."""
    source = resolve(model)
    assert source.reference is not None
    batches = source.calibration(None, samples) or []
    data = Calibration.for_program(source.program, batches)
    columns = zip(*data.samples[:2], strict=True)
    arrays = {spec.name: torch.stack(column).numpy() for spec, column in zip(source.program.input_specs, columns, strict=True)}
    with tempfile.TemporaryDirectory() as name:
        workers: list[Worker] = []
        try:
            for rate in rates:
                folder = Path(name) / rate
                folder.mkdir()
                np.savez(folder / "samples.npz", **arrays)  # type: ignore[arg-type]
                first = "canonicalize" if rate == "0" else f"canonicalize,reduce-tokens{{per_layer={rate}}}"
                rest = default_pipeline(source.program).removeprefix("canonicalize")
                for precision, text in (("float", first), ("int8", first + rest)):
                    start = time.monotonic()
                    result = optimize(source.program, pipeline=text, calibration=batches, measure=False)
                    result.artifact.save(folder / f"{precision}.gw")
                    typer.echo(f"rate {rate}, {precision}: built in {time.monotonic() - start:.0f} s", err=True)
                    workers.append(Worker(f"graphwright-{precision}", folder, threads))
            medians = [f"{statistics.median(t):.3f}" for t in interleave(workers, rounds, silent)]
            scores = source.reference.evaluate_all([lambda x, w=w: _one(w.predict(*x)) for w in workers[1::2]], evaluate)
        finally:
            for worker in workers:
                worker.close()
    texts = [f"{shown(source, score):.4f}" for score in scores]
    return [list(cells) for cells in zip(medians[0::2], medians[1::2], texts, strict=True)]


def _one(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


if __name__ == "__main__":
    app()
