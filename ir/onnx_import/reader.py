"""Loading and checking an ONNX model: everything that is wrong with the file is found here, before any operator runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx.inliner
import torch

from ..errors import CaptureError, UnsupportedOpError
from .registry import CONTROL_FLOW, lookup, nearest, schema, torch_type
from .weights import Span, external_span, read_inline, read_span, split

#: Broadcasting as it is today came with opset 7; everything older is refused.
OLDEST_OPSET = 7


@dataclass
class Model:
    """A checked model: its message without the large weights, and the weights as tensors."""

    proto: onnx.ModelProto
    name: str
    opsets: dict[str, int]
    initializers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> onnx.GraphProto:
        return self.proto.graph

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Graph inputs that a caller must feed: old models list the initializers among the inputs."""
        return [value for value in self.graph.input if value.name not in self.initializers]


def load(source: str | os.PathLike[str] | onnx.ModelProto, name: str | None) -> Model:
    """Reads and checks a model.

    Raises:
        CaptureError: the file is missing, truncated or not ONNX, its graph is not well formed, or external data is missing
            or lies outside the model's folder. UnsupportedOpError: an operator that the importer does not know.
    """
    if isinstance(source, onnx.ModelProto):
        proto, folder, spans = source, None, None
        name = name or proto.graph.name or "model"
    else:
        path = Path(source)
        name = name or path.stem
        proto, spans = _parse(path)
        folder = path.parent
    opsets = {entry.domain or "": entry.version for entry in proto.opset_import}
    _check_header(proto, opsets, name)
    model = Model(proto, name, opsets)
    _read_initializers(model, folder, spans)
    if proto.functions:
        model.proto = onnx.inliner.inline_local_functions(proto)
    _check_graph(model)
    model.proto = _expand_functions(model)
    return model


def _parse(path: Path) -> tuple[onnx.ModelProto, list[Span | None]]:
    if not path.is_file():
        raise CaptureError(f"there is no ONNX file at '{path}'")
    if path.stat().st_size == 0:
        raise CaptureError(f"'{path}' is empty; it is not an ONNX model")
    try:
        skeleton, spans = split(path)
        return onnx.ModelProto.FromString(skeleton), spans
    except CaptureError as error:
        raise CaptureError(f"'{path}' is not an ONNX model, or it is truncated: {error}") from error
    except Exception as error:  # protobuf raises DecodeError, whose import path differs between its implementations
        raise CaptureError(f"'{path}' is not an ONNX model, or it is truncated: {error}") from error


def _check_header(proto: onnx.ModelProto, opsets: Mapping[str, int], name: str) -> None:
    if not proto.HasField("graph") or not proto.graph.output:
        raise CaptureError(f"'{name}' is not an ONNX model, or it is truncated: it has no graph with outputs")
    opset = opsets.get("", opsets.get("ai.onnx"))
    if not opsets:
        raise CaptureError(f"'{name}' names no operator set; it is not a complete ONNX model")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise CaptureError(
            f"'{name}' uses opset {opset}; this importer reads opset {OLDEST_OPSET} to {newest} "
            "(convert it with onnx.version_converter, or install a newer onnx)"
        )


