"""Resize, Upsample and GridSample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .registry import Call, op


@dataclass(frozen=True)
class Axis:
    """One resized axis: `scale` is output size over input size, `roi` its normalized (start, end) for crop-and-resize."""

    index: int
    size: int
    out: int
    scale: float
    roi: tuple[float, float] = (0.0, 1.0)


def coordinates(axis: Axis, mode: str) -> np.ndarray:
    """Input coordinate of each output position (ONNX Resize, `coordinate_transformation_mode`)."""
    x = np.arange(axis.out, dtype=np.float64)
    if mode == "asymmetric":
        return x / axis.scale
    if mode == "align_corners":
        # The standard takes the exact, not the rounded, output length here.
        return np.zeros(axis.out) if axis.out == 1 else x * (axis.size - 1) / (axis.scale * axis.size - 1)
    if mode == "pytorch_half_pixel":
        return (x + 0.5) / axis.scale - 0.5 if axis.out > 1 else np.zeros(1)
    if mode == "half_pixel_symmetric":
        exact = axis.scale * axis.size
        center = axis.size / 2 * (1 - axis.out / exact)
        return center + (x + 0.5) / axis.scale - 0.5
    if mode == "tf_crop_and_resize":
        start, end = axis.roi
        if axis.out == 1:
            return np.array([0.5 * (start + end) * (axis.size - 1)])
        return start * (axis.size - 1) + x * (end - start) * (axis.size - 1) / (axis.out - 1)
    return (x + 0.5) / axis.scale - 0.5


def nearest_indices(axis: Axis, mode: str, rounding: str) -> np.ndarray:
    x = coordinates(axis, mode)
    rounded = {
        "round_prefer_floor": lambda: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda: np.floor(x + 0.5),
        "floor": lambda: np.floor(x),
        "ceil": lambda: np.ceil(x),
    }[rounding]()
    return np.clip(rounded, 0, axis.size - 1).astype(np.int64)


def _kernel(kind: str, a: float, t: np.ndarray) -> np.ndarray:
    t = np.abs(t)
    if kind == "linear":
        return np.maximum(0.0, 1 - t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def weights(axis: Axis, call: Call) -> np.ndarray:
    """The matrix (out, size) that interpolates along one axis."""
    kind, a = call.attr("mode"), call.attr("cubic_coeff_a", -0.75)
    mode = call.attr("coordinate_transformation_mode", "half_pixel")
    x = coordinates(axis, mode)
    shrink = min(axis.scale, 1.0) if call.attr("antialias", 0) else 1.0
    support = (1 if kind == "linear" else 2) / shrink
    matrix = np.zeros((axis.out, axis.size))
    for row, center in enumerate(x):
        taps = np.arange(math.floor(center - support) + 1, math.ceil(center + support) + 1)
        values = _kernel(kind, a, (taps - center) * shrink)
        if call.attr("exclude_outside", 0):
            values = np.where((taps < 0) | (taps >= axis.size), 0.0, values)
        if call.attr("exclude_outside", 0) or call.attr("antialias", 0):
            values = values / values.sum()
        np.add.at(matrix[row], np.clip(taps, 0, axis.size - 1), values)
    return matrix


def _axes(
    call: Call, x: torch.Tensor, scales: list[float] | None, sizes: list[int] | None, roi: list[float] | None
) -> list[Axis]:
    chosen = [a % x.dim() for a in call.attr("axes") or range(x.dim())]
    if sizes:
        factors = [s / x.shape[a] for s, a in zip(sizes, chosen, strict=True)]
        policy = call.attr("keep_aspect_ratio_policy", "stretch")
        outs = list(sizes)
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            factors = [factor] * len(chosen)
            outs = [math.floor(factor * x.shape[a] + 0.5) for a in chosen]
    else:
        factors = list(scales or [])
        outs = [math.floor(x.shape[a] * f) for a, f in zip(chosen, factors, strict=True)]
    regions = [(0.0, 1.0)] * len(chosen)
    if roi and call.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        regions = list(zip(roi[: len(chosen)], roi[len(chosen) :], strict=True))
    rows = [Axis(a, x.shape[a], o, f, r) for a, o, f, r in zip(chosen, outs, factors, regions, strict=True)]
    return [row for row in rows if row.out != row.size or row.scale != 1 or row.roi != (0.0, 1.0)]


def _native(call: Call, x: torch.Tensor, axes: list[Axis]) -> torch.Tensor | None:
    """The resize as one torch op, where torch has exactly this one: what image models use."""
    rank = x.dim() - 2
    if rank not in (1, 2, 3) or any(a.index < 2 for a in axes) or not x.is_floating_point() or call.attr("antialias", 0):
        return None
    scales, outs = [1.0] * rank, list(x.shape[2:])
    for axis in axes:
        scales[axis.index - 2], outs[axis.index - 2] = axis.scale, axis.out
    mode, place = (
        call.attr("mode"),
        call.attr("coordinate_transformation_mode", "asymmetric" if call.version < 10 else "half_pixel"),
    )
    exact = all(o == n * s for o, n, s in zip(outs, x.shape[2:], scales, strict=True))
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]
    if mode == "nearest" and place == "asymmetric" and call.attr("nearest_mode", "floor") == "floor" and exact:
        return F.interpolate(x, outs, mode="nearest")
    if mode == "linear" and place == "align_corners" and exact:
        return F.interpolate(x, outs, mode=linear, align_corners=True)
    if mode == "linear" and exact and (place == "half_pixel" or (place == "pytorch_half_pixel" and min(outs) > 1)):
        return F.interpolate(x, outs, mode=linear, align_corners=False)
    return None


def _resize(call: Call, x: torch.Tensor, axes: list[Axis]) -> torch.Tensor:
    if not axes:
        return x
    native = _native(call, x, axes)
    if native is not None:
        return native
    place = call.attr("coordinate_transformation_mode", "asymmetric" if call.version < 10 else "half_pixel")
    if call.attr("mode") == "nearest":
        for axis in axes:
            rounding = call.attr("nearest_mode", "floor")
            picked = call.buffer(f"indices{axis.index}", lambda a=axis, r=rounding: nearest_indices(a, place, r))
            x = torch.index_select(x, axis.index, picked)
        return x
    dtype = x.dtype
    x = x if x.is_floating_point() else x.to(torch.float32)
    inside = None
    for axis in axes:
        matrix = call.buffer(f"weights{axis.index}", lambda a=axis: weights(a, call).astype(np.float32)).to(x.dtype)
        x = torch.matmul(x.movedim(axis.index, -1), matrix.t()).movedim(-1, axis.index)
        if place == "tf_crop_and_resize":
            where = call.buffer(f"inside{axis.index}", lambda a=axis: _inside(a, place))
            where = where.reshape([-1 if i == axis.index else 1 for i in range(x.dim())])
            inside = where if inside is None else inside & where
    if inside is not None:
        x = torch.where(inside, x, call.attr("extrapolation_value", 0.0))
    return x.to(dtype)


def _inside(axis: Axis, place: str) -> np.ndarray:
    x = coordinates(axis, place)
    return (x >= 0) & (x <= axis.size - 1)


@op("Upsample", since=7)
def upsample_attribute(call: Call, x: torch.Tensor) -> torch.Tensor:
    return _resize(call, x, _axes(call, x, call.attr("scales"), None, None))


@op("Upsample", since=9, static=(1,))
@op("Resize", since=10, static=(1,))
def upsample(call: Call, x: torch.Tensor, scales: Any = None) -> torch.Tensor:
    # Before opset 11 the coordinates were asymmetric and nearest rounded down.
    call.attributes.update(coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # type: ignore[attr-defined]
    return _resize(call, x, _axes(call, x, _floats(call, 1), None, None))


@op("Resize", since=11, static=(1, 2, 3))
def resize(call: Call, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return _resize(call, x, _axes(call, x, _floats(call, 2), call.ints(3), _floats(call, 1)))


def _floats(call: Call, index: int) -> list[float] | None:
    value = call.value(index)
    return None if value is None or not value.size else [float(v) for v in value.reshape(-1)]


@op("GridSample")
def grid_sample(call: Call, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    given = str(call.attr("mode"))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(given, given)
    return F.grid_sample(x, grid, mode, call.attr("padding_mode"), bool(call.attr("align_corners")))


@op("AffineGrid", static=(1,))
def affine_grid(call: Call, theta: torch.Tensor, size: Any = None) -> torch.Tensor:
    return F.affine_grid(theta, call.ints(1) or [], bool(call.attr("align_corners")))
