"""One shared library from the kernels' object code and the region's tables."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Iterable
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
        library, weights = folder / "model.so", folder / "weights.bin"
        (folder / "kernels.o").write_bytes(kernels)
        weights.write_bytes(region.weights)
        (folder / "program.c").write_text(tables(region, weights))
        includes = [f"-I{path}" for path in (RUNTIME, *header_folders())]
        options = ["-shared", "-fPIC", "-O2", "-Wl,-Bsymbolic", "-Wl,--build-id=none", "-Wl,--strip-debug"]
        sources = ["-x", "c", str(folder / "program.c"), str(RUNTIME / "region.c")]
        command = [linker(target).command, *options, *includes, "-o", str(library), str(folder / "kernels.o"), *sources]
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
        places += [_place(place) for place in step.places]
    return "\n".join(
        [
            '#include "region.h"',
            'extern const uint8_t gw_weights[] __attribute__((visibility("hidden")));',
            # read-only and mapped from the file: pages of weights are loaded when a kernel first reads them
            f'__asm__(".pushsection .rodata\\n.balign 64\\n.hidden gw_weights\\n.globl gw_weights\\ngw_weights:\\n'
            f'.incbin \\"{weights}\\"\\n.popsection\\n");',
            *(f"int __tvm_ffi_{name}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);" for name in functions),
            _array("gw_step", "gw_steps", steps),
            _array("gw_place", "gw_places", places),
            _array("uint64_t", "gw_sizes", [str(tensor.size) for tensor in tensors]),
            "const gw_region gw_program = {",
            f"  gw_steps, gw_places, {len(steps)}, {max((len(s.places) for s in region.steps), default=0)},",
            f"  {int(any(step.phase.parallel for step in region.steps))}, {region.arena}, {region.scratch}, gw_weights,",
            f"  {len(region.inputs)}, {len(region.outputs)}, gw_sizes,",
            f"  {json.dumps(region.description())}}};",
            "",
        ]
    )


def _place(place: Place) -> str:
    return f"{{GW_{place.space.name}, {place.offset}}}"


def _array(kind: str, name: str, items: Iterable[str]) -> str:
    return f"static const {kind} {name}[] = {{\n" + "".join(f"  {item},\n" for item in items) + "};"
