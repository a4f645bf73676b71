"""float16 products of the AArch64 levels against float64, on emulated processors: each level's own bound, on odd sizes.

All cases of a level are one library and one process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated import Case, emulate
from graphwright.backends.target import Target
from graphwright.backends.tvm.kernels import convolution_f32, depthwise_f32, linear_f32, matmul_f32
from graphwright.backends.tvm.kernels.base import LANES, Convolution, padded
from graphwright.backends.tvm.kernels.float_base import NO_ACTIVATION, RELU, Activation, FloatSpec, MatrixProduct
from graphwright.backends.tvm.kernels.half_neon import CHAIN, CHAINED, LONG, powers_above, scaled_panels
from graphwright.backends.tvm.target import float16_level
from graphwright.ir.errors import OptionError

from .float_cases import AARCH64, EPS, ROUNDOFF, activated, assembly, normal, to_physical

#: Level of the target, of its kernels, and emulated processors that have no more than it asks for, or everything.
LEVELS = [
    ("cortex-a53", "portable", ("cortex-a53",)),
    ("cortex-a76", CHAINED, ("cortex-a76", "neoverse-n1")),
    ("neoverse-v1", LONG, ("max",)),
]

UNIT, LEAST = ROUNDOFF["float16"]


@dataclass
class Wanted:
    """A case, its exact result, and what a float32 sum and a chain of float16 sums may be off by before the activation."""

    name: str
    case: Case
    view: Any
    exact: np.ndarray
    single: np.ndarray
    chain: np.ndarray
    activation: Activation = NO_ACTIVATION

    def excess(self, output: np.ndarray, chained: bool) -> float:
        """The largest error over its bound. Slopes of the activations here are at most 1.5."""
        wide, found = activated(self.activation, self.exact), self.view(output).astype(np.float64)
        bound = self.single + self.chain if chained else self.single
        bound = bound if self.activation.function is None else 1.5 * bound + 6 * EPS * (1 + np.abs(self.exact))
        return float((np.abs(found - wide) / (bound * (1 + UNIT) + UNIT * np.abs(wide) + LEAST)).max())


def bounds(depth: int, magnitude: np.ndarray, inputs: np.ndarray, scale: np.ndarray, chain: int = CHAIN) -> dict[str, Any]:
    """Of sums of `depth` products. magnitude: sum |x| |w| + |bias|; inputs: sum |x|; scale: s of each output."""
    return {
        "single": (depth + 2) * EPS * magnitude,
        "chain": chain * UNIT * magnitude + 2.0**-25 * scale * (depth + inputs),
    }


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16)


def most(w: np.ndarray, chain: int = CHAIN) -> np.ndarray:
    """Not below s of each output channel; w: [outputs, ...]."""
    return 2.1 * np.minimum(np.abs(w).reshape(len(w), -1).sum(1), chain * np.abs(w).reshape(len(w), -1).max(1)) + 2.0**-14


def linear(rng, level: str, sizes: tuple[int, int, int], activation: Activation, residual: bool, size: float) -> Wanted:
    """size: of the weights."""
    rows, inputs, outputs = sizes
    x, w = normal(rng, rows, inputs, dtype="float16"), normal(rng, outputs, inputs, dtype="float32") * np.float32(size)
    w, bias = half(w).astype(np.float32), normal(rng, outputs)
    added = normal(rng, rows, outputs, dtype="float16") * np.float32(residual)
    spec = FloatSpec(activation, residual, level, dtype="float16")
    packed = [linear_f32.pack_weight(w, "float16", spec.chained), linear_f32.pack_bias(outputs, bias)]
    case = Case(
        linear_f32.linear(MatrixProduct(*sizes), spec),
        [half(x), *([half(added)] if residual else []), *packed],
        ((rows, outputs), "float16"),
    )
    magnitude = np.abs(x) @ np.abs(w).T + np.abs(bias) + np.abs(added)
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + bias + added
    limits = bounds(inputs + 1, magnitude, np.abs(x).sum(1)[:, None], most(w))
    return Wanted(f"linear {sizes}", case, lambda y: y, exact, **limits, activation=activation)


def convolution(rng, level: str, shape: Convolution, activation: Activation, planar: bool) -> Wanted:
    family = depthwise_f32 if shape.depthwise else convolution_f32
    x = normal(rng, shape.batch, shape.channels, shape.height, shape.width, dtype="float16")
    w = half(normal(rng, shape.filters, shape.channels // shape.groups, *shape.kernel) * 0.1).astype(np.float32)
    bias, spec = normal(rng, shape.filters), FloatSpec(activation, level=level, dtype="float16")
    packed = family.pack_weight(shape, w, "float16", spec.chained)
    arrays = [half(x) if planar else half(np.clip(to_physical(x, rng), -6e4, 6e4)), packed]
    out = (shape.batch, shape.out_height, shape.out_width, padded(shape.filters))
    function = depthwise_f32.depthwise(shape, spec) if shape.depthwise else convolution_f32.convolution(shape, spec, planar)
    case = Case(function, [*arrays, convolution_f32.pack_bias(shape.filters, bias)], (out, "float16"))

    def conv(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
        return F.conv2d(x, w, bias, shape.stride, shape.padding, shape.dilation, shape.groups).numpy()

    double = [torch.from_numpy(a).double() for a in (x, w, bias)]
    exact = conv(*double)
    magnitude = conv(*(a.abs() for a in double))
    inputs = conv(double[0].abs(), torch.ones_like(double[1]), None)
    chain = w[0].size if shape.depthwise else CHAIN
    limits = bounds(w[0].size + 1, magnitude, inputs, most(w, chain)[:, None, None], chain)
    return Wanted(
        f"{shape}", case, lambda y: y[..., : shape.filters].transpose(0, 3, 1, 2), exact, **limits, activation=activation
    )


def matmul(rng, level: str, sizes: tuple[int, int, int, int, bool]) -> Wanted:
    rows, inner, columns, batch, transposed = sizes
    a, b = normal(rng, batch, rows, inner, dtype="float16"), normal(rng, batch, inner, columns, dtype="float16")
    right = np.ascontiguousarray(np.swapaxes(b, -1, -2)) if transposed else b
    function = matmul_f32.matmul(MatrixProduct(*sizes), FloatSpec(level=level, dtype="float16"))
    case = Case(function, [half(a), half(right)], ((batch, rows, columns), "float16"))
    single = (inner + 2) * EPS * (np.abs(a) @ np.abs(b))
    return Wanted(f"matmul {sizes}", case, lambda y: y, a.astype(np.float64) @ b.astype(np.float64), single, np.zeros(1))


def overflowing(level: str) -> Wanted:
    """Partial sums of 16 products pass float16's range, the result does not."""
    x, w = np.full((2, 32), 3e4, np.float16), np.full((20, 32), 4.0, np.float16)
    w[:, 16:] = -4.0
    spec = FloatSpec(level=level, dtype="float16")
    packed = [linear_f32.pack_weight(w.astype(np.float32), "float16", spec.chained), linear_f32.pack_bias(20, None)]
    case = Case(linear_f32.linear(MatrixProduct(2, 32, 20), spec), [x, *packed], ((2, 20), "float16"))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    return Wanted("overflowing", case, lambda y: y, exact, np.zeros(1), np.full(1, CHAIN * UNIT * 32 * 3e4 * 4))


