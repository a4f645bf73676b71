"""Which kernels can be tuned: the name of each specification, the choices worth measuring, and what a choice means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from ..kernels import convolution_f32, convolution_int8, linear_f32, linear_int8, matmul_f32, matmul_int8
from ..kernels.base import LANES, Convolution, padded
from ..kernels.convolution_int8 import ConvolutionInt8
from ..kernels.float_base import Level, Tile, fits, level_of, tile_cycles
from ..kernels.gemm_int8 import Pixels
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

    position: which argument of the generator takes the choice (None: the analytical guess). level: which one is the level.
    work: the specification in words; a key of the database with the family's name before it. None: not tunable.
    space: the choices worth measuring. argument: a choice as the generator takes it.
    """

    name: str
    position: int
    level: int
    work: Callable[[Specification], str | None]
    space: Callable[[Specification], list[Choice]]
    argument: Callable[[Specification, Choice], Any]

    def key(self, spec: Specification) -> str | None:
        work = self.work(spec)
        return None if work is None else f"{self.name} {work}"

    def chosen(self, spec: Specification, choice: Choice) -> Specification:
        """The specification with a choice in its place."""
        full = [*spec, *[None] * (self.position + 1 - len(spec))]
        full[self.position] = self.argument(spec, choice)
        return tuple(full)


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


def _tiling(spec: Specification, choice: Choice) -> Any:
    pixels, columns, _ = _product(spec)
    numbers = {name: int(choice[name]) for name in ("panels", "height", "width")}
    return tiling(Cut(**numbers, rows_outer=bool(choice["rows_outer"])), pixels, columns, isa_of(spec[2]))


# -- float products ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lines:
    """A float product as `choose_tile` sees it."""

    lines: int
    columns: int
    groups: int
    depth: int


def _convolution_lines(spec: Specification) -> _Lines:
    shape: Convolution = spec[0]
    pointwise = shape.kernel == (1, 1) == shape.stride and shape.padding == (0, 0) and not spec[4]
    pixels = shape.out_height * shape.out_width
    lines, columns = (1, shape.batch * pixels) if pointwise else (shape.batch * shape.out_height, shape.out_width)
    return _Lines(lines, columns, padded(shape.filters) // LANES, prod(shape.kernel) * shape.channels)


def _convolution_f32(spec: Specification) -> str | None:
    shape: Convolution = spec[0]
    return f"{shape.work}{', planar' if spec[4] else ''}" if shape.groups == 1 else None


def _linear_lines(spec: Specification) -> _Lines:
    lead, inputs, outputs = spec[:3]
    return _Lines(1, prod(lead), padded(outputs) // LANES, inputs)


def _linear_f32(spec: Specification) -> str:
    lead, inputs, outputs = spec[:3]
    return f"{prod(lead)}x{inputs} -> {prod(lead)}x{outputs}"


def _matmul_lines(spec: Specification) -> _Lines:
    lead, rows, inner, columns = spec[:4]
    return _Lines(prod(lead), rows, padded(columns) // LANES, inner)


def _matmul_f32(spec: Specification) -> str:
    lead, rows, inner, columns, transposed = spec[:5]
    return f"{prod(lead)}x{rows}x{inner} by {inner}x{columns}{' transposed' if transposed else ''}"


def _float_family(
    name: str, position: int, level: int, work: Callable[[Specification], str | None], lines: Callable[[Specification], _Lines]
) -> Family:
    def space(spec: Specification) -> list[Choice]:
        shape, registers = lines(spec), level_of(spec[level])
        tiles = _tiles(registers, shape.columns, shape.groups)
        estimate = [tile_cycles(registers, t, shape.lines, shape.columns, shape.groups, shape.depth) for t in tiles]
        best = sorted(zip(estimate, tiles, strict=True), key=lambda pair: (pair[0], pair[1].rows * pair[1].groups))
        return [asdict(tile) for _, tile in best[:FLOAT_TILES]]

    def argument(spec: Specification, choice: Choice) -> Tile:
        registers = level_of(spec[level]).registers
        groups = max(1, min(int(choice["groups"]), (registers - 1) // 2))
        return Tile(max(1, min(int(choice["rows"]), (registers - 1 - groups) // groups)), groups)

    return Family(name, position, level, work, space, argument)


def _tiles(level: Level, columns: int, groups: int) -> list[Tile]:
    sizes = range(1, level.registers + 1)
    tiles = [Tile(rows, width) for rows in sizes[: min(columns, len(sizes))] for width in sizes[: min(groups, len(sizes))]]
    return [tile for tile in tiles if fits(level, tile)]


FAMILIES: dict[Any, Family] = {
    convolution_int8.build: Family("convolution_int8", 3, 2, _convolution_int8, _cuts, _tiling),
    linear_int8.build: Family("linear_int8", 3, 2, _linear_int8, _cuts, _tiling),
    matmul_int8.build: Family("matmul_int8", 3, 2, _matmul_int8, _cuts, _tiling),
    convolution_f32.convolution: _float_family("convolution_f32", 3, 2, _convolution_f32, _convolution_lines),
    linear_f32.linear: _float_family("linear_f32", 5, 4, _linear_f32, _linear_lines),
    matmul_f32.matmul: _float_family("matmul_f32", 6, 5, _matmul_f32, _matmul_lines),
}


def tuned(generator: Any, spec: Sequence[Any], database: TuningDatabase) -> tuple[Specification, str | None]:
    """The specification with its measured choice filled in, and the key of the row; as it came, and None, where there is none."""
    spec = tuple(spec)
    family = FAMILIES.get(generator)
    if family is None or (len(spec) > family.position and spec[family.position] is not None):
        return spec, None
    key = family.key(spec)
    row = None if key is None else database.find(key, spec[family.level])
    if row is None or row.choice is None:
        return spec, None
    return family.chosen(spec, row.choice), key
