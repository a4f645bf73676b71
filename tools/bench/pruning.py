"""Channel pruning at a budget of multiply-accumulates, no fine-tune: our criteria and allocations beside Torch-Pruning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ir.data import Calibration
from ...ir.errors import DataError
from ...ir.onnx_export import export_onnx
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import Pipeline, parse
from ...passes.prune.prune_channels import PruneChannels
from ...search.channels import CostModel, free_groups, macs_of
from ...search.pruning import ChannelSearch, uniform_ratio
from ..sources import resolve
from .mixed import HELD_OUT
from .torch_pruning import IMPORTANCES, run_torch_pruning

Progress = Callable[[int, int, str], None]

#: Rows of a batch when a network is scored or calibrated.
BATCH = 64


@dataclass(frozen=True)
class Point:
    """One pruned network: its share of the multiply-accumulates, seconds of making it, itself at the batch of the artifact."""

    model: str
    method: str
    share: float
    score: float
    float_score: float
    seconds: float
    program: Program | None = dataclasses.field(default=None, repr=False)

    @property
    def drop(self) -> float:
        """Points lost."""
        return 100 * (self.float_score - self.score)


@dataclass(frozen=True)
class Bench:
    """A classifier with its samples.

    Attributes:
        program: canonical, with a symbolic batch: samples run many at once.
        fixed: the same with the batch that the artifact has.
        evaluation: (inputs, classes) batches.
    """

    model: str
    program: Program
    fixed: Program
    context: PassContext
    samples: int
    evaluation: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, model: str, samples: int, evaluate: int | None, progress: Progress, held_out: bool = False) -> Bench:
        """held_out: score on calibration samples behind the first `samples`, to choose by, instead of on evaluation samples.

        Raises:
            DataError: a model whose samples have no classes, or several inputs.
        """
        source, fixed = resolve(model, dynamic_batch=True), resolve(model)
        batches = source.calibration(None, samples)
        if batches is None or source.reference is None or len(source.program.inputs) != 1:
            raise DataError(f"'{model}' is no classifier of one input with samples of its own")
        rows = torch.cat([batch[0] for batch in batches])
        calibration = Calibration.for_program(source.program, [(batch,) for batch in rows.split(BATCH)])
        if held_out:
            stop = samples + (evaluate or HELD_OUT)
            labels, more = source.labels(None, None, stop), source.calibration(None, stop)
            inputs = None if more is None else torch.cat([batch[0] for batch in more])[samples:]
        else:
            pairs = list(source.reference.samples.evaluation(evaluate))
            inputs = torch.cat([batch[0] for batch, _ in pairs])
            labels = None if pairs[0][1] is None else torch.cat([classes for _, classes in pairs if classes is not None])
        if labels is None or inputs is None:
            raise DataError(f"the samples of '{model}' have no classes to score")
        labels = labels[-len(inputs) :]
        evaluation = tuple(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))
        canonical = [PassManager().run(s.program, parse("canonicalize")).program for s in (source, fixed)]
        context = PassContext(calibration=calibration, progress=progress)
        return cls(model, canonical[0], canonical[1], context, samples, evaluation)

    def accuracy(self, outputs: Sequence[torch.Tensor]) -> float:
        right = sum(int((o.argmax(1) == classes).sum()) for o, (_, classes) in zip(outputs, self.evaluation, strict=True))
        return right / sum(len(classes) for _, classes in self.evaluation)

    def score(self, program: Program) -> float:
        return self.accuracy([program(batch)[0] for batch, _ in self.evaluation])

    def run(self, method: str, plan: PruneChannels, float_score: float, before: float = 0.0) -> Point:
        """The network of a plan. before: seconds that choosing it took."""
        start = time.perf_counter()
        program = PassManager().run(self.program, Pipeline((plan,)), self.context).program
        seconds = before + time.perf_counter() - start
        # The shapes are those of the counts, whatever the weights: nothing to calibrate for the batch of the artifact.
        keep = counts_text(self.program, program)
        shape = PruneChannels(keep=keep, criterion="l2", reconstruct=False)
        fixed = PassManager().run(self.fixed, Pipeline((shape,)), PassContext()).program
        share = macs_of(program) / macs_of(self.program)
        return Point(self.model, method, share, self.score(program), float_score, seconds, fixed)


def counts_text(original: Program, pruned: Program) -> tuple[str, ...]:
    """`GROUP=COUNT` of every group that was cut."""
    sizes = {group.name: group.size for group in free_groups(original)}
    found = {group.name: group.size for group in free_groups(pruned)}
    return tuple(f"{name}={found.get(name, 1)}" for name, size in sizes.items() if found.get(name, 1) < size)


def points(bench: Bench, share: float, criteria: Sequence[str], allocated: Sequence[str]) -> Iterator[Point]:
    """The float network, every criterion at one ratio for all groups with and without reconstruction, and allocations."""
    float_score, whole = bench.score(bench.program), macs_of(bench.program)
    yield Point(bench.model, "float", 1.0, float_score, float_score, 0.0, bench.fixed)
    cost = CostModel(bench.program, free_groups(bench.program)).macs()
    ratio = uniform_ratio(cost, share * whole)
    for criterion in criteria:
        for reconstruct in (False, True):
            plan = PruneChannels(ratio=ratio, criterion=criterion, reconstruct=reconstruct)
            yield bench.run(f"{criterion}, uniform{', reconstructed' if reconstruct else ''}", plan, float_score)
    for criterion in allocated:
        start = time.perf_counter()
        plan = PruneChannels(criterion=criterion, samples=bench.samples)
        search = ChannelSearch.of(bench.program, plan, bench.context)
        options = search.solve({"macs": share * whole}).options(plan)
        yield bench.run(f"{criterion}, allocated, reconstructed", options, float_score, time.perf_counter() - start)


def peer_points(
    bench: Bench, python: Path, share: float, importances: Sequence[str] = IMPORTANCES, programs: bool = False
) -> Iterator[Point]:
    """What Torch-Pruning makes of the same weights, calibration samples and budget; `programs` to keep the networks."""
    float_score = bench.score(bench.program)
    version, found = run_torch_pruning(
        python, bench.model, share, bench.samples, [batch for batch, _ in bench.evaluation], importances, programs
    )
    for pruned in found:
        program = None if pruned.program is None else PassManager().run(pruned.program, parse("canonicalize")).program
        name = f"Torch-Pruning {version}: {pruned.method}"
        yield Point(bench.model, name, pruned.share, bench.accuracy(pruned.outputs), float_score, pruned.seconds, program)


def save_networks(rows: Sequence[Point], folder: Path) -> list[Path]:
    """The points' networks as ONNX files named by their methods, for `pruned-latency`. Our own have the shapes, not the weights.

    Raises:
        DataError: a point without its network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in rows:
        if row.program is None:
            raise DataError(f"the network of '{row.method}' was not kept; make the peer's with programs=True")
        words = "".join(c if c.isalnum() or c in ".-" else " " for c in row.method).split()
        paths.append(folder / f"{row.model}-{'-'.join(words)}.onnx")
        export_onnx(row.program, paths[-1])
    return paths
