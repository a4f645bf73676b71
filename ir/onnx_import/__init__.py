"""ONNX capture: the graph is interpreted with torch functions, and that module goes the way every torch model goes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch

from ..capture import capture
from ..program import Program
from . import ops_attention, ops_elementwise, ops_matmul, ops_nn, ops_quantize, ops_reduce, ops_resize, ops_shape  # noqa: F401
from .module import OnnxModule, Plan
from .reader import load
from .registry import OPERATORS

__all__ = ["OPERATORS", "capture_onnx"]


def capture_onnx(
    path_or_modelproto: str | os.PathLike[str] | onnx.ModelProto,
    *,
    name: str | None = None,
    input_shapes: Mapping[str, Sequence[int] | int] | None = None,
    constant_inputs: Mapping[str, np.ndarray] | None = None,
) -> Program:
    """Captures an ONNX model into a Program of the same ATen ops that torch capture gives.

    Args:
        path_or_modelproto: a file, or a model in memory (which then must hold its own weights).
        name: used in reports; the file's or graph's name by default.
        input_shapes: shapes of inputs with symbolic dimensions (input name -> shape), or sizes of the dimensions themselves
            (dimension name -> size). A symbolic first dimension is the batch and 1 by default.
        constant_inputs: graph inputs to fix at import (input name -> value): shapes, axes or pads that arrive as inputs.

    Returns:
        A program in the captured stage. `meta["origin"]` of each node is the name of its ONNX node (of its first output where
        the node has no name); parameters, inputs and outputs keep their ONNX names, with characters that Python does not
        allow in a name replaced by '_'.

    Raises:
        CaptureError: the file is broken or untrusted, a shape is not known, or the graph has control flow.
        UnsupportedOpError: an operator without importer (docs/ONNX.md lists those there are).
    """
    model = load(path_or_modelproto, name)
    plan = Plan(model, input_shapes or {}, constant_inputs or {})
    module = OnnxModule(plan).eval()
    examples = tuple(torch.zeros(tuple(value.shape), dtype=value.dtype) for value in plan.inputs.values())
    origins = [step.call.name for step in plan.steps]
    plan.constants.clear()
    program = capture(module, examples, name=model.name)
    _name_origins(program, origins, {attribute: name for name, attribute in module.attribute_of.items()})
    _name_interface(program, list(plan.inputs), plan.output_names)
    return program


def _name_origins(program: Program, origins: list[str], initializers: Mapping[str, str]) -> None:
    for node in program.nodes:
        place = re.fullmatch(r"steps\.(\d+)", node.meta.get("origin", ""))
        if place:
            node.meta["origin"] = origins[int(place[1])]
        elif node.op == "get_attr":
            node.meta["origin"] = initializers.get(str(node.target), str(node.target))
    program.graph_module.recompile()


def _name_interface(program: Program, inputs: list[str], outputs: list[str]) -> None:
    """Gives the program's inputs and outputs the names they have in the model."""
    taken = {node.name for node in program.nodes}
    for node, name in zip(program.inputs, inputs, strict=True):
        safe = re.sub(r"\W", "_", name)
        safe = safe if safe.isidentifier() else f"input_{safe}"
        count = 0
        while safe in taken and safe != node.name:
            count += 1
            safe = f"{re.sub(r'_in[0-9]+$', '', safe)}_in{count}"
        taken.add(safe)
        node._rename(safe)
        node.target = safe
        node.meta["origin"] = name
    program.output.meta["names"] = list(outputs)
    program.graph_module.recompile()
