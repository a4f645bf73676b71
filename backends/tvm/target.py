"""Targets as TVM understands them: processor, features, linker, and the kernel level of an instruction set."""

from __future__ import annotations

import functools
import shutil
import subprocess
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.target import codegen

from ...ir.errors import TargetError
from .. import nvidia
from ..host import ARM64_FLAGS, host_arch, host_flags, host_threads, required_flags
from ..target import LEVELS, Target, TargetInfo
from ..tiles import request_tiles
from .cuda.nvcc import missing_nvcc
from .cuda.triton_aot import missing_triton
from .kernels.half import NATIVE

TRIPLES = {"x86": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
CROSS_HEADERS = {"x86": "libc6-dev-amd64-cross", "arm64": "libc6-dev-arm64-cross"}
LLVM_BACKENDS = {"x86": "x86_64", "arm64": "aarch64"}

#: Oldest processor of each level, so that code for the level runs on every machine that has it.
PROCESSORS = {
    "x86:avx512-amx": "cooperlake",
    "x86:avx512-bf16": "cooperlake",
    "x86:avx512-vnni": "cascadelake",
    "x86:avx512": "skylake-avx512",
    "x86:avx2": "haswell",
    **{f"arm64:{core}": core for core in LEVELS["arm64"]},
}

#: Features a level asks for beyond its processor's defaults.
FEATURES = {
    # 256-bit preference is a power heuristic of old parts; our kernels are written for whole 512-bit registers.
    "x86:avx512-amx": ("+amx-tile", "+amx-int8", "-prefer-256-bit"),
    "x86:avx512-bf16": ("-prefer-256-bit",),
    "x86:avx512-vnni": ("-prefer-256-bit",),
    "x86:avx512": ("-prefer-256-bit",),
    # Kernels are written for q registers, of which this core's SVE unit has no more: machines with i8mm and no SVE run it too.
    "arm64:neoverse-v1": ("-sve",),
}


@dataclass(frozen=True)
class Linker:
    """The C compiler that links a target's shared library, and the Debian packages that bring it and its C library."""

    command: str
    package: str
    headers: str

    @property
    def missing(self) -> str:
        """What keeps it from making a library; empty where nothing. A cross compiler may be installed without its C library."""
        if shutil.which(self.command) is None:
            return f"'{self.command}' is not on the PATH; install it (Debian: apt-get install {self.package} {self.headers})"
        if complaint := _complaint(self.command):
            advice = f"install its C library (Debian: apt-get install {self.headers})"
            return f"'{self.command}' cannot link a library ({complaint}); {advice}"
        return ""


@functools.cache
def _complaint(compiler: str) -> str:
    """The first error of a C compiler that is asked for a library which reads the C library's headers."""
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", "/dev/null"]
    program = "#include <stdlib.h>\nint f(void) { return abs(-1); }\n"
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no reason given"])[0] if done.returncode else ""


def linker(target: Target) -> Linker:
    """A library for a GPU runs on the architecture that builds it."""
    if target.arch in (host_arch(), "cuda"):
        return Linker("gcc", "gcc", "libc6-dev")
    triple = TRIPLES[target.arch]
    return Linker(f"{triple}-gcc", f"gcc-{triple.replace('_', '-')}", CROSS_HEADERS[target.arch])


@functools.cache
def llvm_backends() -> frozenset[str]:
    """Architectures the LLVM inside this TVM can emit."""
    return frozenset(str(name) for name in codegen.llvm_get_targets())


def kernel_levels(target: Target) -> tuple[str, str]:
    """Levels of the (int8, float) designed kernels for a target."""
    if target.arch == "cuda":
        return target.level, target.level
    if target.arch == "arm64":
        flags = ARM64_FLAGS[target.level]
        return "i8mm" if "i8mm" in flags else "dotprod" if "asimddp" in flags else "neon", "portable"
    int8 = {"avx512-amx": "avx512-amx", "avx512-bf16": "avx512-vnni", "avx512-vnni": "avx512-vnni"}.get(target.level, "portable")
    return int8, "avx512" if target.level.startswith("avx512") else "portable"


def bfloat16_level(target: Target) -> str:
    """Level of the float kernels whose tensors are bfloat16."""
    return NATIVE if target.level in ("avx512-amx", "avx512-bf16") else kernel_levels(target)[1]


def float16_level(target: Target) -> str:
    """Level of the products of float16 and constant weights; what else holds float16 computes in float32."""
    flags = ARM64_FLAGS[target.level] if target.arch == "arm64" else frozenset()
    return "fp16fml" if "asimdfhm" in flags else "fullfp16" if "asimdhp" in flags else kernel_levels(target)[1]


def dots_bfloat16(target: Target) -> bool:
    """Whether products of bfloat16 multiply pairs (vdpbf16ps) unless the tuning database says otherwise.

    Cores with that instruction and no tile unit (Cooper Lake, Zen 4 and later) start one a cycle, as many as multiply-adds: twice
    the products. Sapphire Rapids and Emerald Rapids start one every other cycle, half the rate of widening and multiplying; a
    virtual machine on one of those that hides the tile unit is what `graphwright tune` is for.
    """
    return target.level == "avx512-bf16"


def missing_to_emit(target: Target) -> str:
    """What this installation lacks to compile for `target`; empty where nothing."""
    if target.arch == "cuda":
        return "; ".join(filter(None, (missing_nvcc(target.level), missing_triton(), linker(target).missing)))
    if str(target) not in PROCESSORS:
        return f"the TVM backend compiles for {', '.join([*sorted(TRIPLES), 'cuda'])}, not for {target.arch}"
    if LLVM_BACKENDS[target.arch] not in llvm_backends():
        return f"this build of TVM has no LLVM backend '{LLVM_BACKENDS[target.arch]}'; install the apache-tvm wheel from PyPI"
    return linker(target).missing


def missing_to_run(target: Target) -> str:
    """What this machine lacks to run code for `target`; empty where nothing."""
    if target.arch == "cuda":
        return nvidia.missing_to_run(target.level)
    if target.arch != host_arch():
        return f"this machine is {host_arch()}"
    absent = required_flags(target) - host_flags()
    return f"this processor lacks {', '.join(sorted(absent))}" if absent else ""


def target_rows() -> list[TargetInfo]:
    rows = []
    for arch in (*TRIPLES, "cuda"):
        for level in LEVELS[arch]:
            target = Target(arch, level)
            emit, run = missing_to_emit(target), missing_to_run(target)
            rows.append(TargetInfo(target, not emit, not run, "; ".join(filter(None, (emit, run)))))
    return rows


def require_emit(target: Target) -> None:
    missing = missing_to_emit(target)
    if missing:
        raise TargetError(f"cannot compile for {target}: {missing}")


def require_run(target: Target) -> None:
    missing = missing_to_run(target)
    if missing:
        raise TargetError(f"cannot run {target} here: {missing}")
    request_tiles(required_flags(target))


def tvm_target(target: Target) -> tvm.target.Target:
    """The LLVM or CUDA target of a level. Raises TargetError where this installation cannot emit it."""
    require_emit(target)
    if target.arch == "cuda":
        return cuda_target(target)
    options: dict[str, object] = {
        "kind": "llvm",
        "mtriple": TRIPLES[target.arch],
        "mcpu": PROCESSORS[str(target)],
        "num-cores": host_threads(),
    }
    if str(target) in FEATURES:
        options["mattr"] = list(FEATURES[str(target)])
    return tvm.target.Target(options)


def cuda_target(target: Target) -> tvm.target.Target:
    """The limits are those that every CUDA chip has without asking for more."""
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 48 * 1024, "thread_warp_size": 32}
    return tvm.target.Target({"kind": "cuda", "arch": target.level, **limits})


def generating(target: Target) -> AbstractContextManager[Any]:
    """The context in which kernels are generated: those written as tensor expressions leave a GPU's loops to its own schedule."""
    return cuda_target(target) if target.arch == "cuda" else nullcontext()
