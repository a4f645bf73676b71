"""A plan: everything that decides a result, as data. `graphwright rewrite --plan` replays it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..ir.content import program_hash
from ..ir.errors import OptionError, UnknownNameError
from ..ir.program import Program


@dataclass(frozen=True)
class Plan:
    """What was decided and for which model.

    Attributes:
        pipeline: text; the option `weights` of `quantize` names the format of every layer that was searched.
        model, model_hash: the name, and a hash of graph and weights: a plan is for one model.
        constraints: the limits asked for.
        search: how formats were chosen (scorer, solver, formats) and what was predicted; empty where nothing was searched.
    """

    pipeline: str
    target: str
    model: str = "model"
    model_hash: str = ""
    constraints: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    search: dict[str, Any] = field(default_factory=dict)

    def require_model(self, program: Program) -> None:
        """Raises OptionError where the plan was made for another model."""
        found = program_hash(program)
        if self.model_hash and found != self.model_hash:
            raise OptionError(
                f"this plan was made for '{self.model}' with hash {self.model_hash}, but '{program.name}' has {found}: its graph "
                "or its weights differ; make a plan for it with: graphwright optimize ... --plan FILE"
            )

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
