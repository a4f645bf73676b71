"""Operators that move, select or make values: shapes, slices, gathers, scatters, pads and constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F

from .registry import Call, op, torch_type
from .weights import read_inline

PAD_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@op("Constant")
def constant(call: Call) -> torch.Tensor:
    given = {key: value for key, value in call.attributes.items() if value is not None}
    for key, dtype in (
        ("value_float", torch.float32),
        ("value_floats", torch.float32),
        ("value_int", torch.int64),
        ("value_ints", torch.int64),
    ):
        if key in given:
            return torch.tensor(given[key], dtype=dtype)
    if isinstance(given.get("value"), onnx.TensorProto):
        return read_inline(given["value"])
    raise call.fail(f"it holds {', '.join(given) or 'nothing'}; only tensors and numbers are supported")


@op("ConstantOfShape", static=(0,))
def constant_of_shape(call: Call, shape: Any) -> torch.Tensor:
    given = call.attr("value")
    if given is None:
        return torch.zeros(call.ints(0) or [])
    value = onnx.numpy_helper.to_array(given).reshape(-1)[0].item()
    return torch.full(call.ints(0) or [], value, dtype=torch_type(given.data_type, call.name))


@op("Shape", shape_only=True)
def shape(call: Call, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(x.shape)[slice(call.attr("start", 0), call.attr("end"))], dtype=torch.int64)


@op("Size", shape_only=True)
def size(call: Call, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(math.prod(x.shape), dtype=torch.int64)


@op("Range", static=(0, 1, 2))
def arange(call: Call, *_: Any) -> torch.Tensor:
    start, limit, delta = (call.value(i) for i in range(3))
    if start is None or limit is None or delta is None:
        raise call.fail("it needs start, limit and delta")
    values = np.arange(start.item(), limit.item(), delta.item()).astype(start.dtype)
    # numpy has no bfloat16; the known values are float32 then.
    return call.buffer("range", lambda: values).to(call.dtypes[0])


@op("EyeLike")
def eye_like(call: Call, x: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape
    dtype = torch_type(call.attr("dtype"), call.name) if call.attr("dtype") else x.dtype
    positions = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    return (positions == call.attr("k", 0)).to(dtype)


@op("Reshape", since=5, static=(1,))
def reshape(call: Call, x: torch.Tensor, target: Any = None) -> torch.Tensor:
    dims = call.ints(1) or []
    if not call.attr("allowzero", 0):
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


@op("Transpose")
def transpose(call: Call, x: torch.Tensor) -> torch.Tensor:
    return x.permute(call.attr("perm") or list(range(x.dim()))[::-1])


@op("Flatten")
def flatten(call: Call, x: torch.Tensor) -> torch.Tensor:
    axis = call.attr("axis")
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() >= 2:
        return torch.flatten(x, 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(x: torch.Tensor, axes: list[int] | None) -> torch.Tensor:
    axes = [i for i, d in enumerate(x.shape) if d == 1] if axes is None else sorted({a % x.dim() for a in axes})
    return x.reshape([d for i, d in enumerate(x.shape) if i not in axes]) if len(axes) != 1 else x.squeeze(axes[0])


def _unsqueeze(x: torch.Tensor, axes: list[int]) -> torch.Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Squeeze", since=1)
def squeeze_attribute(call: Call, x: torch.Tensor) -> torch.Tensor:
    return _squeeze(x, call.attr("axes"))


@op("Squeeze", since=13, static=(1,))
def squeeze(call: Call, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
    return _squeeze(x, call.ints(1))


@op("Unsqueeze", since=1)
def unsqueeze_attribute(call: Call, x: torch.Tensor) -> torch.Tensor:
    return _unsqueeze(x, call.attr("axes"))


@op("Unsqueeze", since=13, static=(1,))
def unsqueeze(call: Call, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
    return _unsqueeze(x, call.ints(1) or [])


@op("Expand", static=(1,))
def expand(call: Call, x: torch.Tensor, target: Any = None) -> torch.Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(call.ints(1) or [])))


@op("Tile", since=6, static=(1,))
def tile(call: Call, x: torch.Tensor, repeats: Any = None) -> torch.Tensor:
    return x.repeat(call.ints(1) or [])


@op("Concat")
def concat(call: Call, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(inputs, call.attr("axis", 1))


def _split(call: Call, x: torch.Tensor, sizes: list[int] | None) -> tuple[torch.Tensor, ...]:
    axis = call.attr("axis", 0)
    if not sizes:
        parts = call.attr("num_outputs") or len(call.wanted)
        chunk = -(-x.shape[axis] // parts)
        return torch.split(x, [chunk] * (parts - 1) + [x.shape[axis] - chunk * (parts - 1)], axis)
    return torch.split(x, sizes, axis)


@op("Split", since=1)
def split_attribute(call: Call, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _split(call, x, call.attr("split"))


@op("Split", since=13, static=(1,))
def split(call: Call, x: torch.Tensor, sizes: Any = None) -> tuple[torch.Tensor, ...]:
    return _split(call, x, call.ints(1))


def _slice(x: torch.Tensor, starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None) -> torch.Tensor:
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.dim()
        length = x.shape[axis]
        start, end, step = slice(start, end, step).indices(length)
        if step < 0:
            # torch slices run forwards: reverse the axis, then the range [start, end) is [length-1-start, length-1-end).
            x, start, end, step = torch.flip(x, [axis]), length - 1 - start, length - 1 - end, -step
        if (start, step) != (0, 1) or end < length:
            x = x[(slice(None),) * axis + (slice(start, max(end, start), step),)]
    return x


@op("Slice", since=1)
def slice_attributes(call: Call, x: torch.Tensor) -> torch.Tensor:
    return _slice(x, call.attr("starts"), call.attr("ends"), call.attr("axes"), None)


@op("Slice", since=10, static=(1, 2, 3, 4))
def slice_inputs(call: Call, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return _slice(x, call.ints(1) or [], call.ints(2) or [], call.ints(3), call.ints(4))


def _wrapped(indices: torch.Tensor, length: int) -> torch.Tensor:
    """Indices counted from the end made positive."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + length, indices)


