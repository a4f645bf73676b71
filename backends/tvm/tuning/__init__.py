"""Tuned kernels: what was measured to be the fastest cut of a kernel, by specification and instruction-set level.

    JSON lines, one measured kernel each:
    {"key": "convolution_int8 uint8 96x56x56 -> 24x56x56, 1x1", "level": "avx512-vnni", "choice": {"panels": 2, ...}, ...}

Rows for the shapes of the reference models ship with the package; a user's own (`graphwright tune`) override them. A row says
how a kernel is cut and nothing else: results are the same bits with any row and with none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ....ir.errors import TuningError
from ....ir.files import make_folder, write_atomically
from ...cache import cache_folder

Choice = dict[str, int | bool]


@dataclass(frozen=True)
class TuningRow:
    """One measured kernel. choice: None where nothing beat the analytical guess, which then stays.

    microseconds and guess_microseconds: least times of the choice and of the guess, on `threads` threads of `machine`.
    """

    key: str
    level: str
    choice: Choice | None
    microseconds: float
    guess_microseconds: float
    threads: int
    machine: str
    date: str


class TuningDatabase:
    """Rows by (key, level); of two rows for one kernel the later one holds."""

    def __init__(self, rows: Iterable[TuningRow] = ()) -> None:
        self._rows = {(row.key, row.level): row for row in rows}

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: str, level: str) -> TuningRow | None:
        return self._rows.get((key, level))

    @property
    def rows(self) -> list[TuningRow]:
        return list(self._rows.values())

    def with_row(self, row: TuningRow) -> TuningDatabase:
        return TuningDatabase([*self._rows.values(), row])

    def write(self, path: Path) -> None:
        """Sorted, one row a line, so that a re-measured row is a one-line change. Raises OutputError."""
        make_folder(path.parent)
        rows = sorted(self._rows.values(), key=lambda row: (row.level, row.key))
        write_atomically(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())

    @classmethod
    def read(cls, path: Path) -> TuningDatabase:
        """An absent file is an empty database. Raises TuningError for a file that is no database."""
        if not path.exists():
            return cls()
        rows = []
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TuningError(f"'{path}' is no tuning database: {error}; name another file") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows.append(TuningRow(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise TuningError(
                    f"line {number} of the tuning database '{path}' is no row ({error}); delete the line"
                ) from error
        return cls(rows)

    @classmethod
    def of(cls, arch: str) -> TuningDatabase:
        """The rows that ship with the package, under the user's own."""
        return cls([*cls.read(shipped_path(arch)).rows, *cls.read(user_path(arch)).rows])


def shipped_path(arch: str) -> Path:
    return Path(__file__).parent / f"{arch}.jsonl"


def user_path(arch: str) -> Path:
    return cache_folder() / "tuning" / f"{arch}.jsonl"
