"""Which kernels can be tuned: the name of each specification, the choices worth measuring, and what a choice means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import Any

from ..cuda.kernels import blocks, linears_int8, plan_float, plan_fp8, plan_image, plan_int8
from ..cuda.kernels import convolution_f32 as cuda_convolution_f32
from ..cuda.kernels import convolution_fp8 as cuda_convolution_fp8
from ..cuda.kernels import convolution_int8 as cuda_convolution
from ..cuda.kernels import linear_f32 as cuda_linear_f32
from ..cuda.kernels import linear_fp8 as cuda_linear_fp8
from ..cuda.kernels import linear_int8 as cuda_linear
from ..cuda.kernels import matmul_f32 as cuda_matmul_f32
from ..cuda.kernels import matmul_int8 as cuda_matmul
from ..cuda.kernels.family_float import dtype_of
from ..kernels import convolution_f32, convolution_int8, linear_f32, linear_int8, matmul_f32, matmul_int8
from ..kernels.base import LANES, Convolution, padded
from ..kernels.convolution_int8 import ConvolutionInt8
from ..kernels.float_base import FloatSpec, Level, MatrixProduct, Tile, fits, tile_cycles
from ..kernels.gemm_int8 import Pixels
from ..kernels.half import NATIVE
from ..kernels.isa import isa_of
from ..kernels.linear_int8 import LinearInt8
from ..kernels.matmul_int8 import MatmulInt8
from ..kernels.tilings import Cut, cuts, tiling
from . import Choice, TuningDatabase

#: Float tiles measured a kernel, the best ones of the generator's own estimate.
FLOAT_TILES = 16

Specification = tuple[Any, ...]


@dataclass(frozen=True)
class Family:
    """One tunable generator.

    level: the kernel level of a specification. given: whether it names its choice already. work: the specification in words; a
    key of the database with the family's name before it. None: not tunable. space: the choices worth measuring. chosen: the
    specification with a choice in its place.
    """

    name: str
    level: Callable[[Specification], str]
    given: Callable[[Specification], bool]
    work: Callable[[Specification], str | None]
    space: Callable[[Specification], list[Choice]]
    chosen: Callable[[Specification, Choice], Specification]

    def key(self, spec: Specification) -> str | None:
        work = self.work(spec)
        return None if work is None else f"{self.name} {work}"


# -- int8 products -----------------------------------------------------------------------------------------------------------


def _product(spec: Specification) -> tuple[Pixels, int, int]:
    """(rows, padded columns, k steps) of an int8 product. Only sizes: the strides of its operands choose nothing."""
    operation, isa = spec[0], isa_of(spec[2])
    if isinstance(operation, ConvolutionInt8):
        shape = operation.shape
        columns, steps = padded(shape.filters), prod(shape.kernel) * ceil(shape.channels / isa.step)
        if (*shape.kernel, *shape.stride) == (1, 1, 1, 1):
            return Pixels(1, 1, shape.batch * shape.out_height * shape.out_width, 0, 0, 0, columns), columns, steps
        return Pixels(shape.batch, shape.out_height, shape.out_width, 0, 0, 0, columns), columns, steps
    steps = ceil(operation.inner / isa.step)
    if isinstance(operation, LinearInt8):
        return Pixels(1, 1, operation.rows, 0, 0, 0, operation.outer), padded(operation.outer), steps
    return Pixels(operation.batch, 1, operation.rows, 0, 0, 0, operation.columns), padded(operation.columns), steps


def _convolution_int8(spec: Specification) -> str | None:
    operation: ConvolutionInt8 = spec[0]
    return f"{operation.dtype} {operation.work}" if operation.shape.groups == 1 else None


def _linear_int8(spec: Specification) -> str:
    operation: LinearInt8 = spec[0]
    return f"{operation.dtype} {operation.work}"


def _matmul_int8(spec: Specification) -> str:
    operation: MatmulInt8 = spec[0]
    return f"{operation.a_dtype} {operation.work}"


def _cuts(spec: Specification) -> list[Choice]:
    return [asdict(cut) for cut in cuts(*_product(spec), isa_of(spec[2]))]


def _on_tiles(spec: Specification) -> bool:
    """Whether a tile unit computes the product; its blocking is the generator's own."""
    operation, isa = spec[0], isa_of(spec[2])
    if isinstance(operation, ConvolutionInt8):
        return convolution_int8.tiled_form(operation, isa) is not None
    if isinstance(operation, LinearInt8):
        return linear_int8.tiled(operation, isa)
    return matmul_int8.tiled(operation, isa)


