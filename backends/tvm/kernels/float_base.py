"""What the float32 kernels share: fused activations, instruction-set levels and the choice of a register tile.

The float kernels promise closeness, not bits: the order of a sum and the use of fused multiply-add are free. A result differs
from the exact one by at most (K + 2) * eps * (sum |x| |w| + |bias|), K the number of products. Activations must be finite.
With half-precision tensors it is the same sum of the stored numbers, the residual and the activation included, and one rounding
more, of the result: by u |y| with u = 2^-8 for bfloat16 and 2^-11 for float16 (2^-125 and 2^-25 absolute, near zero). Layers of
float16 on AArch64 cores whose one fast multiplication rounds to float16 sum a few products there: `half_neon` has their bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ....ir.errors import OptionError, UnknownNameError
from .base import LANES, VECTOR
from .emit import accumulator, arguments, bind, ramp, splat, store
from .half import NATIVE, NUMPY, is_half, lanes_of, rounded, weight_step, widened
from .half_neon import CHAINED, LONG, PLANAR_ROWS, Halves
from .isa import T
from .multiply import Dotted, Weights, Widened
from .vector_math import FUNCTIONS

#: Data up to this size stay in the second-level cache while a kernel runs.
CACHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Activation:
    """What a kernel does to a value before it stores it: `function` (a name of vector_math.FUNCTIONS), then a clamp to
    [low, high]; None leaves out the function or that side."""

    low: float | None = None
    high: float | None = None
    function: str | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise OptionError(f"activation: low {self.low} is above high {self.high}")
        if self.function is not None and self.function not in FUNCTIONS:
            raise UnknownNameError("activation function", self.function, FUNCTIONS)

    def emit(self, value: Any) -> Any:
        if self.function is not None:
            value = FUNCTIONS[self.function](bind(value))
        if self.low is not None:
            value = T.max(value, splat(T.float32(self.low)))
        if self.high is not None:
            value = T.min(value, splat(T.float32(self.high)))
        return value


NO_ACTIVATION = Activation()
RELU = Activation(0.0)
RELU6 = Activation(0.0, 6.0)


@dataclass(frozen=True)
class Level:
    """Costs of one instruction-set level, in vectors of LANES floats and in cycles.

    registers: vectors the register file holds. fma, load, broadcast: cycles each takes when the ports are saturated.
    stream: cycles to bring one vector from the second-level cache. far: cycles more where it comes from behind that.
    latency: cycles before a sum can be added to again. weights: vectors that one step's weights of a group take, 2 where pairs
    of channels are widened together. widen: cycles of the multiplying units to widen those of a group. rows: of the largest
    tile of one group, of two, ...; empty where `registers` tells.
    """

    name: str
    registers: int
    fma: float
    load: float
    broadcast: float
    stream: float
    far: float
    latency: float
    flops_per_us: int
    weights: int = 1
    widen: float = 0.0
    rows: tuple[int, ...] = ()

    @property
    def most_groups(self) -> int:
        return len(self.rows) or (self.registers - 1) // (self.weights + 1)

    def most_rows(self, groups: int) -> int:
        """Rows of a tile of `groups` that leave registers for one step's weights and one broadcast value; 0 where none fits."""
        if self.rows:
            return self.rows[groups - 1] if groups <= len(self.rows) else 0
        return max(0, (self.registers - 1) // groups - self.weights)


LEVELS = {
    "avx512": Level("avx512", 32, fma=0.5, load=0.5, broadcast=0.5, stream=2.5, far=4.0, latency=4, flops_per_us=80_000),
    # For bfloat16 only: half the bytes, and one instruction more to widen a vector of weights.
    NATIVE: Level(NATIVE, 32, fma=0.5, load=1.0, broadcast=0.5, stream=1.25, far=2.0, latency=4, flops_per_us=80_000),
    # AVX2: 16 registers of 8 lanes. AArch64's 32 of 4 lanes hold the same number of floats.
    "portable": Level("portable", 8, fma=1.0, load=1.0, broadcast=0.5, stream=2.0, far=6.0, latency=4, flops_per_us=20_000),
    # For float16 products alone, on AArch64: half the bytes, and eight channels of a row in one register.
    LONG: Level(LONG, 8, 1.0, 0.5, 0.125, 1.0, 3.0, 4, 40_000, rows=(5, 2, 1)),
    CHAINED: Level(CHAINED, 8, 0.6, 0.5, 0.125, 1.0, 3.0, 2, 30_000, rows=(4, 2, 1)),
}

#: Level -> cycles of the multiplying units to widen a vector of half-precision weights: AArch64's, and AVX2's much alike.
WIDEN = {"portable": 1.5}


def level_of(name: str) -> Level:
    if name not in LEVELS:
        raise UnknownNameError("float kernel level", name, LEVELS)
    return LEVELS[name]


@dataclass(frozen=True)
class Tile:
    """A register tile: `rows` output positions times `groups` vectors of LANES output channels."""

    rows: int
    groups: int


@dataclass(frozen=True)
class FloatSpec:
    """How a kernel of the float family is made for its shape: every generator is `generator(shape, spec)`.

    activation: applied before the store. residual: a second tensor of the output's shape and layout (an input buffer R, after
    the others) is added before the activation. tile: the register tile; by default the one of least estimated time.
    dtype: what X, R, W and Y are stored in, float32, bfloat16 or float16; bias and sums are float32. dot: multiply pairs of
    bfloat16 numbers with vdpbf16ps (level "avx512-bf16"), see `target.dots_bfloat16`.
    """

    activation: Activation = NO_ACTIVATION
    residual: bool = False
    level: str = "avx512"
    tile: Tile | None = None
    dtype: str = "float32"
    dot: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in NUMPY:
            raise UnknownNameError("float type of a kernel", self.dtype, NUMPY)
        if self.dot and (self.dtype, self.level) != ("bfloat16", NATIVE):
            raise OptionError(f"vdpbf16ps multiplies bfloat16 at level {NATIVE}, not {self.dtype} at level {self.level}")
        if self.level in (LONG, CHAINED) and self.dtype != "float16":
            raise OptionError(f"level {self.level} multiplies float16, not {self.dtype}")

    @property
    def chained(self) -> bool:
        """Whether packed weights are scaled for sums in float16 (`half_neon.scaled_panels`)."""
        return self.level == CHAINED

    @property
    def machine(self) -> Level:
        """The level as a product with packed weights of `dtype` uses it."""
        return self.machine_of(self.weights())

    def machine_of(self, weights: Weights) -> Level:
        """The same with these; where widening takes the units that multiply, halves lie in registers beside what they become."""
        level, widen = level_of(self.level), WIDEN.get(self.level, 0.0) if self.dtype != "float32" else 0.0
        rows = PLANAR_ROWS if self.chained and isinstance(weights, Halves) and weights.planar else level.rows
        return replace(level, weights=max(weights.factors, 2 if widen else 1), widen=widen, rows=rows)

    def weights(self, *, planar: bool = False, batched: bool = False) -> Weights:
        """How a product reads its weights. planar: neighbouring channels of X are not neighbours in memory. batched: the weights
        are another tensor, packed by the kernel: as float16 for level LONG, in float32 whatever the type of X and Y elsewhere."""
        if self.dot and not planar and not batched:
            return Dotted()
        if self.level in (LONG, CHAINED) and not (batched and self.chained):
            return Halves(self.chained, planar)
        return Widened(1 if batched else weight_step(self.dtype))


#: Neither residual nor activation, at the best level.
PLAIN = FloatSpec()


@dataclass(frozen=True)
class MatrixProduct:
    """Y [batch, rows, columns] = A [batch, rows, inner] @ B [batch, inner, columns], or B [batch, columns, inner] transposed."""

    rows: int
    inner: int
    columns: int
    batch: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.inner, self.columns, self.batch) < 1:
            raise OptionError(f"every extent of a matrix product must be at least 1, got {self}")

    @property
    def work(self) -> str:
        """`49x192 -> 49x768`, or `6x49x64 by 64x49 transposed` for a batch."""
        if self.batch == 1 and not self.transposed:
            return f"{self.rows}x{self.inner} -> {self.rows}x{self.columns}"
        order = " transposed" if self.transposed else ""
        return f"{self.batch}x{self.rows}x{self.inner} by {self.inner}x{self.columns}{order}"

    @property
    def macs(self) -> int:
        return self.batch * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Buffers:
    """Flat views of a kernel's buffers; `bias` and `residual` where it has one."""

    x: Any
    residual: Any | None
    w: Any
    bias: Any | None
    y: Any

    def first(self, group: Any) -> Any:
        """The bias of a vector of channels, or zeros."""
        return splat(T.float32(0.0)) if self.bias is None else bind(self.bias.vload([group * LANES], VECTOR))

    def finish(self, spec: FloatSpec, value: Any, offset: Any, valid: int = LANES) -> None:
        """Adds the residual at `offset` of the output, applies the activation, and stores the first `valid` lanes."""
        if self.residual is not None:
            value = value + load_lanes(self.residual, offset, valid)
        store_lanes(self.y, offset, spec.activation.emit(value), valid, level=spec.level)


