"""`rescale=dyadic` leaves no floating-point arithmetic between the input's quantize and the output's scale.

Looked for in the kernels as they are emitted (TIR) and in the machine code of the library; the claim of HAWQ-V3
(arXiv:2011.10680, section 3.1).
"""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from graphwright.backends.host import host_arch
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.backends.tvm.lower import lower
from graphwright.backends.tvm.target import missing_to_run
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.dialect import gw
from graphwright.ir.program import Program
from graphwright.passes.base import PassContext
from graphwright.tools import zoo
from quantize_models import ConvNet, prepared, run
from tvm import tirx

PIPELINE = "canonicalize,equalize,quantize{{weight_bits={bits}}},align-scales,lower-integer{{rescale={rescale}}}"
EDGES = (gw.quantize.default, gw.dequantize.default, gw.scale.default)

#: x86: arithmetic, comparison and conversion on floats; not moves, shuffles and bitwise operations, which have float names too.
FLOAT_ARITHMETIC = re.compile(
    r"v?(add|sub|mul|div|min|max|sqrt|rcp|rsqrt|round|rndscale|dp|hadd|hsub|addsub|cmp|range|reduce|scalef|getexp|getmant|fixupimm)"
    r"(14|28)?(ss|sd|sh|ps|pd|ph)|v?u?comis[sd]|v?cvt\w+|vfn?m(add|sub)\w+|vdpbf16ps|f(i?add|i?sub|i?mul|i?div|i?ld|i?st|sqrt)\w*"
)


@dataclass
class Integers:
    """A lowered model with samples (batch 1)."""

    program: Program
    samples: tuple[tuple[torch.Tensor, ...], ...]


@functools.cache
def reference(name: str, bits: int) -> Integers:
    model = zoo.load(name)
    program = capture(model.model, model.example_inputs, name=name)
    context = PassContext(Calibration.for_program(program, model.calibration(6)))
    assert context.calibration is not None
    lowered = run(program, PIPELINE.format(bits=bits, rescale="dyadic"), context).program
    return Integers(lowered, context.calibration.samples)


def float_kernels(program: Program, target: Target) -> tuple[set[str], set[str]]:
    """(functions whose code names a float type, functions that only cover an edge of the integer region)."""
    lowered = lower(program, target)
    functions = {v.name_hint: f for v, f in lowered.module.functions_items() if isinstance(f, tirx.PrimFunc)}
    edges = {n.name for n in program.nodes if n.target in EDGES}
    quantized = {n.name for n in program.nodes if any(i.target is gw.quantize.default for i in n.all_input_nodes)}
    allowed = {row.name for row in lowered.kernels if {*row.nodes} & (edges | quantized)}
    return {name for name, function in functions.items() if "float" in function.script()}, allowed


def float_instructions(library: bytes, folder: Path) -> dict[str, set[str]]:
    """Floating-point instructions of each kernel's code, by the function's name in the library."""
    path = folder / "library.so"
    path.write_bytes(library)
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True)
    found: dict[str, set[str]] = {}
    function = ""
    for line in listing.stdout.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
            found[function] = set()
        elif (instruction := re.match(r"\s+[0-9a-f]+:\s+(\w+)", line)) and FLOAT_ARITHMETIC.fullmatch(instruction[1]):
            found[function].add(instruction[1])
    return {name: found[name] for name in found if name.endswith("_compute_")}


def of_kernel(function: str, kernels: set[str]) -> bool:
    """Whether a function of the library is one of the kernels, or a phase of one."""
    return re.sub(r"(_\d+)?_compute_$", "", function) in kernels or function.removesuffix("_compute_") in kernels


CASES = [("resnet20", 4, "avx2"), ("mobilenetv2", 8, "avx512-vnni")]


@pytest.mark.skipif(host_arch() != "x86", reason="reads x86 machine code")
@pytest.mark.parametrize(("name", "bits", "level"), CASES)
def test_no_float_between_the_edges(name, bits, level, tmp_path):
    target = Target("x86", level)
    integers = reference(name, bits)
    kinds = [n.target for n in integers.program.nodes if n.op == "call_function"]
    assert kinds.count(gw.quantize.default) == kinds.count(gw.scale.default) == 1 and gw.dequantize.default not in kinds
    floats, allowed = float_kernels(integers.program, target)
    assert floats <= allowed and len(allowed) == 2
    compiled = TVMBackend().compile(integers.program, target)
    code = float_instructions(compiled.library, tmp_path)
    assert len(code) > 20
    assert {f: i for f, i in code.items() if i and not of_kernel(f, allowed)} == {}
    assert any(code.values()), "the input's quantize and the output's scale are float, so the pattern must find some"
    if missing_to_run(target):
        return
    execute = load_bytes(compiled.library)
    for sample in integers.samples[:6]:
        got = execute(*(x.numpy() for x in sample))
        for wanted, given in zip(integers.program(*sample), got if isinstance(got, (list, tuple)) else [got], strict=True):
            np.testing.assert_array_equal(np.asarray(given), wanted.numpy())


@pytest.mark.skipif(host_arch() != "x86", reason="reads x86 machine code")
def test_float_scale_is_found(tmp_path):
    """The same look at a program that rescales in float: both views must see it."""
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    lowered = run(program, "quantize,lower-integer", context).program
    target = Target("x86", "avx2")
    floats, allowed = float_kernels(lowered, target)
    assert floats - allowed
    code = float_instructions(TVMBackend().compile(lowered, target).library, tmp_path)
    assert any(i and not of_kernel(f, allowed) for f, i in code.items())
