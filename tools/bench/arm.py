"""AArch64 kernels judged by counting, on a machine that is none: products a cycle of each family's inner loop, as LLVM's model of
a core sees it (llvm-mca).

    object code of the kernel ──► its loop with the most products ──► llvm-mca ──► products a cycle, beside the most that the
                                                                                   same model allows (nothing but products)

These are counts of a model, not times: it knows pipelines, latencies and widths, and neither caches nor branch misses.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tvm
import typer
from tvm import tirx

from ...backends.target import Target
from ...backends.tvm.kernels import convolution_f32, convolution_int8, depthwise_f32, linear_f32, linear_int8, matmul_int8
from ...backends.tvm.kernels.base import Convolution, Tail
from ...backends.tvm.kernels.float_base import FloatSpec, MatrixProduct
from ...backends.tvm.pipeline import flatten, generate
from ...backends.tvm.target import float16_level, kernel_levels, tvm_target
from ...backends.tvm.tasks import split_tasks
from ...ir.errors import GraphwrightError
from .markdown import markdown

#: Disassembler of the cross compiler's package (Debian: binutils-aarch64-linux-gnu).
OBJDUMP = "aarch64-linux-gnu-objdump"

#: Products of one instruction, by mnemonic, with the arrangement of its result where there are several.
PRODUCTS = {"smmla": 32, "usmmla": 32, "sdot": 16, "usdot": 16, "smull": 8, "smull2": 8, "smlal": 4, "smlal2": 4,
            "fmla.4s": 4, "fmla.8h": 8, "fmul.8h": 8, "fmlal": 4, "fmlal2": 4}  # fmt: skip

#: Operands of an independent one, where they are not four lanes of bytes.
OPERANDS = {"smull": "v{0}.8h, v30.8b, v31.8b", "smull2": "v{0}.8h, v30.16b, v31.16b", "smlal": "v{0}.4s, v30.4h, v31.4h",
            "smlal2": "v{0}.4s, v30.8h, v31.8h", "fmla.4s": "v{0}.4s, v30.4s, v31.4s", "fmla.8h": "v{0}.8h, v30.8h, v31.8h",
            "fmul.8h": "v{0}.8h, v30.8h, v31.8h", "fmlal": "v{0}.4s, v30.4h, v31.4h",
            "fmlal2": "v{0}.4s, v30.4h, v31.4h"}  # fmt: skip

#: Independent instructions that show a unit's rate: enough to hide its latency.
INDEPENDENT = 24

ITERATIONS = 200

CORES = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1")

TAIL = Tail("rescale", "uint8", 3, 0, 255, shrinks=True)

_INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\t(\S+)\s*(.*?)\s*(?://.*)?$")
_BRANCH = re.compile(r"^(?:b\.\w+|b|cbn?z|tbn?z)$")


@dataclass(frozen=True)
class Layer:
    """A kernel to count. build: makes it for a target."""

    name: str
    build: Callable[[Target], tirx.PrimFunc]


def _convolution(shape: Convolution, dtype: str) -> Callable[[Target], tirx.PrimFunc]:
    spec = convolution_int8.ConvolutionInt8(shape, dtype, 3)
    return lambda target: convolution_int8.build(spec, TAIL, kernel_levels(target)[0])


def _linear(dtype: str) -> Callable[[Target], tirx.PrimFunc]:
    spec = linear_int8.LinearInt8(128, 768, 768, dtype, 3)
    return lambda target: linear_int8.build(spec, TAIL, kernel_levels(target)[0])


def _scores(target: Target) -> tirx.PrimFunc:
    spec = matmul_int8.MatmulInt8(12, 128, 64, 128, "uint8", 3, transposed=True)
    return matmul_int8.build(spec, Tail("scale", "float32"), kernel_levels(target)[0])


def _float(generator: Callable[..., tirx.PrimFunc], shape: Any, dtype: str, *options: Any) -> Callable[[Target], tirx.PrimFunc]:
    levels = {"float32": lambda target: kernel_levels(target)[1], "float16": float16_level}
    return lambda target: generator(shape, FloatSpec(level=levels[dtype](target), dtype=dtype), *options)


FRAMED = Convolution(1, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1))
POINTWISE = Convolution(1, 96, 56, 56, 24, (1, 1))
IMAGE = Convolution(1, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3))
DEPTHWISE = Convolution(1, 96, 28, 28, 96, (3, 3), (1, 1), (1, 1), groups=96)
MATRIX, ROW = MatrixProduct(128, 768, 768), MatrixProduct(1, 768, 768)

LAYERS = (
    Layer("linear 128x768 -> 768, u8", _linear("uint8")),
    Layer("linear 128x768 -> 768, s8", _linear("int8")),
    Layer("convolution 3x3, 64x56x56 -> 64, u8", _convolution(FRAMED, "uint8")),
    Layer("convolution 1x1, 96x56x56 -> 24, u8", _convolution(POINTWISE, "uint8")),
    Layer("Q K^T, 12 heads of 128x64, u8", _scores),
    *(
        Layer(f"{name}, {short}", _float(generator, shape, dtype, *options))
        for short, dtype in (("f32", "float32"), ("f16", "float16"))
        for name, generator, shape, *options in (
            ("linear 128x768 -> 768", linear_f32.linear, MATRIX),
            ("linear 1x768 -> 768", linear_f32.linear, ROW),
            ("convolution 3x3, 64x56x56 -> 64", convolution_f32.convolution, FRAMED),
            ("convolution 1x1, 96x56x56 -> 24", convolution_f32.convolution, POINTWISE),
            ("convolution 7x7, image 3x224x224 -> 64", convolution_f32.convolution, IMAGE, True),
            ("depthwise 3x3, 96x28x28", depthwise_f32.depthwise, DEPTHWISE),
        )
    ),
)


@dataclass(frozen=True)
class Loop:
    """The loop of a kernel with the most products: its instructions, and products of one turn."""

    instructions: tuple[str, ...]
    products: int

    @property
    def instruction(self) -> str:
        """What most of its products come from, a key of PRODUCTS."""
        kinds = [kind_of(text) for text in self.instructions]
        return max((kind for kind in PRODUCTS), key=lambda kind: kinds.count(kind) * PRODUCTS[kind])


@dataclass(frozen=True)
class Rate:
    """Products a cycle of a loop and of nothing but its products, by one model of a core."""

    loop: Loop
    cycles: float
    peak: float

    @property
    def rate(self) -> float:
        return self.loop.products / self.cycles

    @property
    def share(self) -> float:
        return self.rate / self.peak


def measure(layer: Layer, core: str, mca: str) -> Rate:
    """Counts the inner loop of one layer's kernel for one core. Raises GraphwrightError: a tool failed, or no loop was found."""
    loop = inner_loop(disassemble(compile_kernel(layer, Target("arm64", core))))
    return Rate(loop, cycles(loop.instructions, core, mca), peak(loop.instruction, core, mca))


