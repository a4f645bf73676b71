"""The deployable file `model.gw`: compiled libraries, a manifest, and the evidence. docs/ARTIFACT.md describes the format."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..ir.errors import ArtifactError, OutputError
from ..ir.files import check_output, write_atomically
from .container import MANIFEST, pack, unpack
from .host import required_flags
from .manifest import FORMAT, Manifest, MemberEntry, TargetEntry, TensorEntry
from .target import LEVELS

if TYPE_CHECKING:
    from ..ir.program import Program, TensorSpec
    from .base import Compiled

CERTIFICATE, PLAN, KERNELS = "certificate.json", "plan.json", "kernels.json"


@dataclass(frozen=True)
class Artifact:
    """A manifest and the members it lists. Immutable; `build` makes one, `load` reads one, `save` writes it."""

    manifest: Manifest
    members: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def build(
        cls,
        program: Program,
        compiled: Sequence[Compiled],
        *,
        certificate: Sequence[Any] = (),
        plan: Mapping[str, Any] | None = None,
        recipe: str = "",
        documents: Mapping[str, bytes] | None = None,
    ) -> Artifact:
        """Puts compiled libraries and their evidence together.

        Args:
            program: what was compiled; gives the name, the stage, inputs and outputs.
            compiled: one for each target; at least one, no target twice.
            certificate: the pass manager's rows (dataclasses or mappings).
            plan: the plan that replays this build.
            recipe: pipeline text; the plan's by default.
            documents: further members by name, such as a report.

        Raises:
            ArtifactError: no target, a target twice, a tensor type that artifacts do not carry, or a reserved member name.
        """
        import torch  # reading an artifact does without

        names = [str(c.target) for c in compiled]
        if not names or len(set(names)) != len(names):
            raise ArtifactError(f"an artifact needs at least one target and each only once, not [{', '.join(names)}]")
        # Best first; a GPU before the CPU beside it.
        compiled = sorted(compiled, key=lambda c: (c.target.arch != "cuda", LEVELS[c.target.arch].index(c.target.level)))
        members: dict[str, bytes] = {_library_name(c): bytes(c.library) for c in compiled}
        members[CERTIFICATE] = _json([_plain(row) for row in certificate])
        members[KERNELS] = _json({str(c.target): [_plain(k) for k in c.kernels] for c in compiled})
        if plan is not None:
            members[PLAN] = _json(_plain(plan))
        for name, content in (documents or {}).items():
            if name in members or name == MANIFEST:
                raise ArtifactError(f"the member name '{name}' is reserved; give the document another name")
            members[name] = content
        manifest = Manifest(
            name=program.name,
            stage=program.stage.label,
            created_by=f"graphwright {__version__}",
            versions={"graphwright": __version__, "tvm": version("apache-tvm"), "torch": torch.__version__},
            recipe=recipe or str((plan or {}).get("pipeline", "")),
            inputs=[_tensor_entry(spec) for spec in program.input_specs],
            outputs=[_tensor_entry(spec) for spec in program.output_specs],
            targets=[
                TargetEntry(
                    arch=c.target.arch,
                    level=c.target.level,
                    library=_library_name(c),
                    requires=sorted(required_flags(c.target)),
                    options=_plain(c.options),
                )
                for c in compiled
            ],
            members={name: MemberEntry(sha256=sha256(data), size=len(data)) for name, data in members.items()},
        )
        return cls(manifest, members)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def input_specs(self) -> list[TensorSpec]:
        return [entry.spec() for entry in self.manifest.inputs]

    @property
    def output_specs(self) -> list[TensorSpec]:
        return [entry.spec() for entry in self.manifest.outputs]

    @property
    def certificate(self) -> list[dict[str, Any]]:
        return json.loads(self.members[CERTIFICATE])

    @property
    def plan(self) -> dict[str, Any] | None:
        return json.loads(self.members[PLAN]) if PLAN in self.members else None

    @property
    def size(self) -> int:
        """Bytes of the saved file."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's bytes; the same artifact always gives the same bytes."""
        return pack({MANIFEST: self.manifest.to_bytes(), **self.members})

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the file under a temporary name and renames it, so that no half-written artifact is ever seen.

        Args:
            overwrite: replace an artifact that is there already; anything else at `path` is never replaced.

        Raises:
            OutputError: the path cannot be written, or holds something already.
        """
        path = Path(path)
        check_output(path, overwrite)
        if path.exists() and not _looks_like_artifact(path):
            raise OutputError(f"'{path}' holds something that is not a graphwright artifact; delete it or choose another name")
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Reads and checks a file: its seal, its manifest, and the SHA-256 of every member.

        Raises:
            ArtifactError: missing, truncated, damaged, of another version, or not an artifact.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read artifact '{path}': {error.strerror}; check the path") from error
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Artifact:
        views = unpack(data, source)
        manifest = Manifest.from_bytes(bytes(views.pop(MANIFEST)), source)
        _check_members(manifest, views, source)
        return cls(manifest, {name: bytes(view) for name, view in views.items()})


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_members(manifest: Manifest, views: Mapping[str, memoryview], source: str) -> None:
    listed, found = set(manifest.members), set(views)
    for name in sorted(listed ^ found):
        fault = "is missing" if name in listed else "is not in the manifest"
        raise ArtifactError(f"'{source}' is damaged: member '{name}' {fault}; copy or build the artifact again")
    for name, entry in manifest.members.items():
        if len(views[name]) != entry.size or sha256(views[name]) != entry.sha256:
            raise ArtifactError(f"'{source}' is damaged: member '{name}' does not match its SHA-256; copy or build it again")
    for name in (CERTIFICATE, *(target.library for target in manifest.targets)):
        if name not in listed:
            raise ArtifactError(f"'{source}' lacks the member '{name}'; build the artifact again")
    if not manifest.targets:
        raise ArtifactError(f"'{source}' holds no compiled library; build the artifact again")


def _looks_like_artifact(path: Path) -> bool:
    """True also for a damaged artifact: the first member of each is a stored manifest that opens with its format."""
    with path.open("rb") as file:
        head = file.read(200)
    return head.startswith(b"PK\3\4") and FORMAT.encode() in head


def _library_name(compiled: Compiled) -> str:
    return f"lib/{compiled.target.arch}-{compiled.target.level}.so"


def _tensor_entry(spec: TensorSpec) -> TensorEntry:
    try:
        return TensorEntry.of(spec)
    except ValueError as error:  # pydantic's ValidationError
        raise ArtifactError(f"an artifact cannot take or return {spec}: convert it inside the model") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """Plain JSON of rows: dataclasses become objects, and numbers JSON does not have become text ("inf", "nan")."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