def _int8_family(name: str, work: Callable[[Specification], str | None]) -> Family:
    """A generator of (operation, tail, level, tiling)."""

    def on_registers(spec: Specification) -> str | None:
        return None if _on_tiles(spec) else work(spec)

    def chosen(spec: Specification, choice: Choice) -> Specification:
        pixels, columns, _ = _product(spec)
        numbers = {name: int(choice[name]) for name in ("panels", "height", "width")}
        return (*spec[:3], tiling(Cut(**numbers, rows_outer=bool(choice["rows_outer"])), pixels, columns, isa_of(spec[2])))

    return Family(name, lambda spec: spec[2], lambda spec: len(spec) > 3 and spec[3] is not None, on_registers, _cuts, chosen)


# -- int8 products on a GPU --------------------------------------------------------------------------------------------------


def _cuda_convolution(spec: Specification) -> str:
    operation: ConvolutionInt8 = spec[0]
    return f"{operation.dtype} {'' if operation.quantize is None else 'image '}{operation.work}"


def _blocks(spec: Specification) -> list[Choice]:
    operation, _, level = spec[:3]
    if isinstance(operation, ConvolutionInt8):
        if operation.shape.depthwise:
            return [asdict(block) for block in plan_int8.depthwise_space(operation.shape)]
        if operation.quantize is not None:
            return [asdict(block) for block in plan_image.space(operation.shape)]
        problem = plan_int8.convolution_problem(operation.shape)
    elif isinstance(operation, LinearInt8):
        problem = plan_int8.linear_problem(operation.rows, operation.inner, operation.outer)
    else:
        problem = plan_int8.matmul_problem(operation.batch, operation.rows, operation.inner, operation.columns)
    return [asdict(block) for block in blocks.space(problem, level)]


def _cuda_family(name: str, work: Callable[[Specification], str | None]) -> Family:
    """A generator of (operation, tail, level, block).

    A row holds for codes of either type, which `work` names first: all but a program's own are s8 (`cuda/signed.py`).
    """

    def chosen(spec: Specification, choice: Choice) -> Specification:
        return (*spec[:3], blocks.Block(**choice))

    def shape(spec: Specification) -> str | None:
        key = work(spec)
        return None if key is None else key.partition(" ")[2]

    return Family(name, lambda spec: spec[2], lambda spec: len(spec) > 3 and spec[3] is not None, shape, _blocks, chosen)


def _typed(spec: Specification, work: str) -> str:
    dtype = dtype_of(spec[1])
    return work if dtype == "float32" else f"{dtype} {work}"


def _cuda_float_convolution(spec: Specification) -> str:
    return _typed(spec, f"{spec[0].work}{', planar' if _planar(spec) else ''}")


def _float_blocks(spec: Specification) -> list[Choice]:
    shape, dtype = spec[0], dtype_of(spec[1])
    if isinstance(shape, MatrixProduct):
        problem = blocks.Problem(shape.rows, shape.columns, shape.inner, plan_float.UNITS[dtype], shape.batch)
    else:
        problem = plan_float.convolution_problem(shape, dtype)
    return [asdict(block) for block in plan_float.space(problem, spec[1].level, dtype)]


def _fp8_blocks(spec: Specification) -> list[Choice]:
    shape = spec[0]
    if isinstance(shape, MatrixProduct):
        problem = plan_fp8.linear_problem(shape.rows, shape.inner, shape.columns)
    else:
        problem = plan_fp8.convolution_problem(shape)
    return [asdict(block) for block in blocks.space(problem, spec[1].level)]


def _cuda_float_family(
    name: str, work: Callable[[Specification], str], space: Callable[[Specification], list[Choice]] = _float_blocks
) -> Family:
    """A generator of (shape, FloatSpec, further options)."""

    def chosen(spec: Specification, choice: Choice) -> Specification:
        return (spec[0], replace(spec[1], tile=blocks.Block(**choice)), *spec[2:])

    return Family(name, lambda spec: spec[1].level, lambda spec: spec[1].tile is not None, work, space, chosen)


# -- float products ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lines:
    """A float product as `choose_tile` sees it."""

    lines: int
    columns: int
    groups: int
    depth: int


def _planar(spec: Specification) -> bool:
    return len(spec) > 2 and spec[2]


def _machine(options: FloatSpec, spec: Specification) -> Level:
    return options.machine_of(options.weights(planar=_planar(spec)))


