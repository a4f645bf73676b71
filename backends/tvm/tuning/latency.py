"""Times of kernels measured on a GPU elsewhere: what a plan for a GPU is priced with on a machine that has none.

    JSON lines, one kernel each:
    {"kernel": "convolution_int int8 96x56x56 -> 24x56x56, 1x1; 2304 of 382208 bytes are weights", "level": "sm_90", ...}

A kernel is known by what it does: its family, element type and shapes, and the bytes of its weights, which tell 4 bits from 8.
`python -m graphwright.tools.bench.cuda_latency` makes the rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ....ir.errors import TuningError
from ....ir.files import write_atomically
from ...base import Compiled, KernelRow, StepTimes


@dataclass(frozen=True)
class LatencyRow:
    """microseconds: the kernel's share of a whole run of the program it was measured in."""

    kernel: str
    level: str
    microseconds: float
    machine: str
    date: str


def kernel_key(row: KernelRow) -> str:
    """A name says which of its family a kernel is in its program; that number goes. Codes take as long, u8 or s8."""
    family, dtype = row.name.rstrip("0123456789"), "int8" if row.dtype == "uint8" else row.dtype
    words = " ".join(filter(None, (family, dtype, row.shape)))
    return f"{words}; {row.weights} of {row.bytes} bytes are weights"


def path_of(arch: str) -> Path:
    return Path(__file__).parent / f"{arch}-latency.jsonl"


def read(path: Path) -> list[LatencyRow]:
    """Rows of a file; none where there is no file. Raises TuningError for a line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            rows.append(LatencyRow(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise TuningError(f"line {number} of the latency table '{path}' is no row ({error}); delete the line") from error
    return rows


def write(path: Path, rows: Iterable[LatencyRow]) -> None:
    """Sorted, one kernel and level a line; of two rows for one the later holds."""
    kept = {(row.level, row.kernel): row for row in rows}
    write_atomically(path, "".join(json.dumps(asdict(kept[key])) + "\n" for key in sorted(kept)).encode())


def recorded(compiled: Compiled) -> StepTimes | None:
    """What the kernels of a compiled program took where they were measured; None where one of them never was."""
    known = _table(compiled.target.arch)[0]
    found = [known.get((compiled.target.level, kernel_key(row))) for row in compiled.kernels]
    times = tuple(time for time in found if time is not None)
    return StepTimes(times, sum(times)) if times and len(times) == len(found) else None


def version(arch: str) -> str:
    """A hash of the table: prices taken from another one do not hold."""
    return _table(arch)[1]


@functools.cache
def _table(arch: str) -> tuple[dict[tuple[str, str], float], str]:
    rows = read(path_of(arch))
    return {(row.level, row.kernel): row.microseconds for row in rows}, hashlib.sha256(repr(rows).encode()).hexdigest()
