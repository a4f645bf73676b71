"""Tables for docs/BENCHMARKS.md."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from ...backends.host import host_arch, host_level, host_threads


def machine() -> str:
    """Machine class and date, the line every table carries."""
    return f"{host_arch()}:{host_level()}, {host_threads()} cores, {datetime.date.today().isoformat()}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
