"""Runs a pipeline and holds every pass to its word; the rows it writes are the model's certificate."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..ir.data import Sample, random_sample
from ..ir.errors import CalibrationError, GraphwrightError, PassContractError, PassError, VerificationError
from ..ir.files import make_folder
from ..ir.printer import print_program
from ..ir.program import HALF, Program, Stage, half_node, tensors_of
from ..ir.verify import verify
from .base import Pass, PassContext
from .order import check_order
from .pipeline import Pipeline, pass_text

#: Re-association tolerance of exact float passes, relative to the largest magnitude of the output.
EXACT_TOLERANCE = 1e-4

#: The same where values have 16 bits, in units of their roundoff: each op between rounds once.
HALF_ROUNDINGS = 16


@dataclass(frozen=True)
class Difference:
    """How far outputs moved: largest |after - before|, the same over the largest |before|, and the signal-to-noise ratio."""

    max_abs: float
    relative: float
    sqnr_db: float
    #: Where the outputs first differ: (output, flat index, before, after); None where they are bit-equal.
    first: tuple[int, int, float, float] | None = None


@dataclass(frozen=True)
class CertificateRow:
    """What one pass did, with its evidence. Sizes are bytes of the parameters the graph reads."""

    index: int
    name: str
    text: str
    effect: str
    modified: bool
    stage: str
    seconds: float
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    probes: int
    max_abs: float
    relative: float
    sqnr_db: float | None
    stats: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite difference (outputs that were all zero and no longer are) becomes null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


class Instrument:
    """The one hook on a pipeline run: dumps, printing, progress and profiling all hang here."""

    def before(self, index: int, total: int, instance: Pass, program: Program) -> None: ...

    def after(self, row: CertificateRow, total: int, program: Program) -> None: ...


class Dump(Instrument):
    """Writes `000_input.txt`, then `NNN_pass-name.txt` after every pass, into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def before(self, index, total, instance, program):
        if index == 1:
            (self.folder / "000_input.txt").write_text(print_program(program))

    def after(self, row, total, program):
        (self.folder / f"{row.index:03d}_{row.name}.txt").write_text(print_program(program))


class PrintAfter(Instrument):
    """Prints the program after the named passes."""

    def __init__(self, names: Sequence[str], write=print) -> None:
        self.names, self.write = frozenset(names), write

    def after(self, row, total, program):
        if row.name in self.names:
            self.write(f"// after {row.text}\n{print_program(program)}")


@dataclass(frozen=True)
class PipelineResult:
    program: Program
    certificate: tuple[CertificateRow, ...]


