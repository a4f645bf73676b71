r"""What distillation wins back: reference models compressed by a pipeline, scored before and after a short training.

    python -m graphwright.tools.recover --json rows.json \
        --row resnet20 'canonicalize,prune-channels{ratio=0.3}' --row resnet20 'canonicalize,quantize{weight_bits=3}' \
        --recipe 'distill{epochs=2}' --split held-out

Every pipeline meets every recipe. Runs on a GPU where torch sees one, and needs no TVM there. Rows that the file holds already
are not made again, and an unfinished training goes on, so a run that was stopped is simply started again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..ir.capture import capture
from ..ir.data import Calibration
from ..ir.errors import DataError, GraphwrightError, OptionError
from ..ir.files import write_atomically
from ..ir.program import Program, Stage
from ..passes.base import PassContext, Training
from ..passes.manager import PassManager
from ..passes.pipeline import Pipeline, parse, pass_text
from ..passes.recover.distill import Distill
from ..passes.recover.student import Network
from ..passes.recover.training import choose_device
from ..search.channels import macs_of
from . import zoo

#: Calibration samples the passes see; those behind them are the held-out ones that choices are made on.
CALIBRATION = 1024
#: Evaluation samples run at once.
_BATCH = 500
#: Held-out samples end here: the labelled calibration samples there are.
_HELD_OUT_STOP = 5000

#: How rows of language models are scored.
PERPLEXITY = "perplexity"

Split = Literal["held-out", "test"]


@dataclass(frozen=True)
class Setup:
    """What rows are made on.

    Attributes:
        samples: training inputs; None: all.
        calibration: samples that passes see; held-out samples are those behind them.
        evaluate: samples of the test split; None: all.
    """

    split: Split = "held-out"
    samples: int | None = None
    calibration: int = CALIBRATION
    evaluate: int | None = None
    seed: int = 0
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Row:
    """One compressed model with one recipe. Scores are by `metric`; macs: the share of multiply-accumulates left. The rest is as
    in `Setup`, but that samples are those trained on."""

    model: str
    pipeline: str
    recipe: str
    split: str
    seed: int
    samples: int
    macs: float
    float_score: float
    before: float
    after: float
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    device: str
    metric: str = zoo.Metric.TOP1.value
    calibration: int = CALIBRATION
    evaluate: int | None = None


class Bench:
    """One reference model: its data, and what was compressed already."""

    def __init__(self, model: str, setup: Setup) -> None:
        reference = zoo.load(model)
        if setup.split == "held-out" and reference.metric is not zoo.Metric.TOP1:
            raise OptionError(
                f"held-out rows are shares of right classes; '{model}' is scored by {reference.metric_name}: use --split test"
            )
        self.model, self.setup = model, setup
        # A free batch: layers then see a whole batch at once, several times as fast as one sample after the other in `vmap`.
        self.program = capture(reference.model, reference.example_inputs, dynamic_batch=True, name=model)
        data = reference.training(setup.samples)
        self.training = replace(setup.training, samples=None if data is None else Calibration.for_program(self.program, data))
        self.calibration = Calibration.for_program(self.program, reference.calibration(setup.calibration))
        self.device = choose_device(setup.training.device)
        self.reference = reference
        self.metric = PERPLEXITY if reference.metric is zoo.Metric.LOG_LIKELIHOOD else reference.metric_name
        self.held_out = held_out(reference, setup.calibration) if setup.split == "held-out" else None
        self.float_score = self.score(self.program)

    def context(self) -> PassContext:
        return PassContext(
            calibration=self.calibration, training=self.training, original=self.program, seed=self.setup.seed, progress=_Lines()
        )

    def score(self, program: Program) -> float:
        network = Network.of(program, self.device, train=False, scores=False)

        def predict(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                return network(tuple(x.to(self.device) for x in inputs))[0]

        if self.held_out is not None:
            images, labels = self.held_out
            classes = torch.cat([predict((part,)).argmax(1).cpu() for part in images.split(_BATCH)])
            return float((classes == labels).sum()) / len(labels)
        found = self.reference.evaluate(predict, self.setup.evaluate)
        return zoo.perplexity(found) if self.metric == PERPLEXITY else found

    def compress(self, pipeline: str) -> Program:
        return PassManager().run(self.program, parse(pipeline), self.context()).program

    def recover(self, pipeline: str, compressed: Program, before: float, recipe: Distill) -> tuple[Program, Row]:
        start = time.perf_counter()
        result = PassManager().run(compressed, Pipeline((recipe,)), self.context())
        stats = result.certificate[-1].stats
        row = Row(
            self.model, pipeline, pass_text(recipe), self.setup.split, self.setup.seed, stats["samples"], self.macs(compressed),
            self.float_score, before, self.score(result.program), stats["held_out_before"], stats["held_out_after"],
            stats["steps"], round(time.perf_counter() - start, 1), stats["device"],
            self.metric, self.setup.calibration, self.setup.evaluate,
        )  # fmt: skip
        return result.program, row

    def macs(self, compressed: Program) -> float:
        canonical = PassManager().run(self.program, parse("canonicalize")).program
        return round(macs_of(compressed) / macs_of(canonical), 4)


def held_out(reference: zoo.ReferenceModel, first: int = CALIBRATION) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, ...) inputs and (N,) classes: the calibration samples from `first` on, behind those that passes see."""
    labels = reference.calibration_labels(_HELD_OUT_STOP)
    if labels is None:
        raise DataError(f"'{reference.name}' has no labelled calibration samples to hold out")
    images = torch.cat([inputs[0] for inputs in reference.calibration(_HELD_OUT_STOP)])
    return images[first:], labels[first:]


