"""What a layer costs in each format, read off programs compiled with every layer in that one format.

One compilation a format gives the size and the time of every layer in place: operands lie in the caches where they will lie, what
is fused into the layer's kernel counts with it, and the sum over layers is the program. Nothing is predicted from shapes. The
formats are timed in turns: choices rest on their differences, and a machine's clock moves by more within a minute.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...backends.base import Backend, Compiled, StepTimes, example_inputs
from ...backends.target import Target
from ...ir.content import content_key
from ...ir.data import Calibration
from ...ir.dialect import gw
from ...ir.program import Program, origin_of
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import Pipeline
from ..store import Store
from .bops import multiplications, products

#: Integer ops that are layers; everything else is the program's fixed part.
LAYER_OPS = (gw.convolution.default, gw.linear.default)
#: What turns a layer's sums into codes or floats; its factors count with the layer.
RESCALES = (gw.rescale.default, gw.rescale_dyadic.default, gw.scale.default)
#: Samples that fix the ranges of these programs: their values do not matter, their shapes do.
SAMPLES = 2


@dataclass(frozen=True)
class FormatCosts:
    """Costs of a program with every layer in one format.

    Attributes:
        bytes: origin -> bytes of the layer's parameters (codes, zero points, scales, bias).
        bops: origin -> bit operations; `fixed_bops`: those of products of two activations and of layers left in float.
        microseconds: origin -> median time of the kernels that compute the layer; empty where nothing was timed.
        artifact_bytes: of the whole compiled library.
        total: median microseconds of a run; None where nothing was timed.
    """

    bytes: dict[str, int]
    bops: dict[str, int]
    fixed_bops: int
    microseconds: dict[str, float]
    artifact_bytes: int
    total: float | None

    @property
    def fixed_bytes(self) -> int:
        """What of the library belongs to no layer: machine code and everything else."""
        return self.artifact_bytes - sum(self.bytes.values())

    @property
    def fixed_microseconds(self) -> float | None:
        return None if self.total is None else self.total - sum(self.microseconds.values())


@dataclass(frozen=True)
class Pricing:
    """How to price: on which backend and target, and whether to time (the target must run on this machine).

    Untimed, layers have the times that the backend has recorded for the target, where it has all.
    """

    backend: Backend
    target: Target
    time: bool
    repeats: int = 200


def uniform_costs(
    program: Program,
    tail: Callable[[str], Pipeline],
    formats: Sequence[str],
    pricing: Pricing,
    samples: Calibration,
    store: Store,
    progress: Callable[[int, int, str], None],
) -> dict[str, FormatCosts]:
    """Format -> costs. Compiled and timed once for each program, set of formats, target and machine; kept in `store`.

    Args:
        program: float, as the passes before `quantize` left it.
        tail: format -> the passes that quantize every layer to it and lower it to integers.
    """
    pipelines = [tail(name) for name in formats]
    here = (platform.processor() or platform.machine(), platform.node())
    machine = here if pricing.time else pricing.backend.records(pricing.target)
    texts = [str(pipeline) for pipeline in pipelines]
    key = content_key(program, texts, str(pricing.target), pricing.time, pricing.repeats, machine)
    kept = store.remember("costs", key, lambda: _price(program, pipelines, pricing, samples, progress))
    progress(len(formats), len(formats), "price formats")
    return {name: FormatCosts(**costs) for name, costs in zip(formats, kept, strict=True)}


def _price(
    program: Program,
    pipelines: Sequence[Pipeline],
    pricing: Pricing,
    samples: Calibration,
    progress: Callable[[int, int, str], None],
) -> list[dict[str, Any]]:
    context = PassContext(calibration=Calibration(samples.samples[:SAMPLES]))
    made: list[tuple[Program, Compiled]] = []
    for index, pipeline in enumerate(pipelines):
        progress(index, len(pipelines), "price formats")
        lowered = PassManager().run(program, pipeline, context).program
        made.append((lowered, pricing.backend.compile(lowered, pricing.target)))
    times: Sequence[StepTimes | None]
    if pricing.time:
        timed = [(compiled, example_inputs(lowered)) for lowered, compiled in made]
        times = pricing.backend.profiles(timed, pricing.repeats)
    else:
        times = [pricing.backend.recorded(compiled) for _, compiled in made]
    return [_costs(lowered, compiled, spent) for (lowered, compiled), spent in zip(made, times, strict=True)]


def _costs(lowered: Program, compiled: Compiled, times: StepTimes | None) -> dict[str, Any]:
    bops, fixed_bops = layer_bops(lowered)
    return {
        "bytes": layer_bytes(lowered),
        "bops": bops,
        "fixed_bops": fixed_bops,
        "microseconds": {} if times is None else layer_times(lowered, compiled, times),
        "artifact_bytes": len(compiled.library),
        "total": None if times is None else times.total,
    }


def layer_bytes(program: Program) -> dict[str, int]:
    """Origin -> bytes of the parameters a layer of an integer program reads, those of its rescaling included.

    A parameter that several layers share counts with the first.
    """
    counted: set[str] = set()
    found: dict[str, int] = {}
    for layer in program.nodes:
        if layer.target not in LAYER_OPS:
            continue
        own = {name: value for name, value in _parameters_of(program, layer).items() if name not in counted}
        counted.update(own)
        size = sum(value.numel() * value.element_size() for value in own.values())
        found[origin_of(layer)] = found.get(origin_of(layer), 0) + size
    return found


def _parameters_of(program: Program, layer: fx.Node) -> dict[str, torch.Tensor]:
    """Name -> tensor of what a layer and its rescaling read, behind the ops that unpack weights too."""
    readers = [layer, *(user for user in layer.users if user.target in RESCALES)]
    pending = [read for reader in readers for read in reader.all_input_nodes if read is not layer]
    found: dict[str, torch.Tensor] = {}
    while pending:
        read = pending.pop()
        if read.target in (gw.unpack.default, gw.from_bitmask.default):
            pending.extend(read.all_input_nodes)
        value = program.parameter(read)
        if value is not None:
            found[str(read.target)] = value
    return found


def layer_bops(program: Program) -> tuple[dict[str, int], int]:
    """Origin -> bit operations of each integer layer, and those of all other products."""
    found: dict[str, int] = {}
    fixed = 0
    for work in products(program):
        bops = work.macs * work.value_bits * work.weight_bits
        if work.node.target in LAYER_OPS:
            found[origin_of(work.node)] = found.get(origin_of(work.node), 0) + bops
        else:
            fixed += bops
    return found, fixed


def layer_times(program: Program, compiled: Compiled, times: StepTimes, ops: Sequence[Any] = LAYER_OPS) -> dict[str, float]:
    """Origin -> microseconds of the kernels of `ops`. A kernel that computes several is shared out by their multiplications."""
    work = {n.name: (origin_of(n), multiplications(n)) for n in program.nodes if n.target in ops}
    found = {origin: 0.0 for origin, _ in work.values()}
    for row, spent in zip(compiled.kernels, times.microseconds, strict=True):
        covered = [work[name] for name in row.nodes if name in work]
        whole = sum(macs for _, macs in covered)
        for origin, macs in covered:
            found[origin] += spent * macs / whole
    return found
