"""Bit-exactness of the artifact against the torch reference, on this machine and for AArch64 under the emulator.

Inputs are compared in chunks, each in a runner process of its own, so that a run of hours shows where it stands and an
interrupted one still says what it found.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...backends.artifact import Artifact
from ...backends.loader import LoadedModel, load
from ...ir.errors import DataError, GraphwrightError
from ...ir.program import Program
from ..optimize import optimize
from ..sources import Source, resolve

QEMU = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")
ARM64_TARGET = "arm64:cortex-a76"
CALIBRATION_SAMPLES = 128
#: Inputs a runner process: loading a model under the emulator takes as long as a few inputs.
CHUNK = 50

Sample = tuple[torch.Tensor, ...]
Arrays = list[np.ndarray]


@dataclass
class Count:
    """Inputs whose outputs were equal in every bit, of those compared so far; `wanted` is the number asked for."""

    wanted: int
    equal: int = 0
    compared: int = 0

    def add(self, expected: Sequence[Arrays], actual: Sequence[Arrays]) -> None:
        self.equal += count_equal(expected, actual)
        self.compared += len(expected)

    def __str__(self) -> str:
        return f"{self.equal} of {self.compared}" + (f" ({self.wanted} wanted)" if self.compared < self.wanted else "")


@dataclass
class Exactness:
    """What was found for one model: `here` on this machine, `arm64` under the emulator, `held_out` of the inputs used."""

    model: str
    here: Count
    arm64: Count
    values: int = 0
    held_out: int = 0


def measure(
    model: str,
    inputs: int,
    arm64_inputs: int,
    runner: Path,
    progress: Callable[[int, int, str], None],
    after_chunk: Callable[[Exactness], None] = lambda found: None,
) -> Exactness:
    """Quantizes `model` and compares artifact and torch reference, every output value, on the first inputs of `take_samples`.

    Ctrl-C ends it early, with what was compared until then.

    Args:
        runner: gw-run for AArch64; needed where `arm64_inputs` is not 0.
        after_chunk: called with what was found so far.

    Raises:
        DataError: the model has fewer inputs than asked for. GraphwrightError: no runner, or it failed.
    """
    if arm64_inputs and not runner.exists():
        raise GraphwrightError(f"no AArch64 runner at '{runner}'; build it with: make runner")
    source = resolve(model)
    total = max(inputs, arm64_inputs)
    samples, held_out = take_samples(source, total)
    result = optimize(source.program, calibration=source.calibration(None, CALIBRATION_SAMPLES), measure=False, progress=progress)
    found = Exactness(model, Count(inputs), Count(arm64_inputs), held_out=held_out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result.artifact.save(folder / "here.gw")
        loaded = load(folder / "here.gw")
        if arm64_inputs:
            compile_arm64(result.program, progress).save(folder / "arm64.gw")
        try:
            for start in range(0, total, CHUNK):
                progress(start, total, f"compare {model}")
                chunk = samples[start : start + CHUNK]
                expected = [[y.numpy() for y in result.program(*sample)] for sample in chunk]
                found.values = sum(y.size for y in expected[0])
                here, arm64 = (max(0, min(len(chunk), wanted - start)) for wanted in (inputs, arm64_inputs))
                found.here.add(expected[:here], run_here(loaded, chunk[:here]))
                found.arm64.add(expected[:arm64], run_arm64(folder / "arm64.gw", chunk[:arm64], runner))
                after_chunk(found)
            progress(total, total, f"compare {model}")
        except KeyboardInterrupt:
            if not found.here.compared:
                raise
    return found


def take_samples(source: Source, count: int) -> tuple[list[Sample], int]:
    """`count` inputs at the program's batch size, and how many of them are held out from calibration.

    Evaluation inputs come first; where they are used up, calibration inputs follow. Equality of bits needs inputs of the right
    kind, not unseen ones.

    Raises:
        DataError: the model brings no data, or less than `count` inputs altogether.
    """
    reference, batch = source.reference, source.program.input_specs[0].shape[0] or 1
    if reference is None:
        raise DataError(f"'{source.program.name}' brings no inputs along; name a reference model")

    def pieces(batches: Iterator[Sample]) -> Iterator[Sample]:
        for inputs in batches:
            yield from zip(*(x.split(batch) for x in inputs), strict=True)

    samples = list(itertools.islice(pieces(inputs for inputs, _ in reference.evaluation()), count))
    held_out = len(samples)
    if held_out < count:
        try:
            samples += pieces(iter(reference.calibration((count - held_out) * batch)))
        except DataError as error:
            raise DataError(f"{count} inputs wanted, {source.program.name} has {held_out} for evaluation, and {error}") from error
    return samples, held_out


def compile_arm64(program: Program, progress: Callable[[int, int, str], None]) -> Artifact:
    return optimize(program, ARM64_TARGET, pipeline="", measure=False, progress=progress).artifact


def run_here(model: LoadedModel, samples: Sequence[Sample]) -> list[Arrays]:
    results = []
    for sample in samples:
        outputs = model(*[x.numpy() for x in sample])
        results.append(list(outputs) if isinstance(outputs, tuple) else [outputs])
    return results


def run_arm64(artifact: Path, samples: Sequence[Sample], runner: Path) -> list[Arrays]:
    """Runs an AArch64 artifact with gw-run under the emulator, one process for all samples."""
    if not samples:
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*QEMU, str(runner), str(artifact), "--each-sample"]
        for index, column in enumerate(zip(*samples, strict=True)):
            np.save(folder / f"in{index}.npy", torch.stack(column).numpy())
            command += ["--input", str(folder / f"in{index}.npy")]
        done = subprocess.run([*command, "--output", str(folder / "out")], capture_output=True, text=True)
        if done.returncode:
            raise GraphwrightError(f"gw-run under qemu failed with status {done.returncode}: {done.stderr.strip()}")
        columns = [np.load(path) for path in sorted(folder.glob("out*.npy"))]
    return [[column[i] for column in columns] for i in range(len(samples))]


def count_equal(expected: Sequence[Arrays], actual: Sequence[Arrays]) -> int:
    return sum(
        all(np.array_equal(e.view(np.uint8), a.view(np.uint8)) for e, a in zip(es, as_, strict=True))
        for es, as_ in zip(expected, actual, strict=True)
    )
