"""Kernels for AArch64 without a board: many of them in one library, run once by gw-run under qemu.

cases = [Case(function, arrays, expected), ...]
outputs = emulate(cases, "cortex-a76", tmp_path, cpu="cortex-a76")
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from graphwright import __version__
from graphwright.backends.artifact import Artifact, sha256
from graphwright.backends.host import required_flags
from graphwright.backends.manifest import Manifest, MemberEntry, TargetEntry, TensorEntry
from graphwright.backends.target import Target
from graphwright.backends.tvm.link import link
from graphwright.backends.tvm.pipeline import build
from graphwright.backends.tvm.target import tvm_target
from graphwright.ir.program import TensorSpec
from runner import QEMU
from runner import build as build_runner
from tvm import relax as _relax

relax: Any = _relax


@dataclass
class Case:
    """One call of a kernel: its inputs and parameters, and shape and type of its output."""

    function: tvm.tirx.PrimFunc
    arrays: list[np.ndarray]
    output: tuple[tuple[int, ...], str]


def emulate(cases: list[Case], level: str, folder: Path, cpu: str) -> list[np.ndarray]:
    """Outputs of all cases (two or more) on an emulated CPU. level: of target arm64."""
    path = folder / f"{level}.gw"
    if not path.exists():
        library(cases, level).save(path)
    np.save(folder / "x.npy", np.zeros(1, np.float32))
    command = [*QEMU, "-cpu", cpu, str(build_runner("aarch64")), str(path), "--input", str(folder / "x.npy")]
    done = subprocess.run([*command, "--output", str(folder / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [np.load(folder / f"out.{i}.npy") for i in range(len(cases))]


def finished(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """As lowering puts a kernel into its module."""
    return function.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)


def library(cases: list[Case], level: str) -> Artifact:
    """An artifact whose program calls every case on constants."""
    target, builder = Target("arm64", level), relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            results = []
            for index, case in enumerate(cases):
                variable = builder.add_func(finished(case.function), f"case{index}")
                constants = [relax.const(array, str(array.dtype)) for array in case.arrays]
                call = relax.call_tir(variable, constants, relax.TensorType(case.output[0], case.output[1]))
                results.append(builder.emit_output(builder.emit(call)))
        builder.emit_func_output(relax.Tuple(results))
    region, code = build(builder.finalize(), tvm_target(target))
    name, content = f"{level}.so", link(region, code, target)
    manifest = Manifest(
        name="kernels",
        stage="integer",
        created_by=f"graphwright {__version__}",
        versions={"graphwright": __version__},
        recipe="",
        inputs=[TensorEntry.of(TensorSpec("x", (1,), torch.float32))],
        outputs=[
            TensorEntry.of(TensorSpec(f"y{index}", shape, getattr(torch, dtype)))
            for index, (shape, dtype) in enumerate(case.output for case in cases)
        ],
        targets=[TargetEntry(arch="arm64", level=level, library=name, requires=sorted(required_flags(target)))],
        members={name: MemberEntry(sha256=sha256(content), size=len(content))},
    )
    return Artifact(manifest, {name: content})
