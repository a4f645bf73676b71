"""Compile time and peak memory of a model, without tuning, in a process of its own.

    python -m graphwright.tools.bench.compile_cost resnet50

prints one JSON line a precision. Quantization comes before and is not counted; the peak is the whole process while it compiles.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(model: str) -> None:
    from ...backends.target import Target
    from ...backends.tvm.backend import TVMBackend
    from ...backends.tvm.tuning import TuningDatabase
    from ..quick import PRECISIONS, quick_program
    from ..sources import resolve

    source, target = resolve(model), Target.parse("cpu")
    for precision in PRECISIONS:
        program = quick_program(source, precision)
        reset_peak()
        start = time.perf_counter()
        compiled = TVMBackend(TuningDatabase()).compile(program, target)
        seconds = time.perf_counter() - start
        row = {"model": model, "precision": precision, "seconds": round(seconds, 1), "gib": round(peak_gib(), 2)}
        print(json.dumps({**row, "kernels": len(compiled.kernels), "library": len(compiled.library)}), flush=True)


def reset_peak() -> None:
    """Makes the kernel count this process's peak memory anew (Linux, proc(5): clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main(sys.argv[1])
