"""Functions of float32 vectors as polynomials: exp, sigmoid, tanh and the activations built on them.

Unlike `exact_float`, these promise closeness and not bits: multiply and add may be fused. Bounds below are against float64 and
hold on every level; x may be any float32, subnormal and infinite ones included, but not NaN. 1 ulp is 2^-23 of a normal result;
subnormal results may be off by one subnormal step more.

    exp           1 ulp; 0 and infinity where float32 has no other answer
    exp_negative  1 ulp for -64 <= x <= 0; exp(-64) below that
    sigmoid       2 ulp, or 2^-126 absolute
    silu          2 ulp, or 2^-121 absolute
    tanh          3 ulp, or 2^-142 absolute
    gelu          2e-7 * max(1, |x|) absolute
    gelu_tanh     128 ulp (the argument of its exponential reaches 80), or 2^-124 absolute
    hardsigmoid   2 ulp
    hardswish     3 ulp
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....ir.dialect.exact import EXP_LOWEST, LN2_HIGH, LN2_LOW, LOG2_E
from .base import LANES, VECTOR
from .emit import bind, fence, splat
from .isa import T

#: 1.5 * 2^23: adding it rounds a float below 2^22 to an integer, which then stands in the low bits of the sum.
ROUNDER = 12582912.0

#: As `exact.EXP_POLYNOMIAL` with one power more (3e-9), which the bound of 1 ulp takes.
EXP_POLYNOMIAL = (0.001381449634, 0.008368751965, 0.04166839272, 0.1666651964, 0.4999999404)

#: Beyond these, exp is 0 and infinity in float32.
EXP_RANGE = (-104.0, 89.0)

#: 1 - Phi(t) of the normal distribution for 0 <= t <= GELU_END as a polynomial of s = t * 2 / GELU_END - 1, highest power first:
#: the least maximum of |error| * max(t, 0.2), found by reweighted least squares on Chebyshev nodes.
GELU_END = 5.6
GELU_POLYNOMIAL = (
    0.00288295024, -0.00919991452, -0.00475277146, 0.045691818, -0.0321017168, -0.0783391669, 0.137916952, -0.00860636402,
    -0.189506501, 0.218792677, -0.0286021288, -0.198107049, 0.274728686, -0.198068544, 0.0868795291, -0.022163583,
    0.00255513517,
)  # fmt: skip

#: tanh(x) = x P(x^2) / Q(x^2) for |x| <= TANH_END, beyond which it is 1 in float32 (coefficients of Eigen's ptanh_float).
TANH_END = 7.90531110763549805
TANH_NUMERATOR = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
    6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
TANH_DENOMINATOR = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def constant(value: float) -> Any:
    return splat(T.float32(value))


def polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    """Horner's rule; highest power first."""
    total = constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + constant(coefficient)
    return total


def _reduced(x: Any) -> tuple[Any, Any]:
    """(exp(r), bits) for x = n ln 2 + r, |r| <= ln 2 / 2; the low bits of `bits` hold n. |x| < 2^21."""
    shifted = bind(fence(x * constant(LOG2_E) + constant(ROUNDER)))  # TVM would take the addition and the subtraction away
    n = bind(shifted - constant(ROUNDER))
    r = bind(x - n * constant(LN2_HIGH) - n * constant(LN2_LOW))
    power = polynomial(EXP_POLYNOMIAL, r) * (r * r) + r + constant(1.0)
    return bind(power), bind(T.reinterpret(f"int32x{LANES}", shifted))


def exp_negative(x: Any) -> Any:
    """exp for x <= 0, not below exp(-64): what softmax needs."""
    power, bits = _reduced(bind(T.max(x, constant(EXP_LOWEST))))
    return T.reinterpret(VECTOR, T.reinterpret(f"int32x{LANES}", power) + T.shift_left(bits, splat(T.int32(23))))


def exp(x: Any) -> Any:
    low, high = EXP_RANGE
    power, bits = _reduced(bind(T.max(T.min(x, constant(high)), constant(low))))
    # 2^n in two halves, each a normal number: the product then overflows and underflows as it should.
    n = bind(bits - splat(T.int32(0x4B400000)))
    half = bind(T.shift_right(n, splat(T.int32(1))))

    def two_to(exponent: Any) -> Any:
        return T.reinterpret(VECTOR, T.shift_left(exponent + splat(T.int32(127)), splat(T.int32(23))))

    return power * two_to(half) * two_to(n - half)


def sigmoid(x: Any) -> Any:
    return constant(1.0) / (constant(1.0) + exp(constant(0.0) - x))


def silu(x: Any) -> Any:
    # Below -104 the quotient is 0; clamping there keeps infinity / infinity out.
    low = bind(T.max(x, constant(EXP_RANGE[0])))
    return low / (constant(1.0) + exp(constant(0.0) - low))


def tanh(x: Any) -> Any:
    x = bind(T.max(T.min(x, constant(TANH_END)), constant(-TANH_END)))
    square = bind(x * x)
    return x * polynomial(TANH_NUMERATOR, square) / polynomial(TANH_DENOMINATOR, square)


def gelu(x: Any) -> Any:
    """x Phi(x) = max(x, 0) - t (1 - Phi(t)) with t = |x|."""
    t = bind(T.min(T.max(x, constant(0.0) - x), constant(GELU_END)))
    s = bind(t * constant(2.0 / GELU_END) - constant(1.0))
    return T.max(x, constant(0.0)) - t * polynomial(GELU_POLYNOMIAL, s)


def gelu_tanh(x: Any) -> Any:
    """x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    low = bind(T.max(x, constant(-12.0)))  # the result is 0 from -12 on, and the cube of a larger number could overflow
    capped = bind(T.min(low, constant(12.0)))
    u = capped * (capped * capped * constant(-2 * 0.7978845608028654 * 0.044715) + constant(-2 * 0.7978845608028654))
    return low / (constant(1.0) + exp(bind(u)))


def hardsigmoid(x: Any) -> Any:
    return T.max(T.min(x + constant(3.0), constant(6.0)), constant(0.0)) * constant(1.0 / 6.0)


def hardswish(x: Any) -> Any:
    # The factor is exactly 0 below -3; clamping x there keeps infinity * 0 out.
    return T.max(x, constant(-3.0)) * hardsigmoid(x)


#: Functions that a kernel can apply before it stores, by name.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    function.__name__: function for function in (exp, sigmoid, silu, tanh, gelu, gelu_tanh, hardsigmoid, hardswish)
}