class PassManager:
    """Runs passes in order; verifies the stage and compares probe outputs after each one.

    Probes are `context.probes`, two calibration samples and, where every input is float, two random ones. Exact passes are
    held to all of them. Lossy and bounded ones are judged on the real samples alone where there are any: noise lies outside
    the ranges they were calibrated for, and a loss measured on it says nothing.
    """

    def __init__(self, instruments: Sequence[Instrument] = ()) -> None:
        self.instruments = tuple(instruments)

    def run(self, program: Program, pipeline: Pipeline, context: PassContext | None = None) -> PipelineResult:
        """Raises PassContractError where a pass breaks its contract, PassError where one fails or cannot follow those before it.

        CalibrationError: samples that the program does not run on.
        """
        check_order(program, pipeline)
        context = context or PassContext()
        context = replace(context, original=context.original or program)
        verify(program)
        probes, real = select_probes(program, context)
        expected = [_first_run(program, index, probe) for index, probe in enumerate(probes)]
        rows: list[CertificateRow] = []
        for index, instance in enumerate(pipeline, 1):
            for instrument in self.instruments:
                instrument.before(index, len(pipeline), instance, program)
            row, program, expected = self._step(index, instance, program, context, probes, real, expected, rows)
            rows.append(row)
            for instrument in self.instruments:
                instrument.after(row, len(pipeline), program)
        return PipelineResult(program, tuple(rows))

    def _step(self, index, instance, before, context, probes, real, expected, done):
        history = ",".join(row.text for row in done) or "(none)"
        where = f"pass {index} '{pass_text(instance)}' (after {history})"
        start = time.perf_counter()
        contents = _checksums(before)
        try:
            instance.requires(before, context)
            result = instance.run(before.clone(), context)
            result.program.sweep()
            if instance.leaves is not None:
                result.program.stage = instance.leaves
            instance.ensures(result, context)
            if result.modified:  # else it is as it was verified, or the lie is found below
                verify(result.program)
        except VerificationError as error:
            raise PassContractError(f"{where} left an invalid program: {error}") from error
        except PassError as error:
            raise type(error)(f"{where}: {error}") from error
        except GraphwrightError:
            raise
        except Exception as error:
            raise PassError(f"{where} crashed: {type(error).__name__}: {error}") from error
        after = result.program
        _check_untouched(where, before, contents)
        _check_interface(where, before, after)
        _check_modified(where, result.modified, before, after)
        actual = [_run(where, after, probe) for probe in probes] if result.modified else expected
        judged = len(probes) if instance.effect.kind == "exact" or not real else real
        difference = compare(expected[:judged], actual[:judged])
        _check_effect(where, instance, difference, after, history)
        row = CertificateRow(
            index, instance.name, pass_text(instance), str(instance.effect), result.modified, after.stage.label,
            round(time.perf_counter() - start, 4), len(before.graph.nodes), len(after.graph.nodes), parameter_bytes(before),
            parameter_bytes(after), judged, difference.max_abs, difference.relative,
            None if math.isinf(difference.sqnr_db) else difference.sqnr_db, result.stats,
        )  # fmt: skip
        return row, after, actual


def select_probes(program: Program, context: PassContext) -> tuple[list[Sample], int]:
    """All probes, the real samples first, and how many of them are real."""
    probes = list(context.probes)
    if context.calibration is not None:
        probes.extend(context.calibration.samples[:2])
    generator = torch.Generator().manual_seed(context.seed)
    # A symbolic batch is tried at two sizes: a pass that fixed it shows at the second.
    random = [random_sample(program.input_specs, generator, dynamic) for dynamic in (1, 3)]
    return probes + [sample for sample in random if sample is not None], len(probes)


def _first_run(program: Program, index: int, probe: Sample) -> tuple[torch.Tensor, ...]:
    try:
        return program(*probe)
    except Exception as error:
        raise CalibrationError(
            f"'{program.name}' does not run on sample {index} of its calibration: {type(error).__name__}: {error}; "
            "give values that the model takes, such as token ids within its vocabulary"
        ) from error


def _run(where: str, after: Program, probe: Sample) -> tuple[torch.Tensor, ...]:
    try:
        return after(*probe)
    except Exception as error:
        raise PassContractError(f"{where} left a program that does not run: {type(error).__name__}: {error}") from error