GELU = Activation(function="gelu")

LINEAR = [
    ((1, 30, 10), NO_ACTIVATION, False, 1.0),
    ((1, 129, 160), RELU, True, 0.05),
    ((7, 16, 33), GELU, False, 0.2),
    ((5, 131, 48), NO_ACTIVATION, True, 1e-5),
    ((23, 48, 70), NO_ACTIVATION, False, 300.0),
    ((12, 1, 16), RELU, False, 1.0),
    ((5, 1000, 40), NO_ACTIVATION, False, 0.03),
]

CONVOLUTIONS = [
    (Convolution(1, 5, 9, 7, 20, (3, 3), (1, 1), (1, 1)), RELU, False),
    (Convolution(2, 33, 8, 11, 40, (3, 2), (2, 1), (2, 0), (1, 2)), NO_ACTIVATION, False),
    (Convolution(1, 70, 5, 5, 33, (1, 1)), GELU, False),
    (Convolution(1, 24, 6, 9, 96, (1, 1), (2, 2)), NO_ACTIVATION, False),
    (Convolution(1, 12, 7, 7, 30, (3, 3), (1, 1), (1, 1), groups=2), NO_ACTIVATION, False),
    (Convolution(1, 3, 12, 21, 24, (3, 3), (2, 2), (1, 1)), RELU, True),
    (Convolution(2, 5, 7, 9, 16, (5, 3), (1, 1), (2, 0)), NO_ACTIVATION, True),
    (Convolution(1, 3, 16, 15, 20, (7, 7), (2, 2), (3, 3)), RELU, True),
    (Convolution(1, 20, 9, 9, 20, (3, 3), (1, 1), (1, 1), groups=20), RELU, False),
    (Convolution(2, 32, 11, 12, 32, (5, 5), (2, 2), (2, 2), groups=32), NO_ACTIVATION, False),
    (Convolution(1, 35, 11, 9, 35, (3, 3), (1, 1), (2, 2), (2, 2), groups=35), GELU, False),
]  # fmt: skip

