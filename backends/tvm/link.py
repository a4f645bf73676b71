"""One shared library from the kernels' object code and the region's tables."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...ir.errors import TargetError
from ..target import Target
from .region import Place, Region
from .target import linker

RUNTIME = Path(__file__).parents[1] / "runtime"


def link(region: Region, kernels: bytes, target: Target) -> bytes:
    """Compiles the tables and `region.c` with the target's C compiler and links them to the kernels.

    Raises:
        TargetError: the compiler is missing or fails; its own words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="graphwright-") as name:
        folder = Path(name)
        weights, code = folder / "weights.bin", folder / "kernels.o"
        code.write_bytes(kernels)
        weights.write_bytes(region.weights)
        return shared_library(folder, tables(region, weights), "region.c", target, [code])


def shared_library(folder: Path, program: str, runtime: str, target: Target, objects: Sequence[Path] = ()) -> bytes:
    """One library of the tables `program` (C), the file of `runtime/` that reads them, and objects. folder: for the sources."""
    library, source = folder / "model.so", folder / "program.c"
    source.write_text(program)
    includes = [f"-I{path}" for path in (RUNTIME, *header_folders())]
    options = ["-shared", "-fPIC", "-O2", "-Wl,-Bsymbolic", "-Wl,--build-id=none", "-Wl,--strip-debug"]
    sources = ["-x", "c", str(source), str(RUNTIME / runtime)]
    command = [linker(target).command, *options, *includes, "-o", str(library), *map(str, objects), *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TargetError(f"'{command[0]}' cannot link the program for {target}: {done.stderr.strip()}")
    return library.read_bytes()


def header_folders() -> list[Path]:
    """Include folders of TVM's runtime and of tvm_ffi, which their wheels carry."""
    folders = []
    for module in ("tvm", "tvm_ffi"):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise TargetError(f"the headers of '{module}' are missing; pip install apache-tvm apache-tvm-ffi")
        folders.append(Path(spec.origin).parent / "include")
    return folders


def tables(region: Region, weights: Path) -> str:
    """The region's tables as C source; the weights come from a file, byte by byte."""
    functions = sorted({step.phase.name for step in region.steps})
    tensors = [*region.inputs, *region.outputs]
    steps, places = [], []
    for step in region.steps:
        flags = f"{int(step.phase.parallel)}, {int(step.barrier)}"
        steps.append(f"{{__tvm_ffi_{step.phase.name}, {len(places)}, {len(step.places)}, {flags}}}")
        places += map(place_entry, step.places)
    return "\n".join(
        [
            '#include "region.h"',
            embedded("gw_weights", weights),
            *(f"int __tvm_ffi_{name}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);" for name in functions),
            table("gw_step", "gw_steps", steps),
            table("gw_place", "gw_places", places),
            table("uint64_t", "gw_sizes", [str(tensor.size) for tensor in tensors]),
            table("uint64_t", "gw_staged", ["GW_IN_PLACE" if place is None else str(place) for place in region.staged]),
            "const gw_region gw_program = {",
            f"  gw_steps, gw_places, {len(steps)}, {max((len(s.places) for s in region.steps), default=0)},",
            f"  {int(any(step.phase.parallel for step in region.steps))}, {region.arena}, {region.scratch}, gw_weights,",
            f"  {len(region.inputs)}, {len(region.outputs)}, gw_sizes, gw_staged, {region.parts},",
            f"  {json.dumps(region.description())}}};",
            "",
        ]
    )


def embedded(name: str, path: Path) -> str:
    """C of a byte array from a file. Read-only and mapped from the library: pages are loaded when they are first read."""
    return (
        f'extern const uint8_t {name}[] __attribute__((visibility("hidden")));\n'
        f'__asm__(".pushsection .rodata\\n.balign 64\\n.hidden {name}\\n.globl {name}\\n{name}:\\n'
        f'.incbin \\"{path}\\"\\n.popsection\\n");'
    )


def place_entry(place: Place) -> str:
    return f"{{GW_{place.space.name}, {place.offset}}}"


def table(kind: str, name: str, items: Iterable[str]) -> str:
    return f"static const {kind} {name}[] = {{\n" + "".join(f"  {item},\n" for item in items) + "};"