def compare(before: Sequence[Sequence[torch.Tensor]], after: Sequence[Sequence[torch.Tensor]]) -> Difference:
    """Compares outputs probe by probe, over all outputs. A NaN on one side only counts as an infinite difference."""
    max_abs = relative = signal = noise = 0.0
    first = None
    for expected_outputs, actual_outputs in zip(before, after, strict=True):
        for output, (expected, actual) in enumerate(zip(expected_outputs, actual_outputs, strict=True)):
            e, a = expected.to(torch.float64).flatten(), actual.to(torch.float64).flatten()
            same = (e == a) | (e.isnan() & a.isnan())
            if bool(same.all()):
                signal += float(e.nan_to_num().square().sum())
                continue
            gap = torch.where(same, 0.0, (a - e).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
            if first is None:
                at = int((~same).nonzero()[0])
                first = (output, at, float(e[at]), float(a[at]))
            max_abs = max(max_abs, float(gap.max()))
            peak = float(e.abs().nan_to_num().max())
            relative = max(relative, float(gap.max()) / peak if peak else math.inf)
            signal += float(e.nan_to_num().square().sum())
            noise += float(gap.square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf
    return Difference(max_abs, relative, sqnr, first)


def exact_tolerance(program: Program) -> float:
    """How far an exact pass may move the outputs, relative to their largest magnitude."""
    half = half_node(program)
    if half is None:
        return EXACT_TOLERANCE
    dtype = next(v.dtype for v in tensors_of(half) if v.dtype in HALF)
    return HALF_ROUNDINGS * torch.finfo(dtype).eps / 2


def parameter_bytes(program: Program) -> int:
    return sum(t.numel() * t.element_size() for t in program.parameters().values())


def _check_interface(where: str, before: Program, after: Program) -> None:
    for kind, old, new in (
        ("inputs", before.input_specs, after.input_specs),
        ("outputs", before.output_specs, after.output_specs),
    ):
        if [(s.shape, s.dtype) for s in old] != [(s.shape, s.dtype) for s in new]:
            raise PassContractError(
                f"{where} changed the program's {kind}: {', '.join(map(str, old))} became {', '.join(map(str, new))}"
            )


def _checksums(program: Program) -> dict[str, int]:
    """A checksum of every parameter's bytes. A version counter would be cheaper, but writes through `.data` pass it by."""
    return {name: zlib.crc32(_bytes(value)) for name, value in program.parameters().items()}


def _bytes(value: torch.Tensor) -> Any:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _check_untouched(where: str, before: Program, contents: dict[str, int]) -> None:
    for name, checksum in _checksums(before).items():
        if checksum != contents[name]:
            raise PassContractError(
                f"{where} wrote into parameter '{name}', which the program before the pass and the model it came from share; "
                "make a new tensor and give it to Program.replace_parameter"
            )


def _check_modified(where: str, modified: bool, before: Program, after: Program) -> None:
    changed = before.stage != after.stage or _differs(before, after)
    if changed and not modified:
        # The sweep after every pass may have dropped dead nodes that were there before; they are not the pass's doing.
        before = before.clone()
        before.sweep()
        changed = before.stage != after.stage or _differs(before, after)
    if changed and not modified:
        raise PassContractError(
            f"{where} says modified=False but changed the program; return modified=True where an edit was made"
        )
    if modified and not changed:
        raise PassContractError(f"{where} says modified=True but left the program as it was; fixed-point drivers would never end")


def _differs(before: Program, after: Program) -> bool:
    """Structural difference: another graph text, or a parameter with other values."""
    if print_program(before) != print_program(after):
        return True
    old, new = before.parameters(), after.parameters()
    return any(old[k] is not new[k] and not torch.equal(old[k], new[k]) for k in old)


def _check_effect(where: str, instance: Pass, difference: Difference, after: Program, history: str) -> None:
    effect = instance.effect
    if difference.first is None or (effect.kind == "lossy" and difference.max_abs < math.inf):
        return
    exact_bits = effect.kind == "exact" and after.stage is Stage.INTEGER
    limit = 0.0 if exact_bits else exact_tolerance(after) if effect.kind == "exact" else effect.tolerance
    # A lossy pass may change values, but never make one infinite or NaN.
    if limit is not None and difference.relative <= limit:
        return
    bound = "no NaN or infinity may appear" if limit is None else f"limit {limit:g}"
    output, at, old, new = difference.first
    prefix = pass_text(instance) if history == "(none)" else f"{history},{pass_text(instance)}"
    raise PassContractError(
        f"{where} declares itself {effect} but moved the outputs by {difference.relative:.3g} of their largest magnitude "
        f"({bound}); first differing value: output {output}, element {at}: {old:.9g} became {new:.9g}\n"
        f"reproduce: graphwright rewrite MODEL -p '{prefix}'"
    )