def compile_kernel(layer: Layer, target: Target) -> bytes:
    """Object code of a layer's kernel, as `TVMBackend.compile` makes it."""
    function, llvm = layer.build(target), tvm_target(target)
    with llvm:
        flat = flatten(tvm.IRModule({"main": function.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)}))
        kernels = [split_tasks(variable.name_hint, flat_function) for variable, flat_function in flat.functions_items()]
        return generate(tvm.IRModule({phase.name: phase.function for kernel in kernels for phase in kernel.phases}), llvm)


def disassemble(code: bytes) -> list[tuple[int, str]]:
    """(address, text) of every instruction; addresses repeat where there are several sections."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "kernels.o"
        path.write_bytes(code)
        text = _run([OBJDUMP, "-d", "--no-show-raw-insn", str(path)])
    found = [match for line in text.splitlines() if (match := _INSTRUCTION.match(line))]
    return [(int(match[1], 16), f"{match[2]} {match[3]}") for match in found]


def kind_of(text: str) -> str:
    """The key of PRODUCTS that an instruction would have."""
    name, _, operands = text.partition(" ")
    arranged = name + operands.partition(",")[0].lstrip("v0123456789")
    return arranged if arranged in PRODUCTS else name


def inner_loop(instructions: list[tuple[int, str]]) -> Loop:
    """The loop without inner branches that makes the most products a turn."""
    best = Loop((), 0)
    for end, (address, text) in enumerate(instructions):
        name, _, rest = text.partition(" ")
        target = re.search(r"\b([0-9a-f]+) <", rest)
        if not _BRANCH.match(name) or target is None or int(target[1], 16) > address:
            continue
        start = end
        while start > 0 and instructions[start][0] > int(target[1], 16) and instructions[start - 1][0] < instructions[start][0]:
            start -= 1
        body = tuple(body for _, body in instructions[start:end])
        if any(_BRANCH.match(line.split()[0]) for line in body):
            continue
        products = sum(PRODUCTS.get(kind_of(line), 0) for line in body)
        best = Loop(body, products) if products > best.products else best
    if not best.products:
        raise GraphwrightError("no loop with products in the kernel's object code")
    return best


def peak(instruction: str, core: str, mca: str) -> float:
    """Products a cycle of independent instructions of one kind."""
    name, form = instruction.partition(".")[0], OPERANDS.get(instruction, "v{0}.4s, v30.16b, v31.16b")
    body = tuple(f"{name} {form.format(index)}" for index in range(INDEPENDENT))
    return INDEPENDENT * PRODUCTS[instruction] / cycles(body, core, mca)


def cycles(instructions: tuple[str, ...], core: str, mca: str) -> float:
    """Cycles of one turn in the model's steady state."""
    text = "\n".join(re.sub(r"\s*<[^>]*>", "", line) for line in instructions)
    counts = []
    for turns in (ITERATIONS, 2 * ITERATIONS):
        report = _run([mca, "-march=aarch64", f"-mcpu={core}", f"-iterations={turns}"], text)
        counts.append(int(re.search(r"Total Cycles:\s+(\d+)", report)[1]))  # type: ignore[index]
    return (counts[1] - counts[0]) / ITERATIONS