def _read_initializers(model: Model, folder: Path | None, spans: Sequence[Span | None] | None) -> None:
    graph = model.graph
    if graph.sparse_initializer:
        raise CaptureError(
            f"'{model.name}' holds the sparse initializer '{graph.sparse_initializer[0].values.name}'; make it dense"
        )
    external = {t.name: external_span(t, folder) for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    for index, tensor in enumerate(graph.initializer):
        if tensor.name in model.initializers:
            raise CaptureError(f"'{model.name}' has two initializers named '{tensor.name}'")
        span = external.get(tensor.name) or (spans[index] if spans else None)
        model.initializers[tensor.name] = read_inline(tensor) if span is None else read_span(tensor, span)


def _check_graph(model: Model) -> None:
    """Each value is defined once and before it is read (the order the standard asks for), and each operator is known."""
    defined = {value.name for value in model.graph.input} | set(model.initializers)
    for node in model.graph.node:
        for name in node.input:
            if name and name not in defined:
                raise CaptureError(
                    f"{describe(node)} of '{model.name}' reads '{name}', which no node before it makes; "
                    "the model is damaged or not sorted topologically"
                )
        for name in node.output:
            if name and name in defined:
                raise CaptureError(f"{describe(node)} of '{model.name}' makes '{name}', which exists already")
            defined.add(name)
        _check_operator(model, node)
    for value in model.graph.output:
        if value.name not in defined:
            raise CaptureError(f"'{model.name}' returns '{value.name}', which no node makes; the model is damaged")


def describe(node: onnx.NodeProto) -> str:
    return f"{node.op_type} node '{node.name or (node.output[0] if node.output else '')}'"


def expands(node: onnx.NodeProto, opset: int) -> bool:
    """Whether the standard itself defines the operator by simpler ones, which are imported in its place."""
    found = schema(node.op_type, opset, node.domain)
    return found is not None and (found.has_function or found.has_context_dependent_function)  # type: ignore[attr-defined]


def _check_operator(model: Model, node: onnx.NodeProto) -> None:
    if node.op_type in CONTROL_FLOW and node.domain in ("", "ai.onnx"):
        raise CaptureError(
            f"{describe(node)} of '{model.name}' is control flow; a Program is straight-line code: export each branch "
            "on its own, or export the model with the condition fixed"
        )
    opset = model.opsets.get(node.domain or "", model.opsets.get("ai.onnx" if not node.domain else node.domain, 0))
    found = schema(node.op_type, opset, node.domain) if opset else None
    if found is not None and (lookup(node.domain, node.op_type, found.since_version) or expands(node, opset)):
        return
    raise UnsupportedOpError(_unsupported(model, node, opset))


def _unsupported(model: Model, node: onnx.NodeProto, opset: int) -> str:
    makers = {name: other for other in model.graph.node for name in other.output if name}
    lines = [
        f"ONNX operator '{node.op_type}' (domain '{node.domain or 'ai.onnx'}', opset {opset or 'not imported'}) has no "
        f"importer; '{model.name}' uses it at node '{node.name or (node.output[0] if node.output else '')}'"
    ]
    for name in filter(None, node.input):
        kind = "an initializer" if name in model.initializers else "a graph input"
        lines.append(f"    reads '{name}' from {describe(makers[name]) if name in makers else kind}")
    for name in filter(None, node.output):
        readers = [describe(other) for other in model.graph.node if name in other.input]
        lines.append(f"    its '{name}' is read by {', '.join(readers) or 'the graph output'}")
    near = nearest(node.op_type)
    lines.append(
        (f"nearest supported operators: {', '.join(near)}; " if near else "")
        + "replace the node before export, or cut the model there (docs/ONNX.md lists what is supported)"
    )
    return "\n".join(lines)


def _expand_functions(model: Model) -> onnx.ModelProto:
    """Replaces operators that only the standard's own function bodies define (such as MeanVarianceNormalization)."""
    proto = model.proto
    opset = model.opsets.get("", model.opsets.get("ai.onnx", 0))
    wanted = {
        (node.domain, node.op_type)
        for node in proto.graph.node
        if lookup(node.domain, node.op_type, schema(node.op_type, opset, node.domain).since_version) is None  # type: ignore[union-attr]
    }
    if not wanted:
        return proto
    expanded = onnx.inliner.inline_selected_functions(proto, sorted(wanted), inline_schema_functions=True)
    left = [node for node in expanded.graph.node if (node.domain, node.op_type) in wanted]
    if left:
        raise UnsupportedOpError(_unsupported(model, left[0], opset))
    checked = Model(expanded, model.name, {e.domain or "": e.version for e in expanded.opset_import}, model.initializers)
    _check_graph(checked)
    return _expand_functions(checked)


def join_biases(model: Model) -> list[onnx.NodeProto]:
    """MatMul(x, W) -> Add(., b) with constant W (K, N) and b (N,): one MatMul with b as its third input.

    It is how exporters write a linear layer; joined, both capture roads end in the same `aten.linear`.
    """
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(model.graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    returned = {value.name for value in model.graph.output}
    nodes: list[onnx.NodeProto | None] = list(model.graph.node)
    for index, node in enumerate(model.graph.node):
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or node.output[0] in returned:
            continue
        reader = readers.get(node.output[0], [])
        weight = model.initializers.get(node.input[1])
        add = model.graph.node[reader[0]] if len(reader) == 1 else None
        if weight is None or weight.dim() != 2 or not weight.is_floating_point() or add is None or add.op_type != "Add":
            continue
        name = add.input[1] if add.input[0] == node.output[0] else add.input[0]
        bias = model.initializers.get(name)
        if bias is not None and bias.shape == weight.shape[1:]:
            joined = onnx.NodeProto()
            joined.CopyFrom(node)
            joined.input.append(name)
            joined.output[0] = add.output[0]
            nodes[index], nodes[reader[0]] = joined, None
    return [node for node in nodes if node is not None]


def input_shape(
    value: onnx.ValueInfoProto, shapes: Mapping[str, Sequence[int] | int], model: str
) -> tuple[list[int], torch.dtype]:
    """The shape and type of a graph input. The batch (a free first dimension) is 1 unless `shapes` says otherwise."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise CaptureError(f"input '{value.name}' of '{model}' is a {kind or 'value without type'}; only tensors can be captured")
    tensor = value.type.tensor_type
    dtype = torch_type(tensor.elem_type, f"input '{value.name}' of '{model}'")
    given = shapes.get(value.name)
    declared = list(tensor.shape.dim) if tensor.HasField("shape") else None
    if given is not None and not isinstance(given, int):
        if any(int(d) < 0 for d in given):
            raise CaptureError(f"input_shapes gives '{value.name}' the shape {list(given)}; dimensions cannot be negative")
        fixed = (
            [d.dim_value if d.HasField("dim_value") else None for d in declared] if declared is not None else [None] * len(given)
        )
        if len(fixed) != len(given) or any(f is not None and f != g for f, g in zip(fixed, given, strict=True)):
            raise CaptureError(f"input_shapes gives '{value.name}' the shape {list(given)}, but the model declares {fixed}")
        return [int(d) for d in given], dtype
    if declared is None:
        raise CaptureError(f"input '{value.name}' of '{model}' has no shape; pass input_shapes={{'{value.name}': (...)}}")
    return [_dimension(value.name, axis, dim, shapes, model) for axis, dim in enumerate(declared)], dtype


def _dimension(
    name: str, axis: int, dim: onnx.TensorShapeProto.Dimension, shapes: Mapping[str, Sequence[int] | int], model: str
) -> int:
    if dim.HasField("dim_value"):
        return dim.dim_value
    size = shapes.get(dim.dim_param) if dim.dim_param else None
    if isinstance(size, int):
        return size
    if axis == 0:
        return 1
    label = f"'{dim.dim_param}'" if dim.dim_param else "without a name"
    raise CaptureError(
        f"input '{name}' of '{model}' has the symbolic dimension {label} at axis {axis}; "
        f"pass input_shapes={{'{name}': (...)}}" + (f" or input_shapes={{'{dim.dim_param}': size}}" if dim.dim_param else "")
    )