class _Lines:
    """Progress of training as a line every ten seconds: a run on another machine leaves a log."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        if time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            print(f"  {what} {done}/{total}", flush=True)


def run(
    rows: Sequence[tuple[str, str]], recipes: Sequence[Distill], setup: Setup, output: Path, keep: Path | None = None
) -> list[Row]:
    """Makes the rows that `output` lacks and adds each to it at once.

    Args:
        rows: (model, pipeline text).
        keep: a folder for the recovered float programs as ONNX, `MODEL-N.onnx` with N the row's number in `output`.
    """
    found = [Row(**row) for row in json.loads(output.read_text())] if output.exists() else []
    benches: dict[str, Bench] = {}
    for model, pipeline in rows:
        wanted = [r for r in recipes if not any(_same(row, model, pipeline, r, setup) for row in found)]
        if not wanted:
            continue
        bench = benches[model] = benches.get(model) or Bench(model, setup)
        compressed = bench.compress(pipeline)
        before = bench.score(compressed)
        for recipe in wanted:
            recovered, row = bench.recover(pipeline, compressed, before, recipe)
            found.append(row)
            if keep is not None and recovered.stage < Stage.ANNOTATED:
                _export(recovered, keep / f"{model}-{len(found)}.onnx")
            write_atomically(output, (json.dumps([asdict(r) for r in found], indent=1) + "\n").encode())
            print(
                f"{model} {pipeline} + {row.recipe}: float {row.float_score:.4f} before {row.before:.4f} after {row.after:.4f} "
                f"loss {row.loss_before:.4g} -> {row.loss_after:.4g}, MACs {row.macs:.3f}, {row.seconds:.0f} s", flush=True,
            )  # fmt: skip
    return found


def _same(row: Row, model: str, pipeline: str, recipe: Distill, setup: Setup) -> bool:
    made = row.model, row.pipeline, row.recipe, row.split, row.seed, row.calibration, row.evaluate
    return made == (model, pipeline, pass_text(recipe), setup.split, setup.seed, setup.calibration, setup.evaluate)


def _export(program: Program, path: Path) -> None:
    from ..ir.onnx_export import export_onnx  # onnx is needed for this alone

    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    export_onnx(program, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m graphwright.tools.recover", description="Measure what distillation wins back."
    )
    parser.add_argument("--row", nargs=2, action="append", required=True, metavar=("MODEL", "PIPELINE"))
    parser.add_argument("--recipe", action="append", required=True, help="distill with its options; repeatable")
    parser.add_argument("--split", choices=("held-out", "test"), default="held-out")
    parser.add_argument("--samples", type=int, help="training inputs; default: all")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help="samples that passes see; default: %(default)s")
    parser.add_argument("--evaluate", type=int, help="samples of the test split; default: all")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--checkpoints", type=Path, help="folder for unfinished training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="rows; those in it are not made again")
    parser.add_argument("--keep", type=Path, help="folder for recovered float programs (ONNX)")
    options: Any = parser.parse_args(arguments)
    try:
        recipes = [p for text in options.recipe for p in parse(text)]
        if not all(isinstance(p, Distill) for p in recipes):
            raise OptionError("--recipe takes distill with its options")
        training = Training(None, options.checkpoints, options.device)
        setup = Setup(options.split, options.samples, options.calibration, options.evaluate, options.seed, training)
        run(options.row, recipes, setup, options.json, options.keep)  # type: ignore[arg-type]
    except GraphwrightError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
