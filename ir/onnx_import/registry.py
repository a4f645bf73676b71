"""The operator table of the ONNX importer: one torch function per ONNX operator and opset range.

An operator function is called as `function(call, *inputs)` with torch tensors (None for an absent optional input) and
returns one tensor or a tuple. It runs three times: once on fake tensors to learn shapes, and twice while torch exports it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import CaptureError

Function = Callable[..., Any]

#: `onnx.TensorProto` element type -> torch type. Types under 8 bits are held one value a byte.
TORCH_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT4: torch.int8,
    onnx.TensorProto.UINT4: torch.uint8,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    onnx.TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    onnx.TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}

NARROW_TYPES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


def torch_type(element_type: int, who: str) -> torch.dtype:
    """The torch type of an ONNX element type; raises CaptureError where torch has none."""
    if element_type not in TORCH_TYPES:
        raise CaptureError(f"{who} has element type {onnx.TensorProto.DataType.Name(element_type)}, which torch cannot hold")
    return TORCH_TYPES[element_type]


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    since: first operator-set version the function is right for. static: positions of inputs whose value must be known at
    import (shapes, axes, pads). constant_only: legal only where every input is known at import (data-dependent shapes).
    shape_only: the result depends on the input's shape alone and is always a constant.
    prepare: rewrites constant inputs once at import, see `ops_matmul`.
    """

    name: str
    function: Function
    since: int
    static: frozenset[int]
    constant_only: bool = False
    shape_only: bool = False
    prepare: Callable[[Call, list[torch.Tensor | None]], dict[int, torch.Tensor]] | None = None


OPERATORS: dict[str, list[Operator]] = {}


def op(*names: str, since: int = 1, static: Iterable[int] = (), **flags: Any) -> Callable[[Function], Function]:
    """Registers the decorated function for operators of the standard domain. Duplicates are an error."""

    def register(function: Function) -> Function:
        for name in names:
            rows = OPERATORS.setdefault(name, [])
            if any(row.since == since for row in rows):
                raise ValueError(f"ONNX operator {name} since {since} is registered twice")
            rows.append(Operator(name, function, since, frozenset(static), **flags))
            rows.sort(key=lambda row: row.since)
        return function

    return register


def lookup(domain: str, name: str, version: int) -> Operator | None:
    """The row for an operator at a schema version, or None."""
    if domain not in ("", "ai.onnx"):
        return None
    return next((row for row in reversed(OPERATORS.get(name, [])) if row.since <= version), None)


def nearest(name: str) -> list[str]:
    folded = {known.lower(): known for known in OPERATORS}
    return [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.6)]


@cache
def schema(name: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    """The standard's schema of an operator at an opset, or None where the standard has none."""
    try:
        return onnx.defs.get_schema(name, opset, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return None


def attributes_of(node: onnx.NodeProto, found: onnx.defs.OpSchema) -> dict[str, Any]:
    """The node's attributes over the schema's defaults; strings as str."""
    values = {name: a.default_value for name, a in found.attributes.items() if a.default_value.type}
    values.update((a.name, a) for a in node.attribute)
    return {name: _plain(onnx.helper.get_attribute_value(a)) for name, a in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (list, tuple)) or type(value).__name__.startswith("Repeated"):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True)
class Call:
    """One ONNX node as its operator function sees it.

    name: the node's name; version: schema version of the operator; wanted: which outputs anyone reads; values: for each
    input the value known at import (None where it is computed, or large and not needed); narrow_types: for each input its
    ONNX type where it is a 4-bit type, else 0; dtypes: the torch types of the inputs; buffers: constants made on the fly.
    """

    op: str
    name: str
    version: int
    attributes: Mapping[str, Any]
    wanted: tuple[bool, ...]
    values: tuple[np.ndarray | None, ...]
    narrow_types: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype | None, ...] = ()
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def ints(self, index: int, default: list[int] | None = None) -> list[int] | None:
        """The integers in input `index`, flat; `default` where the input is absent."""
        value = self.value(index)
        return default if value is None else [int(v) for v in value.reshape(-1)]

    def value(self, index: int) -> np.ndarray | None:
        return self.values[index] if index < len(self.values) else None

    def narrow(self, index: int) -> int:
        """The ONNX type of input `index` where it is INT4 or UINT4, which torch holds one value a byte; 0 for all others."""
        return self.narrow_types[index] if index < len(self.narrow_types) else 0

    def scalar(self, index: int) -> int | float | None:
        """Input `index` as a Python number where it is a known single number, else None."""
        value = self.value(index)
        if value is None or value.size != 1 or value.dtype.kind not in "iuf":
            return None
        return value.reshape(-1)[0].item()

    def buffer(self, key: str, make: Callable[[], np.ndarray]) -> torch.Tensor:
        """A constant tensor the operator needs beside its inputs: made on the first run, a buffer of the module afterwards."""
        if key not in self.buffers:
            with unset_fake_temporarily():
                self.buffers[key] = torch.from_numpy(np.ascontiguousarray(make()))
        return self.buffers[key]

    def fail(self, reason: str) -> CaptureError:
        return CaptureError(f"{self.op} node '{self.name}' (operator version {self.version}): {reason}")
