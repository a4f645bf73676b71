"""The latency table that prices plans for a GPU on a machine without one: `backends/tvm/tuning/cuda-latency.jsonl`.

    python -m graphwright.tools.bench.cuda_latency prepare resnet20 -o folder       # where the compiler is
    python -m graphwright.tools.bench.cuda_latency measure folder rows.jsonl        # where the GPU is
    python -m graphwright.tools.bench.cuda_latency merge rows.jsonl                 # into the table that ships

`prepare` compiles the float program and the integer program with all weights in each format, as the bit search prices them.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ...backends.base import Compiled, KernelRow, example_inputs
from ...backends.target import Target
from ...backends.tvm.profile import row_times
from ...backends.tvm.tuning import latency

app = typer.Typer(add_completion=False, no_args_is_help=True)

#: Runs whose whole time is taken, and runs that are timed kernel by kernel.
RUNS, PROFILES = 400, 60


@app.command()
def prepare(
    models: list[str],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for libraries and what their kernels are.")],
    formats: str = "int8,int4,int2",
    target: str = "cuda:sm_90",
) -> None:
    """Compiles each model in float32 and in every format."""
    from ...backends.registry import backend_for  # these bring the compiler, which `measure` does without
    from ...ir.data import Calibration
    from ...passes.base import PassContext
    from ...passes.manager import PassManager
    from ...passes.pipeline import parse
    from ...search.cost.uniform import SAMPLES
    from ...search.planner import Surroundings
    from ...search.planner import prepare as ready_for
    from ..defaults import search_pipeline
    from ..sources import resolve

    chosen, manager = Target.parse(target), PassManager()
    backend = backend_for(chosen)
    out.mkdir(parents=True, exist_ok=True)
    for model in models:
        source = resolve(model)
        samples = Calibration.for_program(source.program, source.calibration(None, SAMPLES) or [])
        split, ready = ready_for(source.program, parse(search_pipeline(source.program)), Surroundings(samples))
        programs = {"float32": manager.run(source.program, parse("canonicalize")).program}
        for name in formats.split(","):
            programs[name] = manager.run(ready, split.uniform(name), PassContext(calibration=samples)).program
        for name, program in programs.items():
            compiled = backend.compile(program, chosen)
            (out / f"{model}.{name}.so").write_bytes(compiled.library)
            inputs: dict[str, Any] = {f"x{i}": x.numpy() for i, x in enumerate(example_inputs(program))}
            np.savez_compressed(out / f"{model}.{name}.npz", **inputs)
            (out / f"{model}.{name}.json").write_text(json.dumps([str(chosen), [asdict(row) for row in compiled.kernels]]))


@app.command()
def measure(folder: Path, rows: Path) -> None:
    """Times every kernel of every library of FOLDER on this machine's GPU; ROWS is written as they are found."""
    for path in sorted(folder.glob("*.so")):
        target, kernels = json.loads(path.with_suffix(".json").read_text())
        compiled = Compiled(Target.parse(target), path.read_bytes(), tuple(KernelRow(**row) for row in kernels))
        arrays = np.load(path.with_suffix(".npz"))
        times = kernel_times(compiled, [torch.from_numpy(arrays[name]).cuda() for name in sorted(arrays.files)])
        machine, date = torch.cuda.get_device_name(), time.strftime("%Y-%m-%d")
        with rows.open("a") as stream:
            for row, spent in zip(compiled.kernels, times, strict=True):
                key = latency.kernel_key(row)
                stream.write(
                    json.dumps(asdict(latency.LatencyRow(key, compiled.target.level, round(spent, 3), machine, date))) + "\n"
                )
        print(json.dumps({"program": path.stem, "microseconds": round(sum(times), 2), "kernels": len(times)}), flush=True)


@app.command()
def merge(rows: list[Path]) -> None:
    """Puts measured rows into the table."""
    table = latency.path_of("cuda")
    latency.write(table, [*latency.read(table), *(row for path in rows for row in latency.read(path))])


def kernel_times(compiled: Compiled, inputs: list[torch.Tensor]) -> list[float]:
    """Microseconds of each kernel row, tensors on the GPU.

    Events between kernels cost as much as short kernels do: the shares are those of a run with them, the sum that of one without.
    """
    from ...backends.tvm.executor import aligned_empty, load_bytes, to_tvm

    program = load_bytes(compiled.library)
    outputs = [torch.empty(shape, dtype=getattr(torch, dtype.name), device="cuda") for shape, dtype in program.outputs]
    for _ in range(RUNS // 4):
        program.run_on_device(inputs, outputs)
    totals = []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(RUNS):
            program.run_on_device(inputs, outputs)
        stop.record()
        stop.synchronize()
        totals.append(start.elapsed_time(stop) * 1e3 / RUNS)
    hosts = [to_tvm(x.cpu().numpy()) for x in inputs]
    results = [to_tvm(aligned_empty(shape, dtype)) for shape, dtype in program.outputs]
    columns = [row_times(compiled.kernels, program.step_names, program.profile(hosts, results)) for _ in range(PROFILES)]
    medians = [statistics.median(column) for column in zip(*columns, strict=True)]
    return [spent * min(totals) / sum(medians) for spent in medians]


if __name__ == "__main__":
    app()
