"""What long stages have found, on disk: a killed run goes on where it was, a second run re-solves in seconds.

A store is a folder of small JSON files, one a key. A key is a hash of everything the value depends on: the program's weights and
graph, the samples, the options. Writes are whole or not at all, so a kill at any moment loses at most the piece being computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..ir.data import Sample
from ..ir.files import write_atomically
from ..ir.printer import print_program
from ..ir.program import Program


class Store:
    """Values by kind and key. Without a folder nothing is kept."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, kind: str, key: str) -> Any | None:
        """The value, or None where there is none."""
        path = self._path(kind, key)
        return json.loads(path.read_text()) if path is not None and path.is_file() else None

    def put(self, kind: str, key: str, value: Any) -> None:
        """Keeps a JSON value."""
        path = self._path(kind, key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
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


def content_key(*parts: Any) -> str:
    """A hash of tensors, programs, samples and anything with a stable repr (numbers, texts, tuples, frozen dataclasses)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_digest(part).encode())
    return digest.hexdigest()[:32]


def program_hash(program: Program) -> str:
    """A hash of the graph and of every parameter's bytes: which model a plan is for."""
    return content_key(print_program(program), *program.parameters().values())


def _digest(part: Any) -> str:
    if isinstance(part, torch.Tensor):
        content = part.detach().cpu().contiguous()
        bits = hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"{tuple(content.shape)}{content.dtype}{bits.hexdigest()}"
    if isinstance(part, Program):
        return program_hash(part)
    if isinstance(part, (list, tuple)):
        return f"[{','.join(_digest(p) for p in part)}]"
    return repr(part)


def samples_key(samples: tuple[Sample, ...]) -> str:
    return content_key(*samples)