def _lines(spec: Specification) -> _Lines:
    shape: Convolution | MatrixProduct = spec[0]
    if isinstance(shape, MatrixProduct):
        return _Lines(shape.batch, shape.rows, padded(shape.columns) // LANES, shape.inner)
    pointwise = shape.kernel == (1, 1) == shape.stride and not shape.bordered and not _planar(spec)
    pixels = shape.out_height * shape.out_width
    lines, columns = (1, shape.batch * pixels) if pointwise else (shape.batch * shape.out_height, shape.out_width)
    return _Lines(lines, columns, padded(shape.filters) // LANES, prod(shape.kernel) * shape.channels)


def _convolution_f32(spec: Specification) -> str | None:
    shape: Convolution = spec[0]
    return f"{shape.work}{', planar' if _planar(spec) else ''}" if shape.groups == 1 else None


def _product_f32(spec: Specification) -> str:
    shape: MatrixProduct = spec[0]
    return shape.work


def _float_family(name: str, work: Callable[[Specification], str | None]) -> Family:
    """A generator of (shape, FloatSpec, further options)."""

    def space(spec: Specification) -> list[Choice]:
        shape, level = _lines(spec), _machine(spec[1], spec)
        tiles = _tiles(level, shape.columns, shape.groups)
        estimate = [tile_cycles(level, t, shape.lines, shape.columns, shape.groups, shape.depth) for t in tiles]
        best = sorted(zip(estimate, tiles, strict=True), key=lambda pair: (pair[0], pair[1].rows * pair[1].groups))
        choices = [asdict(tile) for _, tile in best[:FLOAT_TILES]]
        if (spec[1].dtype, spec[1].level) != ("bfloat16", NATIVE):
            return choices
        return [{**choice, "dot": dot} for choice in choices for dot in (False, True)]

    def chosen(spec: Specification, choice: Choice) -> Specification:
        # A planar image has no neighbouring channels to multiply in pairs.
        tiled = replace(spec[1], dot=bool(choice.get("dot", False)) and not _planar(spec))
        level = _machine(tiled, spec)
        groups = max(1, min(int(choice["groups"]), level.most_groups))
        tile = Tile(max(1, min(int(choice["rows"]), level.most_rows(groups))), groups)
        return (spec[0], replace(tiled, tile=tile), *spec[2:])

    def typed(spec: Specification) -> str | None:
        found, dtype = work(spec), spec[1].dtype
        return found if found is None or dtype == "float32" else f"{dtype} {found}"

    return Family(name, lambda spec: spec[1].level, lambda spec: spec[1].tile is not None, typed, space, chosen)


def _tiles(level: Level, columns: int, groups: int) -> list[Tile]:
    sizes = range(1, level.registers + 1)
    tiles = [Tile(rows, width) for rows in sizes[: min(columns, len(sizes))] for width in sizes[: min(groups, len(sizes))]]
    return [tile for tile in tiles if fits(level, tile)]


FAMILIES: dict[Any, Family] = {
    cuda_convolution.build: _cuda_family("convolution_int8", _cuda_convolution),
    cuda_linear.build: _cuda_family("linear_int8", _linear_int8),
    linears_int8.linears: _cuda_family("linear_int8", _linear_int8),
    cuda_matmul.build: _cuda_family("matmul_int8", _matmul_int8),
    cuda_convolution_f32.convolution: _cuda_float_family("convolution_f32", _cuda_float_convolution),
    cuda_linear_f32.linear: _cuda_float_family("linear_f32", lambda spec: _typed(spec, spec[0].work)),
    cuda_matmul_f32.matmul: _cuda_float_family("matmul_f32", lambda spec: _typed(spec, spec[0].work)),
    cuda_convolution_fp8.convolution: _cuda_float_family("convolution_fp8", lambda spec: spec[0].work, _fp8_blocks),
    cuda_linear_fp8.linear: _cuda_float_family("linear_fp8", lambda spec: spec[0].work, _fp8_blocks),
    convolution_int8.build: _int8_family("convolution_int8", _convolution_int8),
    linear_int8.build: _int8_family("linear_int8", _linear_int8),
    matmul_int8.build: _int8_family("matmul_int8", _matmul_int8),
    convolution_f32.convolution: _float_family("convolution_f32", _convolution_f32),
    linear_f32.linear: _float_family("linear_f32", _product_f32),
    matmul_f32.matmul: _float_family("matmul_f32", _product_f32),
}


def tuned(generator: Any, spec: Sequence[Any], database: TuningDatabase) -> tuple[Specification, str | None]:
    """The specification with its measured choice filled in, and the key of the row; as it came, and None, where there is none."""
    spec = tuple(spec)
    family = FAMILIES.get(generator)
    if family is None or family.given(spec):
        return spec, None
    key = family.key(spec)
    row = None if key is None else database.find(key, family.level(spec))
    if row is None or row.choice is None:
        return spec, None
    return family.chosen(spec, row.choice), key