@op("Gather")
def gather(call: Call, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = call.attr("axis") % x.dim()
    length = x.shape[axis]
    known = call.value(1)
    if known is not None and known.ndim == 0:
        return torch.select(x, axis, int(known))
    if known is not None:
        positive = call.buffer("indices", lambda: np.where(known < 0, known + length, known).astype(np.int64))
    else:
        positive = _wrapped(indices, length)
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(positive, x)
    rows = torch.index_select(x, axis, positive.reshape(-1))
    return rows if positive.dim() == 1 else rows.reshape(*x.shape[:axis], *positive.shape, *x.shape[axis + 1 :])


@op("GatherElements")
def gather_elements(call: Call, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = call.attr("axis") % x.dim()
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


@op("GatherND")
def gather_nd(call: Call, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    batch = call.attr("batch_dims", 0)
    depth = indices.shape[-1]
    if batch == 0:
        return x[tuple(indices.to(torch.int64)[..., i] for i in range(depth))]
    lead = math.prod(x.shape[:batch])
    data, where = x.reshape(lead, *x.shape[batch:]), indices.to(torch.int64).reshape(lead, -1, depth)
    rows = torch.arange(lead)[:, None].expand(lead, where.shape[1])
    picked = data[(rows, *(where[..., i] for i in range(depth)))]
    return picked.reshape(*indices.shape[:-1], *x.shape[batch + depth :])


@op("ScatterND")
def scatter_nd(call: Call, x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    reduction = call.attr("reduction", "none")
    depth = indices.shape[-1]
    where = tuple(_wrapped(indices[..., i], x.shape[i]) for i in range(depth))
    if reduction in ("none", "add"):
        return torch.index_put(x, where, updates, accumulate=reduction == "add")
    strides = [math.prod(x.shape[i + 1 : depth]) for i in range(depth)]
    flat = sum(w * s for w, s in zip(where, strides, strict=True))
    rows = x.reshape(math.prod(x.shape[:depth]), -1)
    positions = flat.reshape(-1, 1).expand(-1, rows.shape[1])  # type: ignore[union-attr]
    how = {"mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return torch.scatter_reduce(rows, 0, positions, updates.reshape(positions.shape), how).reshape(x.shape)


@op("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    axis = call.attr("axis", 0) % x.dim()
    where = _wrapped(indices, x.shape[axis])
    reduction = call.attr("reduction", "none")
    if reduction == "none":
        return torch.scatter(x, axis, where, updates)
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return torch.scatter_reduce(x, axis, where, updates, how)


@op("OneHot", since=9, static=(1,))
def one_hot(call: Call, indices: torch.Tensor, depth: Any, values: torch.Tensor) -> torch.Tensor:
    count = (call.ints(1) or [0])[0]
    axis = call.attr("axis") % (indices.dim() + 1)
    dims = [1] * (indices.dim() + 1)
    dims[axis] = count
    hot = _wrapped(indices, count).unsqueeze(axis) == torch.arange(count).reshape(dims)
    return torch.where(hot, values[1], values[0])


@op("Trilu", static=(1,))
def trilu(call: Call, x: torch.Tensor, k: Any = None) -> torch.Tensor:
    diagonal = (call.ints(1) or [0])[0]
    return torch.triu(x, diagonal) if call.attr("upper") else torch.tril(x, diagonal)


def pad_axis(x: torch.Tensor, axis: int, before: int, after: int, mode: str) -> torch.Tensor:
    """Pads one axis by reflecting, repeating the edge, or wrapping around."""
    moved = x.movedim(axis, -1)
    flat = moved.reshape(1, -1, moved.shape[-1])
    return F.pad(flat, (before, after), mode=PAD_MODES[mode]).reshape(*moved.shape[:-1], -1).movedim(-1, axis)


def _pad(call: Call, x: torch.Tensor, pads: list[int], value: float, axes: list[int] | None) -> torch.Tensor:
    axes = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    after = dict(zip(axes, pads[len(axes) :], strict=True))
    mode = call.attr("mode", "constant")
    touched = [a for a in axes if before[a] or after[a]]
    if not touched:
        return x
    if mode == "constant":
        first = min(touched)
        return F.pad(x, [p for a in range(x.dim() - 1, first - 1, -1) for p in (before.get(a, 0), after.get(a, 0))], value=value)
    first, rank = min(touched), x.dim()
    if rank in (3, 4, 5) and first >= 2 and all(before[a] >= 0 and after[a] >= 0 for a in touched) and x.is_floating_point():
        spatial = [p for a in range(rank - 1, 1, -1) for p in (before.get(a, 0), after.get(a, 0))]
        return F.pad(x, spatial, mode=PAD_MODES[mode])
    for axis in touched:
        x = pad_axis(x, axis, before[axis], after[axis], mode)
    return x


@op("Pad", since=2)
def pad_attributes(call: Call, x: torch.Tensor) -> torch.Tensor:
    return _pad(call, x, call.attr("pads"), call.attr("value", 0.0), None)


@op("Pad", since=11, static=(1, 2, 3))
def pad(call: Call, x: torch.Tensor, *_: Any) -> torch.Tensor:
    value = call.value(2)
    return _pad(call, x, call.ints(1) or [], 0 if value is None or not value.size else value.item(), call.ints(3))


@op("DepthToSpace")
def depth_to_space(call: Call, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    b = call.attr("blocksize")
    if call.attr("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth")
def space_to_depth(call: Call, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    b = call.attr("blocksize")
    if call.attr("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, b)
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("Einsum")
def einsum(call: Call, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.einsum(call.attr("equation").replace(" ", ""), *inputs)


@op("Compress", static=(1,))
def compress(call: Call, x: torch.Tensor, condition: Any = None) -> torch.Tensor:
    keep = np.flatnonzero(np.asarray(call.value(1))).astype(np.int64)
    axis = call.attr("axis")
    return torch.index_select(x.reshape(-1) if axis is None else x, axis or 0, call.buffer("kept", lambda: keep))


@op("ReverseSequence", static=(1,))
def reverse_sequence(call: Call, x: torch.Tensor, lengths: Any = None) -> torch.Tensor:
    time, batch = call.attr("time_axis", 0), call.attr("batch_axis", 1)
    rows = [
        torch.cat([torch.flip(row.narrow(time, 0, n), [time]), row.narrow(time, n, x.shape[time] - n)], time)
        for row, n in zip(torch.split(x, 1, batch), call.ints(1) or [], strict=True)
    ]
    return torch.cat(rows, batch)
