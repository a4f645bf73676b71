"""`manifest.json` of an artifact: what is inside, what it takes and returns, and what a machine needs to run it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ir.errors import ArtifactError

if TYPE_CHECKING:
    from ..ir.program import TensorSpec

FORMAT = "graphwright-artifact"
VERSION = 2

#: Element types of inputs and outputs; the C++ runner knows the same ones.
DTypeName = Literal["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorEntry(_Strict):
    """An input or output. A symbolic dimension is null."""

    name: str
    shape: list[int | None]
    dtype: DTypeName

    @classmethod
    def of(cls, spec: TensorSpec) -> TensorEntry:
        return cls(name=spec.name, shape=list(spec.shape), dtype=str(spec.dtype).removeprefix("torch."))  # type: ignore[arg-type]

    def __str__(self) -> str:
        """As a `TensorSpec` prints."""
        return f"{self.name}: {self.dtype}[{'x'.join('?' if d is None else str(d) for d in self.shape)}]"

    def spec(self) -> TensorSpec:
        import torch  # loading an artifact does without

        from ..ir.program import TensorSpec

        return TensorSpec(self.name, tuple(self.shape), getattr(torch, self.dtype))


class TargetEntry(_Strict):
    """One compiled library and the CPU flags (named as the Linux kernel names them) that its code uses."""

    arch: str
    level: str
    library: str
    requires: list[str]
    options: dict[str, Any] = Field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.arch}:{self.level}"


class MemberEntry(_Strict):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(_Strict):
    """The whole manifest. `format` and `version` come first in the file, so that a tool can tell what it holds."""

    format: Literal["graphwright-artifact"] = FORMAT
    version: Literal[2] = VERSION
    name: str
    stage: str
    created_by: str
    versions: dict[str, str]
    recipe: str
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    #: Best first: a machine takes the first library that it can run.
    targets: list[TargetEntry]
    members: dict[str, MemberEntry]

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Manifest:
        """Raises ArtifactError where `data` is not a manifest of this version; `source` names the file."""
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"the manifest of '{source}' is not JSON ({error}); build the artifact again") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ArtifactError(f"'{source}' is not a graphwright artifact: its manifest does not say so")
        if raw.get("version") != VERSION:
            raise ArtifactError(
                f"'{source}' has format version {raw.get('version')!r}; this graphwright reads version {VERSION}: "
                "use the graphwright that wrote it, or build the artifact again"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"the manifest of '{source}' is wrong at '{where}': {first['msg']}; build it again") from error
