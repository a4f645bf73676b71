"""ONNX export: float programs as they are, annotated programs as QDQ, integer programs as operators with one result.

The stage decides, so a pipeline's text says which file it makes. An integer program (`onnx_exact`) gives the bits of the torch
reference, and so of the artifact, in runtimes that compute each operator as the standard defines it; QDQ is what most toolchains
compile to integer kernels.

ATen -> ONNX is PyTorch's own exporter (torch.onnx, onnxscript's operator library); only `gw::` ops are ours. Annotated:

    x -> fake_quantize            QuantizeLinear -> DequantizeLinear           (after a Clip where the range is narrow)
    weight -> fake_quantize       int8 or int4 initializer -> DequantizeLinear (so the file is really smaller)
    weight -> fake_quantize -> t  transposed initializer -> DequantizeLinear
    weight -> fake_codebook       float initializer: ONNX has no tables, so the answers are right and the file is not smaller

Any runtime reads these pairs; ONNX Runtime, for one, puts its integer kernels in their place. How near the answers are depends
on the program: ONNX divides by the scale where fake_quantize multiplies by its reciprocal, runtimes sum in other orders, and
integer kernels round biases to the accumulator's grid. A value near the middle between two codes can then land one code away, and
the step travels. After the pass `align-scales` no integer sum comes near such a middle and the codes are the same everywhere;
results of float ops (layer normalization, softmax, a layer's sum that is read as float) still can. Where no code may differ,
export the integer program.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch.export import Dim

from . import (
    dialect,  # noqa: F401  (defines gw::fake_quantize)
    onnx_exact,
)
from .errors import OutputError, PassError, UnsupportedOpError
from .files import check_output, write_atomically
from .onnx_nodes import DOMAIN, drop_unused, initializer, replace
from .program import Program, Stage, origin_of

#: The exporter's operator library is written for this opset; newer ones come by its version converter.
OLDEST_OPSET = 18
#: From this opset on, QuantizeLinear and DequantizeLinear know 16-bit and 4-bit types.
WIDE_TYPES_OPSET = 21
PROTOBUF_LIMIT = 2**31 - 1


def _opaque(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, axis: int, name: str
) -> torch.Tensor:
    """Stands for fake_quantize while torch traces: unlike that op, which decomposes, it stays one node."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::FakeQuantize",
        (x, scale, zero_point),
        {"qmin": qmin, "qmax": qmax, "axis": axis, "name": name},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


@dataclass(frozen=True)
class StorageType:
    """An ONNX integer type and its range."""

    dtype: ir.DataType
    low: int
    high: int
    opset: int


#: Tried in order: the first that holds the range. 4-bit types are for weights: activations are narrower by a Clip (the optimizer
#: of ONNX Runtime 1.32 fails on a Clip before a 4-bit QuantizeLinear), and nothing of them is stored.
STORAGE = (
    StorageType(ir.DataType.INT4, -8, 7, WIDE_TYPES_OPSET),
    StorageType(ir.DataType.UINT4, 0, 15, WIDE_TYPES_OPSET),
    StorageType(ir.DataType.INT8, -128, 127, 10),
    StorageType(ir.DataType.UINT8, 0, 255, 10),
    StorageType(ir.DataType.INT16, -32768, 32767, WIDE_TYPES_OPSET),
    StorageType(ir.DataType.UINT16, 0, 65535, WIDE_TYPES_OPSET),
)
HALF_BYTES = (ir.DataType.INT4, ir.DataType.UINT4)


def storage_type(qmin: int, qmax: int, opset: int, where: str, weight: bool = False) -> StorageType:
    """The smallest ONNX type of `opset` that holds the codes [qmin, qmax] of a weight or an activation.

    Raises:
        UnsupportedOpError: ONNX has no type for this range, or none at this opset.
    """
    types = STORAGE if weight else [s for s in STORAGE if s.dtype not in HALF_BYTES and (s.low < 0) == (qmin < 0)]
    fitting = [s for s in types if s.low <= qmin and qmax <= s.high]
    encoding = f"{'s' if qmin < 0 else 'u'}{(qmax - qmin).bit_length()} encoding [{qmin}, {qmax}] of '{where}'"
    if not fitting:
        raise UnsupportedOpError(
            f"the {encoding} has no ONNX type; quantize it to at most 16 bits, or compile it with graphwright"
        )
    known = next((s for s in fitting if s.opset <= opset), None)
    if known is None:
        raise UnsupportedOpError(f"the {encoding} needs opset {fitting[0].opset} for {fitting[0].dtype.name}, not {opset}")
    return known


