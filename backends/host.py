"""What this machine's processor can do; detected, never assumed."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from ..ir.errors import TargetError
from .target import Target

#: CPU flags (as the Linux kernel names them) that each x86 level needs: what a compiler may use when it is told the oldest
#: processor of the level (Cooper Lake, Cascade Lake, Skylake-X, Haswell) and the features that `backends.tvm.target` adds.
X86_FLAGS: dict[str, frozenset[str]] = {
    "avx512-amx": frozenset(
        {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8"}
    ),
    "avx512-bf16": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vnni", "avx512_bf16"}),
    "avx512-vnni": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}),
}

_ARMV8 = frozenset({"fp", "asimd", "crc32"})
_DOT_PRODUCT = _ARMV8 | {"atomics", "asimdrdm", "fphp", "asimdhp", "lrcpc", "asimddp"}

#: The same for ARM cores, best first: what a compiler may use when it is told the core, without SVE and cryptography.
ARM64_FLAGS: dict[str, frozenset[str]] = {
    "neoverse-v1": _DOT_PRODUCT | {"ilrcpc", "flagm", "jscvt", "fcma", "asimdfhm", "bf16", "i8mm"},
    "cortex-x1": _DOT_PRODUCT,
    "neoverse-n1": _DOT_PRODUCT,
    "cortex-a76": _DOT_PRODUCT,
    "cortex-a72": _ARMV8,
    "cortex-a53": _ARMV8,
    "generic": frozenset({"fp", "asimd"}),
}


def required_flags(target: Target) -> frozenset[str]:
    """The CPU flags that code for `target` may use. An x86 level includes every level below it."""
    if target.arch == "x86":
        levels = list(X86_FLAGS)
        return frozenset().union(*(X86_FLAGS[level] for level in levels[levels.index(target.level) :]))
    if target.arch == "arm64":
        return ARM64_FLAGS[target.level]
    if target.arch == "cuda":
        return frozenset()
    raise TargetError(f"target '{target}' has no compiled library; no CPU is needed for it")


def host_arch() -> str:
    machine = platform.machine().lower()
    names = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm64", "arm64": "arm64"}
    if machine not in names:
        raise TargetError(f"no backend for this machine's architecture '{machine}'; name a target such as x86:avx2")
    return names[machine]


@functools.cache
def host_flags() -> frozenset[str]:
    """Feature flags of the first processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def host_processor() -> str:
    """Model name, family and model number of the first processor: what measurements are kept by."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    numbers = "-".join(fields[name] for name in ("cpu family", "model") if name in fields)
    return f"{fields.get('model name', 'processor')} ({numbers})"


def host_level() -> str:
    """The best instruction-set level of this machine."""
    if host_arch() == "arm64":
        return next(level for level in ("neoverse-v1", "cortex-a76", "generic") if ARM64_FLAGS[level] <= host_flags())
    for level, needed in X86_FLAGS.items():
        if needed <= host_flags():
            return level
    raise TargetError("this processor has no AVX2; the x86 backend needs AVX2 and FMA")


def host_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
