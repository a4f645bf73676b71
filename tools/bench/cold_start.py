"""Cold start: from a file on disk to the first answer, in a new process each time, ours and ONNX Runtime's.

Files are in the page cache for all. `process`: from the start of the process to the answer, interpreter and imports included.
`load`: from the call that loads the model to the answer, imports done. gw-run has no imports; its whole life counts as both.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...ir.errors import GraphwrightError
from ..quick import PRECISIONS, quick_program
from ..sources import resolve
from .latency import prepare
from .systems import ort_quantized

_READ = "import sys, time, numpy as np; model, threads, *inputs = sys.argv[1:]; xs = [np.load(p) for p in inputs]; "
_GRAPHWRIGHT = _READ + (
    "from graphwright import load; start = time.time(); load(model, threads=int(threads))(*xs); print(start, time.time())"
)
_ORT = _READ + (
    "import onnxruntime as ort; start = time.time(); o = ort.SessionOptions(); o.intra_op_num_threads = int(threads); "
    "s = ort.InferenceSession(model, o, providers=['CPUExecutionProvider']); "
    "s.run(None, dict(zip([i.name for i in s.get_inputs()], xs))); print(start, time.time())"
)


@dataclass(frozen=True)
class ColdStart:
    """Median milliseconds over the rounds."""

    system: str
    precision: str
    process: float
    load: float


def measure_cold_start(
    model: str, threads: int, rounds: int, runner: Path, folder: Path, progress: Callable[[int, int, str], None]
) -> list[ColdStart]:
    """Starts each system `rounds` times, in turn. folder: an empty one for the files.

    Raises:
        GraphwrightError: no runner, or a system that fails.
    """
    if not runner.exists():
        raise GraphwrightError(f"no runner at '{runner}'; build it with: make runner")
    source = resolve(model, dynamic_batch=True)
    prepare(source, {p: quick_program(source, p, progress) for p in PRECISIONS}, 1, folder, progress)
    with np.load(folder / "samples.npz") as loaded:
        samples = dict(loaded)
    inputs = []
    for index, value in enumerate(samples.values()):
        inputs.append(folder / f"x{index}.npy")
        np.save(inputs[-1], value[0])
    ort_quantized(folder, samples)
    flags = [word for path in inputs for word in ("--input", str(path))]
    ours = [str(runner), str(folder / "int8.gw"), "--threads", str(threads), *flags, "--output", str(folder / "y")]
    commands: dict[tuple[str, str], list[str]] = {("gw-run", "int8"): ours}
    for system, precision, code, file in (
        ("graphwright, Python", "int8", _GRAPHWRIGHT, "int8.gw"),
        ("onnxruntime, Python", "int8", _ORT, "ort-int8.onnx"),
        ("graphwright, Python", "float32", _GRAPHWRIGHT, "float.gw"),
        ("onnxruntime, Python", "float32", _ORT, "float.onnx"),
    ):
        commands[system, precision] = [sys.executable, "-c", code, str(folder / file), str(threads), *map(str, inputs)]
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in commands}
    for index in range(rounds + 1):
        progress(index, rounds + 1, "cold starts")
        for key, command in commands.items():
            found = _start(command)
            if index:  # the first round brings files into the page cache
                times[key].append(found)
    progress(rounds + 1, rounds + 1, "cold starts")
    medians = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in times.items()}
    return [ColdStart(*key, process=m[0], load=m[1]) for key, m in medians.items()]


def _start(command: list[str]) -> tuple[float, float]:
    """(process, load) milliseconds of one start."""
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    end = time.time()
    if done.returncode:
        raise GraphwrightError(f"'{Path(command[0]).name}' failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    if command[0] != sys.executable:
        return (end - start) * 1e3, (end - start) * 1e3
    loading, answered = (float(word) for word in done.stdout.split()[-2:])
    return (answered - start) * 1e3, (answered - loading) * 1e3
