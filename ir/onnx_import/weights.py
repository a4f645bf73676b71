"""Reading tensors of an ONNX file exactly once.

`onnx.load` holds a model's weights up to three times at its peak: the file's bytes, the parsed message, and each tensor's
bytes. Here the file is mapped, the large `raw_data` fields of its initializers are cut out before parsing (the rest goes
through the onnx package as usual), and each tensor is then read straight from the file into the memory it will live in.
Every tensor is owned by the program: a later change of the file cannot reach it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from ..errors import CaptureError
from .registry import torch_type

#: Field numbers of onnx.proto3: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
#: Smaller tensors stay in the message.
SMALL = 1024

VIEWED = {"bfloat16": torch.bfloat16} | {
    f"float8_{kind}": getattr(torch, f"float8_{kind}") for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
}
NARROW = {"int4": np.int8, "uint4": np.uint8}
NUMPY_TYPES: dict[int, type[np.generic]] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.BFLOAT16: np.int16,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.INT16: np.int16,
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.INT64: np.int64,
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.UINT16: np.uint16,
    onnx.TensorProto.UINT32: np.uint32,
    onnx.TensorProto.UINT64: np.uint64,
    onnx.TensorProto.BOOL: np.bool_,
}


@dataclass(frozen=True)
class Span:
    """`length` bytes at `offset` of `path`."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class _Field:
    number: int
    start: int  # of the tag
    body: int  # of the payload
    end: int


def _varint(data: mmap.mmap | bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
    raise CaptureError(f"the file breaks off or is not protobuf at byte {at}")


def _fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[_Field]:
    """The fields of one protobuf message (https://protobuf.dev/programming-guides/encoding)."""
    at = start
    while at < end:
        tag, body = _varint(data, at, end)
        wire = tag & 7
        if wire == 0:
            _, stop = _varint(data, body, end)
        elif wire == 2:
            length, body = _varint(data, body, end)
            stop = body + length
        elif wire in (1, 5):
            stop = body + (8 if wire == 1 else 4)
        else:
            raise CaptureError(f"the file is not protobuf: wire type {wire} at byte {at}")
        if stop > end:
            raise CaptureError(f"the file breaks off: the field at byte {at} ends at byte {stop}, its message at byte {end}")
        yield _Field(tag >> 3, at, body, stop)
        at = stop


def _encoded(number: int, payload: bytes) -> bytes:
    out = bytearray()
    for value in (number << 3 | 2, len(payload)):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out) + payload


def split(path: Path) -> tuple[bytes, list[Span | None]]:
    """Cuts the large initializers out of an ONNX file.

    Returns:
        The serialized model without them, and for each initializer of the graph, in order, where its bytes are (or None).
    """
    spans: list[Span | None] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = [
            _encoded(GRAPH, _graph(data, field, path, spans)) if field.number == GRAPH else data[field.start : field.end]
            for field in _fields(data, 0, len(data))
        ]
    return b"".join(model), spans


def _graph(data: mmap.mmap, graph: _Field, path: Path, spans: list[Span | None]) -> bytes:
    parts = []
    for field in _fields(data, graph.body, graph.end):
        if field.number == INITIALIZER and field.end - field.body > SMALL:
            inner = list(_fields(data, field.body, field.end))
            raw = next((f for f in inner if f.number == RAW_DATA), None)
            spans.append(None if raw is None else Span(path, raw.body, raw.end - raw.body))
            parts.append(_encoded(INITIALIZER, b"".join(data[f.start : f.end] for f in inner if f is not raw)))
            continue
        if field.number == INITIALIZER:
            spans.append(None)
        parts.append(data[field.start : field.end])
    return b"".join(parts)


def external_span(tensor: onnx.TensorProto, folder: Path | None) -> Span:
    """Where an external tensor's bytes are, checked to lie inside the model's folder before anything is opened."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    who = f"external data of tensor '{tensor.name}' at '{location}'"
    if folder is None:
        raise CaptureError(f"{who}: a ModelProto has no folder; pass the path of the model file instead")
    parts = location.replace("\\", "/").split("/")
    if not location or Path(location).is_absolute() or parts[0].endswith(":") or ".." in parts or parts[0] == "":
        raise CaptureError(f"{who} leaves the folder of the model; only relative paths inside it are read")
    path = (folder / location).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CaptureError(f"{who} is a link out of the folder of the model; copy the file into the folder")
    if not path.is_file():
        raise CaptureError(f"{who} does not exist; copy the file beside the model")
    try:
        offset, size = int(entries.get("offset", 0)), path.stat().st_size
        length = int(entries.get("length", size - offset))
    except ValueError as error:
        raise CaptureError(f"{who} has an offset or length that is no number: {entries}") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise CaptureError(f"{who} ends at byte {offset + length}, but the file has {size} bytes; it is truncated")
    return Span(path, offset, length)


def read_span(tensor: onnx.TensorProto, span: Span) -> torch.Tensor:
    """One tensor whose bytes lie in a file."""
    who = f"tensor '{tensor.name}'"
    numpy_type = NUMPY_TYPES.get(tensor.data_type)
    if numpy_type is None:
        filled = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, name=tensor.name)
        with span.path.open("rb") as file:
            file.seek(span.offset)
            filled.raw_data = file.read(span.length)
        return read_inline(filled)
    count = _count(tensor)
    if count * np.dtype(numpy_type).itemsize != span.length:
        raise CaptureError(f"{who} of shape {list(tensor.dims)} needs {count} values, but holds {span.length} bytes")
    values = np.fromfile(span.path, numpy_type, count, offset=span.offset).reshape(tuple(tensor.dims))
    return torch.from_numpy(values).view(torch_type(tensor.data_type, who))


def read_inline(tensor: onnx.TensorProto) -> torch.Tensor:
    """One tensor whose bytes lie in the message."""
    who = f"tensor '{tensor.name}'"
    torch_type(tensor.data_type, who)
    _count(tensor)
    try:
        return to_torch(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise CaptureError(f"{who} of shape {list(tensor.dims)} is damaged: {error}") from error


def to_torch(values: np.ndarray) -> torch.Tensor:
    """A tensor that owns its memory, from any numpy array of an ONNX type."""
    kind = values.dtype.name
    if kind in VIEWED:
        whole = np.int16 if values.dtype.itemsize == 2 else np.uint8
        return torch.from_numpy(np.array(values).view(whole)).view(VIEWED[kind])
    try:
        return torch.from_numpy(np.array(values, dtype=NARROW.get(kind, values.dtype)))
    except TypeError as error:
        raise CaptureError(f"an array of type {kind} has no torch type") from error


def _count(tensor: onnx.TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        if dim < 0:
            raise CaptureError(f"tensor '{tensor.name}' has the negative dimension {dim}")
        count *= dim
    return count