def declare(
    spec: FloatSpec, x: tuple[int, ...], w: tuple[int, ...], bias: int, y: tuple[int, ...], names: tuple[str, str] = ("X", "W")
) -> Buffers:
    """Declares X, then R if the spec has a residual, W, bias [bias] if it is not 0, and Y, of these shapes."""
    dtype = spec.dtype
    residual = [("R", y, dtype)] if spec.residual else []
    vector = [("bias", (bias,), "float32")] if bias else []
    flat = arguments((names[0], x, dtype), *residual, (names[1], w, dtype), *vector, ("Y", y, dtype))
    rest = flat[1 + len(residual) :]
    return Buffers(flat[0], flat[1] if residual else None, rest[0], rest[1] if bias else None, rest[-1])


def fits(level: Level, tile: Tile) -> bool:
    """Whether the accumulators, one step's weights and one broadcast value stay in registers."""
    return tile.rows <= level.most_rows(tile.groups)


def panel_widths(groups: int, width: int) -> list[tuple[int, int, int]]:
    """Cuts `groups` channel groups into (first group, panels, groups a panel): full panels, then one narrower rest."""
    full, rest = divmod(groups, width)
    runs = [(0, full, width)] if full else []
    return runs + ([(full * width, 1, rest)] if rest else [])


