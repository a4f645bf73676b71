"""Triton kernels compiled ahead of time for a named chip: no GPU and no driver is needed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....ir.errors import TargetError
from ...cache import cache_folder
from .kernels.blocks import SHARED_BYTES
from .launch import TritonCall
from .overlap import WAIT, in_ptx, overlaps

#: TVM's element types as Triton writes pointers to them.
POINTERS = {
    "float64": "*fp64",
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int64": "*i64",
    "int32": "*i32",
    "int16": "*i16",
    "int8": "*i8",
    "uint64": "*u64",
    "uint32": "*u32",
    "uint16": "*u16",
    "uint8": "*u8",
    "bool": "*i1",
}

#: Bytes that every pointer is a multiple of; memory plans place buffers at multiples of 64.
ALIGNMENT = 16


@dataclass(frozen=True)
class Kernel:
    """A compiled Triton kernel.

    entry: its name inside `cubin`. threads: of one program. shared: bytes of dynamic shared memory. hidden: pointers that it
    takes after its own, for scratch it does not use.
    """

    entry: str
    cubin: bytes
    threads: int
    shared: int
    hidden: int


def missing_triton() -> str:
    return "" if importlib.util.find_spec("triton") else "'triton' is not installed; pip install 'graphwright[cuda]'"


def compile_kernel(call: TritonCall, dtypes: Sequence[str], level: str) -> Kernel:
    """Compiles `call`, whose pointers have the element types `dtypes`, for a chip (sm_90, ...).

    Compiled kernels are kept by content, in Triton's own format, under the user's cache folder.

    Raises:
        TargetError: Triton is missing, or rejects the kernel, or the kernel needs more shared memory than the chip has.
    """
    if missing_triton():
        raise TargetError(f"cannot compile '{call.function}' for {level}: {missing_triton()}")
    import triton  # 0.5 s; only where a program has such kernels
    import triton.knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import TritonError

    function = _function(call)
    constants = dict(call.constants)
    pointers = [name for name in function.arg_names if name not in constants]
    if len(pointers) != len(dtypes):
        raise RuntimeError(f"'{call.function}' takes {len(pointers)} pointers ({', '.join(pointers)}), not {len(dtypes)}")
    signature = {**{n: POINTERS[d] for n, d in zip(pointers, dtypes, strict=True)}, **dict.fromkeys(constants, "constexpr")}
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in pointers}
    ordered = {name: signature[name] for name in function.arg_names}
    source = ASTSource(fn=function, signature=ordered, constexprs=constants, attrs=aligned)
    options = {"num_warps": call.warps, "num_stages": call.stages, "enable_fp_fusion": False, "enable_reflect_ftz": False}
    with triton.knobs.cache.scope(), triton.knobs.runtime.scope():
        triton.knobs.cache.dir = str(cache_folder() / "triton")
        hook: Any = _begin_by_waiting if overlaps(level) else None
        triton.knobs.runtime.add_stages_inspection_hook = hook
        try:
            compiled: Any = triton.compile(source, target=GPUTarget("cuda", int(level.removeprefix("sm_")), 32), options=options)
        except (TritonError, triton.runtime.errors.TritonError) as error:
            raise TargetError(f"Triton cannot compile '{call.function}' for {level}: {error}") from error
    _require_shared_memory(call, int(compiled.metadata.shared), level)
    return _kernel(call, compiled, len(pointers))


def _begin_by_waiting(_backend: Any = None, stages: dict[str, Any] | None = None, *_rest: Any) -> tuple[str, str] | None:
    """Triton's hook into its stages; without them it asks for what tells the hook apart in keys of its cache."""
    if stages is None:
        return WAIT, WAIT
    make = stages["ptx"]
    stages["ptx"] = lambda source, metadata: in_ptx(make(source, metadata))
    return None


def _require_shared_memory(call: TritonCall, needed: int, level: str) -> None:
    """Ahead of time nothing else says so: the launch would fail, on a chip that is not here."""
    if needed > SHARED_BYTES[level]:
        cut = ", ".join(f"{name}={value}" for name, value in call.constants if name in ("BM", "BN", "BK"))
        raise TargetError(
            f"'{call.function}' needs {needed} bytes of shared memory and {level} gives a program {SHARED_BYTES[level]} "
            f"({cut}, {call.stages} stages); choose a smaller block with `graphwright tune --target cuda:{level}`"
        )


def _function(call: TritonCall) -> Any:
    module, _, name = call.function.partition(":")
    return getattr(importlib.import_module(f"{__package__}.kernels.{module}"), name)


def _kernel(call: TritonCall, compiled: Any, pointers: int) -> Kernel:
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise RuntimeError(f"'{call.function}' asks for scratch memory or a cluster of blocks, which no launch provides")
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    if entry is None:
        raise RuntimeError(f"Triton's code for '{call.function}' has no entry")
    hidden = entry.group(1).count(".param") - pointers
    return Kernel(metadata.name, compiled.asm["cubin"], metadata.num_warps * 32, metadata.shared, hidden)
