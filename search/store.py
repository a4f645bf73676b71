"""What long stages have found, on disk: a killed run goes on where it was, a second run re-solves in seconds.

A store is a folder of small JSON files, one a key. A key is a hash of everything the value depends on: the program's weights and
graph, the samples, the options. Writes are whole or not at all, so a kill at any moment loses at most the piece being computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..ir.errors import DataError
from ..ir.files import make_folder, write_atomically


class Store:
    """Values by kind and key. Without a folder nothing is kept."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, kind: str, key: str) -> Any | None:
        """The value, or None where there is none.

        Raises:
            DataError: the file is damaged, which no kill of ours leaves behind.
        """
        path = self._path(kind, key)
        if path is None or not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"the cache file {path} is damaged ({error}): delete it and run again") from error

    def put(self, kind: str, key: str, value: Any) -> None:
        """Keeps a JSON value."""
        path = self._path(kind, key)
        if path is not None:
            make_folder(path.parent)
            write_atomically(path, json.dumps(value).encode())

    def remember(self, kind: str, key: str, compute: Callable[[], Any]) -> Any:
        """The kept value, or that of `compute()`, then kept."""
        value = self.get(kind, key)
        if value is None:
            value = compute()
            self.put(kind, key, value)
        return value

    def _path(self, kind: str, key: str) -> Path | None:
        return None if self.folder is None else self.folder / kind / f"{key}.json"
