"""A plan: everything that decides a result, as data. `graphwright rewrite --plan` replays it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..ir.errors import OptionError, UnknownNameError


@dataclass(frozen=True)
class Plan:
    """The pipeline as text, the target, the model's name, the limits asked for and the seed."""

    pipeline: str
    target: str
    model: str = "model"
    constraints: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise UnknownNameError("key of a plan", key, known)
        missing = [key for key in ("pipeline", "target") if not isinstance(data.get(key), str)]
        if missing:
            raise OptionError(f"a plan needs the text fields {', '.join(missing)}")
        return cls(**data)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise OptionError(f"cannot read plan '{path}': {error.strerror}") from error
        except ValueError as error:
            raise OptionError(f"plan '{path}' is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise OptionError(f"plan '{path}' must be a JSON object")
        return cls.from_json(data)