#: The case of the longest sum.
LONG_SUM = len(LINEAR) - 1

MATMUL = [(7, 32, 40, 2, True), (7, 21, 32, 2, False), (1, 9, 13, 3, False), (5, 31, 17, 3, True)]


def cases(level: str) -> Iterator[Wanted]:
    rng = np.random.default_rng(11)
    for row in LINEAR:
        yield linear(rng, level, *row)
    for row in CONVOLUTIONS:
        yield convolution(rng, level, *row)
    for sizes in MATMUL:
        yield matmul(rng, level, sizes)
    yield overflowing(level)


@pytest.mark.parametrize(("target", "level", "cpus"), LEVELS)
def test_errors_stay_within_the_bound(target, level, cpus, tmp_path):
    assert float16_level(Target("arm64", target)) == level
    wanted = list(cases(level))
    for cpu in cpus:
        outputs = emulate([row.case for row in wanted], target, tmp_path, cpu)
        excess = {row.name: row.excess(output, level == CHAINED) for row, output in zip(wanted, outputs, strict=True)}
        assert {name: ratio for name, ratio in excess.items() if not ratio <= 1} == {}
        long = outputs[LONG_SUM].astype(np.float64) - wanted[LONG_SUM].exact
        # As `half_neon` estimates it; sums in float16 throughout would be off by ten units.
        assert np.sqrt((long**2).mean() / (wanted[LONG_SUM].exact ** 2).mean()) < (1.6 if level == CHAINED else 0.6) * UNIT


def test_levels_of_other_cores():
    levels = {name: float16_level(Target("arm64", name)) for name in ("generic", "cortex-a72", "neoverse-n1", "cortex-x1")}
    assert levels == {"generic": "portable", "cortex-a72": "portable", "neoverse-n1": CHAINED, "cortex-x1": CHAINED}
    assert float16_level(Target("x86", "avx512-bf16")) == "avx512"


@pytest.mark.parametrize(("core", "level"), [("cortex-a76", CHAINED), ("neoverse-v1", LONG)])
def test_the_level_uses_its_instructions(core, level):
    function = linear_f32.linear(MatrixProduct(40, 64, 64), FloatSpec(level=level, dtype="float16"))
    code = assembly(function, {**AARCH64, "mcpu": core})
    chained = len(re.findall(r"\sfmla\s+v\d+\.8h", code))
    exact = len(re.findall(r"\sfmlal2?\s+v\d+\.4s", code))
    assert (chained > 100, exact > 100) == (level == CHAINED, level == LONG)
    assert len(re.findall(r"\sfcvtl2?\s", code)) <= (chained // 4 if level == CHAINED else 0)


def test_panels_are_scaled_exactly():
    rng, depth = np.random.default_rng(3), 60
    sizes = 10.0 ** rng.integers(-4, 3, (2, 1, LANES))
    w = half(rng.standard_normal((2, depth, LANES)) * sizes).astype(np.float32)
    packed = scaled_panels(w).astype(np.float64)
    scale, stored = packed[:, :1], packed[:, 1:]
    assert (np.frexp(scale)[0] == 0.5).all() and np.abs(stored * scale - w).max() <= 2.0**-25 * scale.max()
    sums = np.stack([np.abs(stored[:, first : first + CHAIN]).sum(1) for first in range(depth - CHAIN + 1)]).max(0)
    assert sums.max() < 1 and (sums[scale[:, 0] > 2.0**-14] > 0.49).all()
    assert (powers_above(np.array([[0.0, 1e-9, 1.0, 1.01, 1e6]])) == [[[1, 2.0**-14, 1, 2, 2.0**15]]]).all()


@pytest.mark.parametrize("level", (LONG, CHAINED))
def test_other_types_are_refused(level):
    with pytest.raises(OptionError, match=f"level {level} multiplies float16, not bfloat16"):
        FloatSpec(level=level, dtype="bfloat16")