def export_onnx(program: Program, path: str | os.PathLike[str] | None = None, opset: int | None = None) -> onnx.ModelProto:
    """Exports a program to ONNX: float, QDQ (stage annotated), or operators with one result (stage integer).

    Weights stored in fewer bits than a byte, of an integer program, or without their zeros are written out.

    Args:
        program: any stage. A symbolic batch stays symbolic.
        path: where to write the file (through a temporary name, so it is never half-written); None writes nothing.
        opset: 18 or newer. 16-bit encodings need 21, and so do weights of at most 4 bits to take half a byte. None: the oldest
            that holds the program's encodings in as few bytes as ONNX Runtime reads (see `preferred_opset`).

    Returns:
        The model; inputs and outputs carry the program's names.

    Raises:
        PassError: `opset` is too old or too new. UnsupportedOpError: an operator or an encoding that ONNX cannot hold, or a float
            op of an integer program whose result depends on the runtime, named with its node and origin. OutputError: `path`
            cannot be written.
    """
    opset = preferred_opset(program) if opset is None else opset
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise PassError(f"export_onnx writes opset {OLDEST_OPSET} to {newest}, not {opset}")
    target = None if path is None else Path(path)
    if target is not None:
        check_output(target, overwrite=True)
    opaque = program.clone()
    for node in list(opaque.nodes):
        if node.target is torch.ops.gw.fake_quantize.default:
            _make_opaque(opaque, node, opset)
        elif node.target in (torch.ops.gw.fake_codebook.default, *onnx_exact.FOLDED):
            value = opaque.add_parameter(str(node.args[0]), _constant_value(opaque, node), node)
            node.replace_all_uses_with(value)
    opaque.sweep()
    if program.stage is Stage.INTEGER:
        onnx_exact.hide(opaque)
    model = _translate_graph(opaque, opset)
    if program.stage is Stage.INTEGER:
        onnx_exact.lower(model)
    _lower_fake_quantize(model, opset)
    model.graph.name = program.name
    model.producer_name, model.producer_version = "graphwright", None
    proto = ir.to_proto(model)
    if proto.ByteSize() > PROTOBUF_LIMIT:
        raise OutputError(f"'{program.name}' takes {proto.ByteSize()} bytes in ONNX, more than the 2 GiB one file can hold")
    onnx.checker.check_model(proto)
    if target is not None:
        write_atomically(target, proto.SerializeToString())
    return proto


def preferred_opset(program: Program) -> int:
    """The oldest opset with a type for every encoding of `program`, and with 4-bit weights where ONNX Runtime runs them.

    Its optimizer (1.32) fails on signed activations from opset 21 on (its issue 25526): there, narrow weights take a byte each.
    """
    nodes = [n for n in program.nodes if n.target is torch.ops.gw.fake_quantize.default]
    found: list[tuple[bool, StorageType]] = []
    for node in nodes:
        weight = program.parameter(node.args[0]) is not None
        found.append((weight, storage_type(int(node.args[3]), int(node.args[4]), WIDE_TYPES_OPSET, _place(node), weight)))  # type: ignore[arg-type]
    signed = any(storage.low < 0 for weight, storage in found if not weight)
    return max([OLDEST_OPSET, *(s.opset for _, s in found if s.dtype not in HALF_BYTES or not signed)])


def _place(node: torch.fx.Node) -> str:
    return f"{node.name} (from {origin_of(node)})"