def register(app: typer.Typer) -> None:
    """Adds the verb to the command of all tables."""
    app.command()(arm)


def arm(
    cores: Annotated[str, typer.Option(help="Levels of target arm64, comma-separated.")] = ",".join(CORES),
    mca: Annotated[str, typer.Option(help="llvm-mca; before LLVM 17 it takes every big core for a Cortex-A57.")] = "llvm-mca",
) -> None:
    """Products a cycle of inner loops on AArch64 cores, counted by llvm-mca."""
    rows = []
    for core in cores.split(","):
        for layer in LAYERS:
            found = measure(layer, core, mca)
            rows.append([core, layer.name, found.loop.instruction, str(len(found.loop.instructions))])
            rows[-1] += [f"{found.cycles:.1f}", f"{found.rate:.1f}", f"{found.peak:.1f}", f"{found.share:.0%}"]
    version = re.search(r"LLVM version (\S+)", _run([mca, "--version"]))
    typer.echo(f"\nllvm-mca {version[1] if version else ''}: counts of a model, not times; {datetime.date.today().isoformat()}\n")
    head = ["core", "kernel", "instruction", "instructions a turn", "cycles", "products a cycle", "peak", "share"]
    typer.echo(markdown(head, rows))


def _run(command: list[str], text: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError as error:
        packages = {OBJDUMP: "binutils-aarch64-linux-gnu"}
        raise GraphwrightError(
            f"'{command[0]}' is not on the PATH; install it (Debian: apt-get install {packages.get(command[0], 'llvm')})"
        ) from error
    if done.returncode:
        raise GraphwrightError(f"{' '.join(command)} failed: {done.stderr.strip()[:500]}")
    return done.stdout
