"""Targets: what machine an artifact is for. `x86`, `x86:avx512-amx`, `arm64:cortex-a76`, `cuda:sm_90`, `onnx`."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import TargetError, UnknownNameError

#: Instruction-set levels of a target, best first. `native` picks the best one this machine has.
LEVELS: dict[str, tuple[str, ...]] = {
    "x86": ("avx512-amx", "avx512-bf16", "avx512-vnni", "avx512", "avx2"),
    "arm64": ("neoverse-v1", "cortex-x1", "neoverse-n1", "cortex-a76", "cortex-a72", "cortex-a53", "generic"),
    "cuda": ("sm_90", "sm_89", "sm_86", "sm_80"),
    "onnx": ("qdq",),
}

#: The level of an architecture named alone on another machine, where the best one is rarer than what most boards have.
USUAL_LEVELS = {"arm64": "cortex-a76"}


@dataclass(frozen=True)
class Target:
    """An architecture and its instruction-set level. `str(target)` parses back."""

    arch: str
    level: str

    def __str__(self) -> str:
        return f"{self.arch}:{self.level}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises UnknownNameError for an unknown architecture or level, TargetError for `native` of another machine.

        `cuda` alone is the best level that this machine's GPU runs, and the newest where there is no GPU.
        """
        from .host import host_arch, host_level  # reads /proc; only when a target is needed

        arch, _, level = text.partition(":")
        if arch in ("cpu", "native"):
            arch = host_arch()
        if arch not in LEVELS:
            raise UnknownNameError("target", arch, [*LEVELS, "cpu"])
        if arch == "cuda" and level in ("", "native"):
            return cls(arch, _gpu_level(text, required=level == "native"))
        if not level or level == "native":
            if arch == host_arch():
                return cls(arch, host_level())
            if level == "native":
                raise TargetError(f"target '{text}': this machine is {host_arch()}; name a level: {', '.join(LEVELS[arch])}")
            return cls(arch, USUAL_LEVELS.get(arch, LEVELS[arch][0]))
        if level not in LEVELS[arch]:
            raise UnknownNameError(f"level of target {arch}", level, LEVELS[arch])
        return cls(arch, level)


def _gpu_level(text: str, required: bool) -> str:
    from .nvidia import missing_to_run  # asks the driver; only when a target is needed

    missing = {level: missing_to_run(level) for level in LEVELS["cuda"]}
    found = next((level for level, reason in missing.items() if not reason), None)
    if found is None and required:
        raise TargetError(f"target '{text}': {missing[LEVELS['cuda'][0]]}; name a level: {', '.join(LEVELS['cuda'])}")
    return found or LEVELS["cuda"][0]


@dataclass(frozen=True)
class TargetInfo:
    """One row of `graphwright targets`: can this build emit it, can this machine run it, and if not, what is missing."""

    target: Target
    emits: bool
    runs: bool
    missing: str = ""