def _make_opaque(program: Program, node: torch.fx.Node, opset: int) -> None:
    x, scale, zero_point, qmin, qmax, *rest = node.args
    axis = rest[0] if rest else node.kwargs.get("axis")
    name = str(x.name)  # type: ignore[union-attr]
    if len(rest) > 1:
        # The values of chosen codes round to the same codes again.
        x = program.add_parameter(name, _constant_value(program, node), node)
    storage_type(int(qmin), int(qmax), opset, _place(node), program.parameter(x) is not None)  # type: ignore[arg-type]
    for what, value in (("scale", scale), ("zero point", zero_point)):
        if program.parameter(value) is None:
            raise UnsupportedOpError(
                f"the {what} of '{node.name}' (from {origin_of(node)}) is computed while the model runs; QDQ needs a constant"
            )
    per_axis = axis is not None and program.parameter(scale).numel() > 1  # type: ignore[union-attr]
    node.target = _opaque
    node.args = (x, scale, zero_point, qmin, qmax, int(axis) if per_axis else NO_AXIS, name)  # type: ignore[arg-type]
    node.kwargs = {}


def _constant_value(program: Program, node: torch.fx.Node) -> torch.Tensor:
    args = [program.parameter(a) if isinstance(a, torch.fx.Node) else a for a in node.args]
    return node.target(*args).detach()  # type: ignore[operator]


#: Stands for "one scale for the whole tensor" in the opaque op.
NO_AXIS = -1000


def _translate_graph(program: Program, opset: int) -> ir.Model:
    specs = program.input_specs
    examples = tuple(torch.zeros([2 if d is None else d for d in s.shape], dtype=s.dtype) for s in specs)
    dynamic = tuple({i: Dim.DYNAMIC for i, d in enumerate(s.shape) if d is None} for s in specs)
    module = program.graph_module.eval()
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(module, examples, dynamic_shapes=dynamic if any(dynamic) else None, strict=False)
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=True,
            )
    except Exception as error:
        raise UnsupportedOpError(f"'{program.name}' has no ONNX form: {_root_cause(error)}") from error
    model = made.model  # type: ignore[union-attr]
    if model.opset_imports.get("") != opset:
        raise UnsupportedOpError(
            f"'{program.name}' could not be converted to opset {opset}; the exporter left it at {model.opset_imports.get('')}"
        )
    _name_interface(model.graph, [s.name for s in specs], [s.name for s in program.output_specs])
    # The exporter notes how it traced each node, stack traces included: larger than a small model, and no reader's business.
    for node in model.graph:
        node.metadata_props.clear()
    return model


def _name_interface(graph: ir.Graph, inputs: list[str], outputs: list[str]) -> None:
    """Names the model's inputs and outputs; an inner value that has such a name gives way.

    A name that an input has already (of an input that is returned as it is) or that comes twice gets the ending `_output`.
    """
    unique: list[str] = []
    for name in outputs:
        while name in inputs or name in unique:
            name = f"{name}_output"
        unique.append(name)
    outputs = unique
    for index, value in enumerate(graph.outputs):
        if value.is_graph_input() or value.is_initializer() or value in graph.outputs[:index]:
            copy = ir.node("Identity", [value])
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
    taken = {*inputs, *outputs}
    for value in graph.inputs:
        value.name = f"{value.name}_input"
    for value in [*graph.initializers.values(), *(v for node in graph for v in node.outputs)]:
        if value.name in taken:
            value.name = f"{value.name}_inner"
    for value, name in [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]:
        value.name = name


def _root_cause(error: BaseException) -> str:
    """The exporter wraps the error that matters, which names the node, in ones that give advice."""
    while error.__cause__ is not None and not str(error).startswith("Error when translating node"):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:500]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs about packages it does not find; that is no business of whoever exports a Program."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# -- fake quantization ---------------------------------------------------------------------------------------------------------


def _lower_fake_quantize(model: ir.Model, opset: int) -> None:
    for node in list(model.graph):
        if node.domain == DOMAIN:
            x = node.inputs[0]
            if x is not None and x.const_value is not None:
                _lower_weight(model.graph, node, opset)
            else:
                _lower_activation(model.graph, node, opset)
    model.opset_imports.pop(DOMAIN, None)
    model.functions.clear()
    drop_unused(model.graph)


@dataclass(frozen=True)
class _Encoding:
    scale: np.ndarray
    zero_point: np.ndarray
    qmin: int
    qmax: int
    axis: int | None
    storage: StorageType


