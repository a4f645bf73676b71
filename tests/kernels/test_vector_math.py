"""The vector functions against float64, over every exponent of float32 and densely where they bend; and where they lead to."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.backends.tvm.kernels.activation_f32 import activation
from graphwright.backends.tvm.kernels.float_base import Activation
from graphwright.backends.tvm.kernels.vector_math import FUNCTIONS
from graphwright.ir.errors import OptionError, UnknownNameError

from .float_cases import EPS, LEVELS, WIDE, run

#: (ulp of the result, or this much absolute): what vector_math promises; gelu is apart.
BOUNDS = {
    "exp": (1, 2.0**-149),
    "sigmoid": (2, 2.0**-126),
    "silu": (2, 2.0**-121),
    "tanh": (3, 2.0**-142),
    "gelu_tanh": (128, 2.0**-124),
    "hardsigmoid": (2, 0.0),
    "hardswish": (3, 2.0**-149),
}


def every_float() -> np.ndarray:
    """One in 8,191 of all bit patterns, 200,000 values where the functions bend, and the ends of the range; no NaN."""
    patterns = np.arange(0, 2**32, 8191, dtype=np.uint64).astype(np.uint32).view(np.float32)
    patterns = patterns[~np.isnan(patterns)]
    bends = [np.linspace(-end, end, 100_001) for end in (12, 110)]
    ends = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 88.7228, 88.7229, -87.33, -103.97, -103.98, -104.1]
    return np.concatenate([patterns, *bends, ends]).astype(np.float32)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_bounds_hold_over_all_floats(name, level):
    x = every_float()
    y = run(activation(x.size, Activation(function=name)), level, [x], x.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = WIDE[name](x.astype(np.float64))
        finite = np.isfinite(exact.astype(np.float32))
        assert not np.isnan(y).any()
        np.testing.assert_array_equal(y[~finite], exact[~finite].astype(np.float32))
    error = np.abs(y[finite].astype(np.float64) - exact[finite])
    if name == "gelu":
        limit = 2e-7 * np.maximum(1, np.abs(x[finite]))
    else:
        relative, absolute = BOUNDS[name]
        limit = np.maximum(relative * EPS * np.abs(exact[finite]), absolute)
    worst = np.argmax(error - limit)
    assert error[worst] <= limit[worst], f"{name}({x[finite][worst]!r}) is off by {error[worst]:.3g}, allowed {limit[worst]:.3g}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [1, 15, 16, 63, 64, 65, 200])
def test_odd_sizes_and_a_clamp_after_the_function(size, level):
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    y = run(activation(size, Activation(-0.1, 0.5, "tanh")), level, [x], x.shape)
    np.testing.assert_allclose(y, np.clip(np.tanh(x.astype(np.float64)), -0.1, 0.5), rtol=4e-7)


def test_bad_arguments():
    with pytest.raises(UnknownNameError, match="gelu"):
        Activation(function="gellu")
    with pytest.raises(OptionError, match="at least 1"):
        activation(0, Activation(function="gelu"))
