"""Element-wise operators: arithmetic, comparison, logic, activations and casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import onnx
import torch
import torch.nn.functional as F

from .registry import Call, op, torch_type

#: torch computes little on these, so they are computed as s64 and cast back, which wraps as the standard asks.
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,  # half to even in both
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": lambda x: F.softplus(x, threshold=88.0) if x.dtype != torch.float16 else F.softplus(x),
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}


def _widened(function: Callable[..., torch.Tensor], result_keeps_type: bool = True) -> Callable[..., torch.Tensor]:
    """`function` with unsigned 16, 32 and 64-bit tensors computed as s64."""

    def call(*inputs: Any) -> torch.Tensor:
        first = next((x for x in inputs if isinstance(x, torch.Tensor) and x.dtype in WIDE_UNSIGNED), None)
        if first is None:
            return function(*inputs)
        wide = [x.to(torch.int64) if isinstance(x, torch.Tensor) and x.dtype in WIDE_UNSIGNED else x for x in inputs]
        result = function(*wide)
        return result.to(first.dtype) if result_keeps_type else result

    return call


def _register_unary(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    run = _widened(function)

    @op(name)
    def unary(call: Call, x: torch.Tensor) -> torch.Tensor:
        return run(x)


for _name, _function in UNARY.items():
    _register_unary(_name, _function)


def operand(call: Call, index: int, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor | float | int:
    """Input `index` as a Python number where that means the same, as torch models write it: `x * 2.0`."""
    value = call.scalar(index)
    if value is None or x.dim() > other.dim() or x.dtype in (torch.bool, *WIDE_UNSIGNED):
        return x
    return value if isinstance(value, int) or math.isfinite(value) else x


def _divide(a: torch.Tensor, b: Any) -> torch.Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _right_shift(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Shifting by the width or more leaves the sign; C, and so torch, leaves that undefined.
    return torch.bitwise_right_shift(a, torch.clamp(b, max=8 * a.element_size() - 1))


def _and(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.logical_and(a, b)


ARITHMETIC: dict[str, Callable[..., torch.Tensor]] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _divide}
COMPARE: dict[str, Callable[..., torch.Tensor]] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}
BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "And": _and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}


def _register_binary(name: str, function: Callable[..., torch.Tensor], keeps_type: bool, numbers: bool) -> None:
    run = _widened(function, keeps_type)

    @op(name)
    def binary(call: Call, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if numbers and a.dtype not in WIDE_UNSIGNED:
            if a.is_floating_point() and name in ("Add", "Mul"):
                first = operand(call, 0, a, b)
                if not isinstance(first, torch.Tensor):
                    return run(b, first)
            return run(a, operand(call, 1, b, a))
        return run(a, b)


for _name, _function in ARITHMETIC.items():
    _register_binary(_name, _function, True, True)
for _name, _function in COMPARE.items():
    _register_binary(_name, _function, False, True)
for _name, _function in BINARY.items():
    _register_binary(_name, _function, True, False)


@op("BitShift")
def bit_shift(call: Call, x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    shift = torch.bitwise_left_shift if call.attr("direction") == "LEFT" else _right_shift
    if x.dtype == torch.uint64 or (x.dtype == torch.uint8 and call.attr("direction") == "LEFT"):
        return shift(x.to(torch.int64), amount.to(torch.int64)).to(x.dtype)
    return _widened(shift)(x, amount)


@op("Pow")
def power(call: Call, x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    value = call.scalar(1)
    if value is not None and exponent.dim() <= x.dim() and (x.is_floating_point() or (isinstance(value, int) and value >= 0)):
        return torch.pow(x, int(value) if float(value).is_integer() else value)
    if x.dtype in WIDE_UNSIGNED or exponent.dtype in WIDE_UNSIGNED or x.dtype != exponent.dtype:
        wide = torch.float64 if x.is_floating_point() or exponent.is_floating_point() else torch.int64
        return torch.pow(x.to(wide), exponent.to(wide)).to(x.dtype)
    return torch.pow(x, exponent)


@op("Mod")
def modulo(call: Call, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _widened(torch.fmod if call.attr("fmod") else torch.remainder)(a, b)


@op("Max")
def maximum(call: Call, *inputs: torch.Tensor) -> torch.Tensor:
    return reduce(_widened(torch.maximum), inputs)


@op("Min")
def minimum(call: Call, *inputs: torch.Tensor) -> torch.Tensor:
    return reduce(_widened(torch.minimum), inputs)


@op("Sum")
def total(call: Call, *inputs: torch.Tensor) -> torch.Tensor:
    return reduce(torch.add, inputs)


@op("Mean")
def mean(call: Call, *inputs: torch.Tensor) -> torch.Tensor:
    return reduce(torch.add, inputs) / len(inputs)


@op("Where")
def where(call: Call, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, a, b)


@op("IsInf")
def is_inf(call: Call, x: torch.Tensor) -> torch.Tensor:
    positive, negative = call.attr("detect_positive", 1), call.attr("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    if positive:
        return torch.eq(x, float("inf"))
    return torch.eq(x, float("-inf")) if negative else torch.zeros_like(x, dtype=torch.bool)


@op("Clip", since=1)
def clip_attributes(call: Call, x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x, call.attr("min"), call.attr("max"))


@op("Clip", since=11)
def clip(call: Call, x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None) -> torch.Tensor:
    bounds = [call.scalar(1), call.scalar(2)]
    if all(bound is not None or given is None for bound, given in zip(bounds, (low, high), strict=True)) and any(
        b is not None for b in bounds
    ):
        # Infinite bounds are how exporters write an absent one.
        low_value, high_value = (b if b is not None and math.isfinite(b) else None for b in bounds)
        if x.is_floating_point() and (low_value is not None or high_value is not None):
            low_value, high_value = (None if b is None else float(b) for b in (low_value, high_value))
            return torch.clamp(x, low_value, high_value)
    run_max, run_min = _widened(torch.maximum), _widened(torch.minimum)
    x = x if low is None else run_max(x, low)
    return x if high is None else run_min(x, high)


# -- activations -------------------------------------------------------------------------------------------------------------


@op("LeakyRelu")
def leaky_relu(call: Call, x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, call.attr("alpha"))


@op("PRelu")
def prelu(call: Call, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    channels = x.shape[1] if x.dim() > 1 else 1
    if slope.dim() == x.dim() - 1 and slope.numel() == slope.shape[0] == channels and x.is_floating_point():
        return F.prelu(x, slope.reshape(channels))
    return torch.where(x < 0, x * slope, x) if x.dtype not in WIDE_UNSIGNED else x


@op("Elu")
def elu(call: Call, x: torch.Tensor) -> torch.Tensor:
    return F.elu(x, call.attr("alpha"))


@op("Celu")
def celu(call: Call, x: torch.Tensor) -> torch.Tensor:
    return F.celu(x, call.attr("alpha"))


@op("Selu")
def selu(call: Call, x: torch.Tensor) -> torch.Tensor:
    alpha, gamma = call.attr("alpha"), call.attr("gamma")
    if abs(alpha - 1.6732632423543772) < 1e-6 and abs(gamma - 1.0507009873554805) < 1e-6:
        return F.selu(x)
    return F.elu(x, alpha) * gamma


@op("HardSigmoid")
def hard_sigmoid(call: Call, x: torch.Tensor) -> torch.Tensor:
    alpha, beta = call.attr("alpha"), call.attr("beta")
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


@op("ThresholdedRelu")
def thresholded_relu(call: Call, x: torch.Tensor) -> torch.Tensor:
    return F.threshold(x, call.attr("alpha"), 0.0)


@op("Gelu")
def gelu(call: Call, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate=call.attr("approximate"))


@op("Swish")
def swish(call: Call, x: torch.Tensor) -> torch.Tensor:
    alpha = call.attr("alpha")
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)


@op("Shrink")
def shrink(call: Call, x: torch.Tensor) -> torch.Tensor:
    limit, bias = call.attr("lambd"), call.attr("bias")
    zero = torch.zeros_like(x)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, zero)).to(x.dtype)


def softmax_rows(function: Callable[..., torch.Tensor], call: Call, x: torch.Tensor) -> torch.Tensor:
    axis = call.attr("axis")
    if call.version >= 13 or axis in (-1, x.dim() - 1):
        return function(x, axis)
    # Before opset 13 everything from `axis` on was one row.
    axis %= x.dim()
    return function(x.flatten(axis), -1).reshape(x.shape)


@op("Softmax")
def softmax(call: Call, x: torch.Tensor) -> torch.Tensor:
    return softmax_rows(torch.softmax, call, x)


@op("LogSoftmax")
def log_softmax(call: Call, x: torch.Tensor) -> torch.Tensor:
    return softmax_rows(torch.log_softmax, call, x)


@op("Hardmax")
def hardmax(call: Call, x: torch.Tensor) -> torch.Tensor:
    def one_hot(rows: torch.Tensor, axis: int) -> torch.Tensor:
        positions = torch.arange(rows.shape[axis], device=rows.device)
        shape = [1] * rows.dim()
        shape[axis] = rows.shape[axis]
        return (rows.argmax(axis, keepdim=True) == positions.reshape(shape)).to(rows.dtype)

    return softmax_rows(one_hot, call, x)


@op("Dropout", static=(1, 2))
def dropout(call: Call, x: torch.Tensor, ratio: Any = None, training: Any = None) -> Any:
    ratio, training = call.value(1), call.value(2)
    if training is not None and bool(training) and (ratio is None or float(ratio) != 0):
        raise call.fail("it is in training mode; export the model for inference")
    if len(call.wanted) > 1 and call.wanted[1]:
        return x, torch.ones_like(x, dtype=torch.bool if call.version >= 10 else x.dtype)
    return x


# -- casts -------------------------------------------------------------------------------------------------------------------


def _to_float8(x: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    if saturate:
        largest = torch.finfo(dtype).max
        return torch.clamp(x, -largest, largest).to(dtype)
    if dtype == torch.float8_e4m3fn:  # torch saturates here; from the middle to the next step on, the standard wants NaN
        x = x.masked_fill(torch.abs(x) > 464.0, math.nan)
    return x.to(dtype)


def cast_to(x: torch.Tensor, element_type: int, saturate: bool, who: str) -> torch.Tensor:
    """The standard's cast. Float8: out-of-range values saturate (or become NaN or infinity); 4 bits: wrap."""
    dtype = torch_type(element_type, who)
    if element_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        nibble = torch.bitwise_and(x.to(torch.int32), 15)
        return (torch.bitwise_xor(nibble, 8) - 8 if element_type == onnx.TensorProto.INT4 else nibble).to(dtype)
    if dtype.itemsize == 1 and dtype.is_floating_point:
        return _to_float8(x.to(torch.float32), dtype, saturate)
    if x.is_floating_point() and dtype in WIDE_UNSIGNED:
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


@op("Cast")
def cast(call: Call, x: torch.Tensor) -> torch.Tensor:
    return cast_to(x, call.attr("to"), bool(call.attr("saturate", 1)), f"the result of Cast node '{call.name}'")


@op("CastLike")
def cast_like(call: Call, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if call.narrow(1):
        return cast_to(x, call.narrow(1), False, call.name)
    if like.dtype.itemsize == 1 and like.is_floating_point():
        return _to_float8(x.to(torch.float32), like.dtype, bool(call.attr("saturate", 1)))
    return x.to(torch.int64).to(like.dtype) if x.is_floating_point() and like.dtype in WIDE_UNSIGNED else x.to(like.dtype)