def tile_cycles(level: Level, tile: Tile, lines: int, columns: int, groups: int, depth: int) -> float:
    """Estimated cycles of `lines` lines of `columns` output positions, `groups` channel groups and `depth` products each.

    A step of the inner loop is bound by multiply-adds, by loads, by the weights' way from the second-level cache (the first tile
    that needs them finds them further away, where they are too many to stay) or by the latency of a sum; a tile also pays for
    its prologue, and each of its rows for a store that starts on a new part of memory.
    """
    tiles = lines * -(-columns // tile.rows)
    total = 0.0
    stream = level.stream + (level.far / tiles if groups * depth * LANES * 4 > CACHED_BYTES else 0.0)
    for _, panels, width in panel_widths(groups, tile.groups):
        products = tile.rows * width
        step = max(
            products * level.fma + width * level.widen,
            width * level.load + tile.rows * level.broadcast,
            width * stream,
            level.latency,
        )
        total += panels * tiles * (step * depth + 20 + tile.rows * (4 + 2 * width))
    return total


def _candidates(level: Level, columns: int, groups: int) -> Iterator[Tile]:
    for rows in range(1, min(columns, level.registers) + 1):
        for width in range(1, groups + 1):
            if not fits(level, Tile(rows, width)):
                break
            yield Tile(rows, width)


def choose_tile(level: Level, lines: int, columns: int, groups: int, depth: int) -> Tile:
    """The register tile with the least estimated time; the smaller one where two are equal."""
    return min(
        _candidates(level, columns, groups),
        key=lambda tile: (tile_cycles(level, tile, lines, columns, groups, depth), tile.rows * tile.groups),
    )


def load_lanes(buffer: Any, offset: Any, valid: int = LANES, fill: float = 0.0, dtype: str = "float32") -> Any:
    """The vector at `offset`; only `valid` elements are read, the lanes past them hold `fill`. Half precision is widened."""
    if is_half(buffer):
        if valid == LANES:
            return widened(buffer, offset)
        scratch = accumulator("float32")
        store(scratch, 0, splat(T.float32(fill)))
        T.buffer_store(scratch, widened(buffer, offset, valid), [ramp(0, valid) if valid > 1 else 0])
        return bind(scratch.vload([0], VECTOR))
    if valid == LANES:
        return buffer.vload([offset], f"{dtype}x{LANES}")
    scratch = accumulator(dtype)
    store(scratch, 0, splat(T.Cast(dtype, T.float32(fill)) if dtype != "float32" else T.float32(fill)))
    part = buffer.vload([offset], lanes_of(dtype, valid))
    T.buffer_store(scratch, part, [ramp(0, valid) if valid > 1 else 0])
    return bind(scratch.vload([0], f"{dtype}x{LANES}"))


def store_lanes(buffer: Any, offset: Any, value: Any, valid: int = LANES, dtype: str = "float32", level: str = "") -> None:
    """Stores the first `valid` lanes of a vector; rounds to half precision where the buffer holds it."""
    if is_half(buffer):
        dtype = str(buffer.dtype)
        value = rounded(value, dtype, level)
    if valid == LANES:
        store(buffer, offset, value)
        return
    scratch = accumulator(dtype)
    store(scratch, 0, value)
    part = scratch.vload([0], lanes_of(dtype, valid))
    T.buffer_store(buffer, part, [ramp(offset, valid) if valid > 1 else offset])
