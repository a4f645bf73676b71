"""Readable text of a Program: one line a node, with types, parameters and where each node came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .program import Program, origin_of, tensor_spec

SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "s64",
    torch.int32: "s32",
    torch.int8: "s8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def type_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype))}[{'x'.join(str(d) for d in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(v) for v in value)})"
    return type(value).__name__


def argument_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(argument_text(v) for v in value)}]"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def node_text(node: fx.Node) -> str:
    kind = type_text(node.meta.get("val"))
    if node.op == "placeholder":
        return f"%{node.name}: {kind} = input"
    if node.op == "get_attr":
        return f"%{node.name}: {kind} = parameter {node.target}"
    if node.op == "output":
        return f"return {argument_text(node.args[0])}"
    target = str(node.target).removesuffix(".default")
    arguments = [argument_text(a) for a in node.args] + [f"{k}={argument_text(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name}: {kind} = {target}({', '.join(arguments)})  # {origin_of(node)}"


def print_program(program: Program) -> str:
    """The whole program as text; stable for equal programs, so that dumps can be compared with diff."""
    inputs = ", ".join(str(tensor_spec(n, n.name)) for n in program.inputs)
    body = "\n".join(f"  {node_text(n)}" for n in program.nodes)
    return f"program {program.name} ({program.stage.label}) ({inputs}) {{\n{body}\n}}\n"
