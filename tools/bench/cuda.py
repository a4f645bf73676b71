"""Artifacts for CUDA beside PyTorch on the same GPU: fp16, channels last, eager and `torch.compile(mode="reduce-overhead")`.

    python -m graphwright.tools.bench.cuda prepare resnet50 --batches 1,8,32,128 -o folder       # where the compiler is
    python -m graphwright.tools.bench.cuda measure folder --json rows.jsonl                      # where the GPU is

`prepare` needs no GPU and `measure` no compiler, so the two need not be one machine. Tensors stay on the GPU; a time is that of
one call until its result is there, the median over calls in interleaved turns. Each row carries how the outputs compare with the
torch reference: the share of equal values, which is 1 for an integer artifact, and the largest difference.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ...ir.batch import with_batch
from ...ir.errors import DataError, TargetError
from ..progress import TerminalProgress
from ..quick import quick_program
from ..sources import resolve
from ..zoo import load as load_reference

app = typer.Typer(add_completion=False, no_args_is_help=True)

WARM_UP_RUNS = 10
#: Calls timed in one turn of a system, and turns.
CALLS, TURNS = 20, 15


@dataclass(frozen=True)
class Row:
    """One system at one batch. latency_ms: median of one call. equal: share of output values that are the reference's in every
    bit; difference: largest absolute difference to it, of values whose largest magnitude is `magnitude`."""

    model: str
    system: str
    precision: str
    batch: int
    latency_ms: float | None
    least_ms: float | None
    equal: float | None = None
    difference: float | None = None
    magnitude: float | None = None
    reason: str = ""


@app.command()
def prepare(
    models: list[str],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for artifacts and reference outputs.")],
    batches: str = "1,32",
    precisions: str = "int8",
    target: str = "cuda:sm_90",
) -> None:
    """Compiles every model at every batch size and precision, with inputs and what the torch reference makes of them."""
    from ..optimize import optimize  # brings the compiler, which `measure` does without

    out.mkdir(parents=True, exist_ok=True)
    with TerminalProgress() as progress:
        for model in models:
            source = resolve(model, dynamic_batch=True)
            if source.reference is None:
                raise DataError(f"'{model}' brings no samples along; name a reference model")
            for precision in precisions.split(","):
                program = quick_program(source, precision, progress)
                for batch in map(int, batches.split(",")):
                    fixed = with_batch(program, batch)
                    columns = zip(*source.reference.calibration(batch), strict=True)
                    inputs = [torch.cat(column)[:batch].contiguous() for column in columns]
                    stem = f"{model}.{batch}.{precision}"
                    named = [*((f"x{i}", x) for i, x in enumerate(inputs)), *((f"y{i}", y) for i, y in enumerate(fixed(*inputs)))]
                    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in named}
                    np.savez_compressed(out / f"{stem}.npz", **arrays)
                    artifact = optimize(fixed, target=target, pipeline="", measure=False, progress=progress).artifact
                    artifact.save(out / f"{stem}.gw", overwrite=True)


@app.command()
def measure(
    folder: Path,
    json_file: Annotated[Path | None, typer.Option("--json", help="Rows, one a line, written as they are found.")] = None,
    peers: str = "eager,compile",
) -> None:
    """Times every artifact of FOLDER and PyTorch on this machine's GPU."""
    if not torch.cuda.is_available():
        raise TargetError("PyTorch finds no GPU here; `prepare` runs anywhere, `measure` where the GPU is")
    pairs = sorted({tuple(path.name.split(".")[:2]) for path in folder.glob("*.gw")}, key=lambda p: (p[0], int(p[1])))
    for model, batch in pairs:
        for row in _measured(folder, model, int(batch), peers.split(",") if peers else []):
            line = json.dumps(asdict(row))
            print(line, flush=True)
            if json_file is not None:
                with json_file.open("a") as stream:
                    stream.write(line + "\n")


Call = Callable[[], Any]


def _measured(folder: Path, model: str, batch: int, peers: list[str]) -> list[Row]:
    systems: list[tuple[Row, Call]] = []
    failed: list[Row] = []
    for path in sorted(folder.glob(f"{model}.{batch}.*.gw")):
        precision = path.name.split(".")[2]
        row = Row(model, "graphwright", precision, batch, None, None)
        try:
            systems.append(_artifact(path, row))
        except Exception as error:  # a system that cannot run is a row that says why; the others are still measured
            failed.append(_failed(row, error))
    arrays = np.load(next(iter(sorted(folder.glob(f"{model}.{batch}.*.npz")))))
    inputs = [torch.from_numpy(arrays[name]).cuda() for name in sorted(arrays.files) if name.startswith("x")]
    for peer in peers:
        row = Row(model, f"torch {peer}", "float16", batch, None, None)
        try:
            systems.append((row, _torch(model, inputs, peer)))
        except Exception as error:
            failed.append(_failed(row, error))
    times: list[list[float]] = [[] for _ in systems]
    for _, call in systems:
        for _ in range(WARM_UP_RUNS):
            call()
    for _ in range(TURNS):
        for (_, call), found in zip(systems, times, strict=True):
            found += [_timed(call) for _ in range(CALLS)]
    return [_with_times(row, found) for (row, _), found in zip(systems, times, strict=True)] + failed


def _timed(call: Call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _with_times(row: Row, times: list[float]) -> Row:
    return replace(row, latency_ms=round(statistics.median(times), 4), least_ms=round(min(times), 4))


def _failed(row: Row, error: Exception) -> Row:
    words = (str(error).strip().splitlines() or [""])[-1][:300]
    return replace(row, reason=f"{type(error).__name__}: {words}")


def _artifact(path: Path, row: Row) -> tuple[Row, Call]:
    """The artifact's call on tensors of the GPU, and the row with what its outputs are worth."""
    from ...backends.loader import load

    model = load(path)
    arrays = np.load(path.with_suffix(".npz"))
    inputs = [torch.from_numpy(arrays[name]).cuda() for name in sorted(arrays.files) if name.startswith("x")]
    expected = [arrays[name] for name in sorted(arrays.files) if name.startswith("y")]
    outputs = model(*inputs)
    found = [y.cpu().numpy() for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
    equal = sum(int((a == b).sum()) for a, b in zip(found, expected, strict=True)) / sum(y.size for y in expected)
    difference = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(found, expected, strict=True))
    magnitude = max(float(np.abs(y).max()) for y in expected)
    return replace(row, equal=equal, difference=difference, magnitude=magnitude), lambda: model(*inputs)


def _torch(model: str, inputs: list[torch.Tensor], mode: str) -> Call:
    """The zoo's network in half precision: eager, or compiled into CUDA graphs."""
    module = load_reference(model).model.eval().half().cuda()
    given = [x.half() if x.is_floating_point() else x for x in inputs]
    if given[0].dim() == 4:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given = [x.to(memory_format=torch.channels_last) for x in given]
    if mode == "compile":
        module = torch.compile(module, mode="reduce-overhead")

    def call() -> Any:
        with torch.no_grad():
            return module(*given)

    call()
    return call


if __name__ == "__main__":
    app()