def _encoding(node: ir.Node, opset: int, weight: bool) -> _Encoding:
    qmin, qmax, axis = (node.attributes[key].as_int() for key in ("qmin", "qmax", "axis"))
    per_axis = axis != NO_AXIS
    scale, zero = (_constant(node.inputs[i], node).reshape(-1 if per_axis else ()) for i in (1, 2))
    if per_axis and zero.size == 1:
        zero = np.broadcast_to(zero, scale.shape)
    return _Encoding(
        scale.astype(np.float32),
        zero,
        qmin,
        qmax,
        axis if per_axis else None,
        storage_type(qmin, qmax, opset, node.attributes["name"].as_string(), weight),
    )


def _constant(value: ir.Value | None, node: ir.Node) -> np.ndarray:
    if value is None or value.const_value is None:
        raise UnsupportedOpError(f"'{node.name}' has a scale or zero point that is no constant; QDQ needs a constant")
    return value.const_value.numpy()


def _scale_and_zero(graph: ir.Graph, name: str, encoding: _Encoding) -> tuple[ir.Value, ir.Value]:
    scale = initializer(graph, f"{name}_scale", encoding.scale)
    return scale, initializer(graph, f"{name}_zero_point", encoding.zero_point, encoding.storage.dtype)


def _node(op: str, inputs: list[ir.Value], name: str, attributes: dict[str, int] | None = None) -> ir.Node:
    return ir.node(op, inputs, attributes or {}, name=name)


def _lower_activation(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    x, encoding = node.inputs[0], _encoding(node, opset, weight=False)
    name = node.attributes["name"].as_string()
    scale, zero = _scale_and_zero(graph, name, encoding)
    axis = {} if encoding.axis is None else {"axis": encoding.axis}
    storage, steps = encoding.storage, []
    if (encoding.qmin, encoding.qmax) != (storage.low, storage.high):
        # The clip stands before the pair, in float: runtimes look for QuantizeLinear and DequantizeLinear side by side.
        if encoding.axis is not None:
            raise UnsupportedOpError(
                f"the encoding [{encoding.qmin}, {encoding.qmax}] of '{name}' is narrower than {storage.dtype.name} and has one "
                "scale a channel, and ONNX clips to one range; quantize the activation with one scale, or to the full range"
            )
        bounds = [
            initializer(graph, f"{name}_{k}", np.float32(code - encoding.zero_point) * encoding.scale)
            for k, code in (("low", encoding.qmin), ("high", encoding.qmax))
        ]
        steps.append(_node("Clip", [x, *bounds], f"{name}_clip"))  # type: ignore[list-item]
        x = steps[-1].outputs[0]
    steps.append(_node("QuantizeLinear", [x, scale, zero], f"{name}_quantize", axis))  # type: ignore[list-item]
    steps.append(_node("DequantizeLinear", [steps[-1].outputs[0], scale, zero], f"{name}_dequantize", axis))
    replace(graph, node, steps)


def _lower_weight(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    weight, encoding = node.inputs[0], _encoding(node, opset, weight=True)
    name = str(weight.name)  # type: ignore[union-attr]
    values = quantize_weight(_constant(weight, node), encoding)
    axis, replaced = encoding.axis, node
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Transpose" and not node.outputs[0].is_graph_output():
        order = list(readers[0].attributes["perm"].as_ints())
        values, replaced = values.transpose(order), readers[0]
        axis = None if axis is None else order.index(axis % values.ndim)
    scale, zero = _scale_and_zero(graph, name, encoding)
    stored = initializer(graph, f"{name}_quantized", values, encoding.storage.dtype)
    attributes = {} if axis is None else {"axis": axis}
    replace(graph, replaced, [_node("DequantizeLinear", [stored, scale, zero], f"{name}_dequantize", attributes)])
    if replaced is not node:
        graph.remove(node, safe=True)


def quantize_weight(values: np.ndarray, encoding: _Encoding) -> np.ndarray:
    """The integers of a weight: exactly the grid points gw::fake_quantize holds it on (float32 arithmetic)."""
    shape = [1] * values.ndim
    if encoding.axis is not None:
        shape[encoding.axis] = -1
    scale, zero = (
        v.astype(np.float32).reshape(shape if encoding.axis is not None else ()) for v in (encoding.scale, encoding.zero_point)
    )
    steps = np.clip(values.astype(np.float32) * (np.float32(1) / scale), encoding.qmin - zero, encoding.qmax - zero)
    return (np.rint(steps) + zero).astype(np.int32)
