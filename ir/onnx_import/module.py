"""From a checked ONNX model to an `nn.Module` that torch.export can trace.

Planning runs every node once, in order: on real tensors where all inputs are known (shape arithmetic folds away), on fake
tensors otherwise (shapes without arithmetic or memory). What is left is a list of steps, one submodule each.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CaptureError, GraphwrightError
from .reader import Model, describe, input_shape, join_biases
from .registry import NARROW_TYPES, Call, Operator, attributes_of, lookup, schema
from .weights import to_torch

#: A node whose inputs are all known is computed at import when its result has at most this many bytes or is only a view:
#: larger results (a dequantized weight) stay nodes, so that import never makes a model larger than its file.
FOLD_BYTES = 1 << 20
VIEWS: tuple[str, ...] = ("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Dropout")
#: Operators whose result has the element type of their first input, and may be 4-bit.
KEEP_TYPE = (*VIEWS, "Concat", "Gather", "Pad", "Slice", "Split", "Tile")
#: Known values are handed to operator functions up to this many elements.
KNOWN_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Step:
    call: Call
    operator: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OnnxNode(nn.Module):
    """One ONNX node; its place in the module tree is what names the origin of the exported ops."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        for key, value in step.call.buffers.items():
            self.register_buffer(f"constant_{key}", value)

    def forward(self, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        made = {key: getattr(self, f"constant_{key}") for key in self.step.call.buffers}
        call = dataclasses.replace(self.step.call, buffers=made)
        return as_tuple(self.step.operator.function(call, *inputs))


class OnnxModule(nn.Module):
    """Runs the planned steps. Initializers are buffers under their own (made safe) names."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.input_names = list(plan.inputs)
        self.output_names = plan.output_names
        self.steps = nn.ModuleList(OnnxNode(step) for step in plan.steps)
        self.attribute_of: dict[str, str] = {}
        read = {name for step in plan.steps for name in step.inputs} | set(plan.output_names)
        for name, value in plan.constants.items():
            if name in read:
                attribute = _safe_name(self, name)
                self.register_buffer(attribute, value)
                self.attribute_of[name] = attribute

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: dict[str, Any] = dict(zip(self.input_names, inputs, strict=True))
        values.update((name, getattr(self, attribute)) for name, attribute in self.attribute_of.items())
        values[""] = None
        for node in self.steps:
            results = node(*(values[name] for name in node.step.inputs))  # type: ignore[union-attr]
            values.update(zip(node.step.outputs, results, strict=False))  # type: ignore[union-attr]
        return tuple(values[name] for name in self.output_names)


def _safe_name(module: nn.Module, name: str) -> str:
    base = re.sub(r"\W", "_", name)
    base = base if base[:1].isalpha() else f"c_{base}"
    safe, count = base, 0
    while hasattr(module, safe):
        count += 1
        safe = f"{base}__v{count}"
    return safe


class Plan:
    """What is left of a model once everything known at import has been computed.

    steps: the nodes to run; constants: name -> tensor; inputs: name -> fake tensor; output_names: in order.
    """

    def __init__(self, model: Model, shapes: Mapping[str, Sequence[int] | int], known: Mapping[str, np.ndarray]) -> None:
        self.model = model
        self.steps: list[Step] = []
        self.constants: dict[str, torch.Tensor] = dict(model.initializers)
        self.output_names = [value.name for value in model.graph.output]
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._live: dict[str, torch.Tensor] = {}
        nodes = join_biases(model)
        self._readers = Counter(name for node in nodes for name in node.input)
        self._readers.update(self.output_names)
        self._opset = model.opsets.get("", model.opsets.get("ai.onnx", 0))
        self._narrow = {t.name: t.data_type for t in model.graph.initializer if t.data_type in NARROW_TYPES}
        types = ((value.name, value.type.tensor_type.elem_type) for value in model.graph.input)
        self._narrow.update((name, kind) for name, kind in types if kind in NARROW_TYPES)
        self.inputs = self._feed(shapes, known)
        model.initializers = {}  # the plan owns them: those it rewrites or folds are dropped on the way
        for node in nodes:
            self._visit(node)

    def _feed(self, shapes: Mapping[str, Sequence[int] | int], known: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        names = [value.name for value in self.model.inputs]
        dims = {d.dim_param for v in self.model.inputs for d in v.type.tensor_type.shape.dim if d.dim_param}
        for kind, given, legal in (("input_shapes", shapes, {*names, *dims}), ("constant_inputs", known, names)):
            for name in given:
                if name not in legal:
                    raise CaptureError(f"{kind} names '{name}', but the inputs of '{self.model.name}' are {sorted(legal)}")
        fed = {}
        for value in self.model.inputs:
            if value.name in known:
                self.constants[value.name] = to_torch(np.asarray(known[value.name]))
                continue
            shape, dtype = input_shape(value, shapes, self.model.name)
            with self._fake_mode:
                fed[value.name] = self._live[value.name] = torch.empty(shape, dtype=dtype)
        return fed

    def _visit(self, node: onnx.NodeProto) -> None:
        found = schema(node.op_type, self._opset, node.domain)
        operator = lookup(node.domain, node.op_type, found.since_version) if found else None
        if found is None or operator is None:
            raise CaptureError(f"{describe(node)} has no importer; reader.load must run first")
        names = tuple(node.input)
        inputs = [self._value(name) for name in names]
        call = Call(
            node.op_type,
            node.name or next(filter(None, node.output), node.op_type),
            found.since_version,
            attributes_of(node, found),
            tuple(bool(name) and self._readers[name] > 0 for name in node.output),
            tuple(self._known(name, index in operator.static) for index, name in enumerate(names)),
            tuple(self._narrow.get(name, 0) for name in names),
            tuple(None if value is None else value.dtype for value in inputs),
        )
        kind = _result_type(call)
        if kind in NARROW_TYPES:
            self._narrow.update((name, kind) for name in node.output)
        self._check_static(call, operator, names)
        results = self._fold(call, operator, names, inputs)
        if results is not None:
            self.constants.update((n, t) for n, t in zip(node.output, results, strict=False) if n)
        else:
            names = self._prepare(call, operator, names, inputs)
            inputs = [self._value(name) for name in names]
            with self._fake_mode:
                made = self._run(call, operator, inputs)
            self._live.update((n, t) for n, t in zip(node.output, made, strict=False) if n)
            # A static input is part of the call, not a tensor the step reads.
            names = tuple("" if i in operator.static else name for i, name in enumerate(names))
            self.steps.append(Step(call, operator, names, tuple(node.output)))
        self._release(node, names)

    def _value(self, name: str) -> torch.Tensor | None:
        return self._live.get(name, self.constants.get(name))

    def _known(self, name: str, static: bool) -> np.ndarray | None:
        value = self.constants.get(name)
        if value is None or (value.numel() > 16 and not static) or value.numel() > KNOWN_ELEMENTS:
            return None
        return _numpy(value)

    def _check_static(self, call: Call, operator: Operator, names: Sequence[str]) -> None:
        needed = range(len(names)) if operator.constant_only else operator.static
        for index in needed:
            if index < len(names) and names[index] and names[index] not in self.constants:
                name = names[index]
                way_out = (
                    f"pass constant_inputs={{'{name}': value}}" if name in self.inputs else "export the model with fixed shapes"
                )
                raise call.fail(
                    f"input {index} ('{name}') decides the shape of the result, so its value must be known at import; {way_out}"
                )

    def _fold(
        self, call: Call, operator: Operator, names: Sequence[str], inputs: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...] | None:
        """The node's results as real tensors where they can and should be computed now, else None."""
        if operator.shape_only:
            return self._run(call, operator, inputs)
        if any(name in self._live for name in names):
            return None
        if call.op not in VIEWS and not operator.constant_only:
            with self._fake_mode:
                size = sum(t.numel() * t.element_size() for t in self._run(call, operator, inputs))
            if size > FOLD_BYTES and names:
                return None
        return self._run(call, operator, inputs)

    def _prepare(
        self, call: Call, operator: Operator, names: tuple[str, ...], inputs: list[torch.Tensor | None]
    ) -> tuple[str, ...]:
        if operator.prepare is None:
            return names
        known = [self.constants.get(name) if name in self.constants else None for name in names]
        replaced = list(names)
        for index, value in operator.prepare(call, known).items():
            replaced[index] = f"{names[index]}.{call.attributes['prepared']}"
            self.constants.setdefault(replaced[index], value)
            self._readers[replaced[index]] += 1 << 30  # read by a step: stays
        return tuple(replaced)

    def _release(self, node: onnx.NodeProto, kept: Sequence[str]) -> None:
        """Drops constants nobody will read any more, so that a transposed weight does not live twice."""
        for name in kept:
            if name in self.constants:
                self._readers[name] += 1 << 30
        for name in node.input:
            self._readers[name] -= 1
            if self._readers[name] <= 0:
                self.constants.pop(name, None)

    def _run(self, call: Call, operator: Operator, inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        passed = [None if i in operator.static else value for i, value in enumerate(inputs)]
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return as_tuple(operator.function(call, *passed))
        except GraphwrightError:
            raise
        except Exception as error:
            shapes = [None if v is None else f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in inputs]
            reason = str(error).strip().split("\n")[0]
            raise call.fail(f"torch rejects it on inputs {shapes}: {type(error).__name__}: {reason}") from error


def _result_type(call: Call) -> int:
    """The ONNX element type of a node's result where that may be a 4-bit one, else 0."""
    if call.op == "Cast":
        return call.attr("to")
    if call.op == "Constant" and isinstance(call.attr("value"), onnx.TensorProto):
        return call.attr("value").data_type
    if call.op == "QuantizeLinear":
        return call.attr("output_dtype") or call.narrow(2)
    if call.op == "CastLike":
        return call.narrow(1)
    return call.narrow(0) if call.op in KEEP_TYPE else 0


def _numpy(value: torch.Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16 or (value.dtype.itemsize == 1 and value.is_floating_point()):  # numpy has neither
        value = value.float()
    return value.numpy()


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
