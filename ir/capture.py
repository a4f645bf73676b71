"""Capture of a PyTorch model: `torch.export`, decomposition to ATen core, and a flat Program that shares the weights."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from .errors import CaptureError, UnsupportedOpError
from .program import Program, Stage, flatten_inputs, register_tensor, unique_attribute

aten = torch.ops.aten

#: Composite operators that stay whole: passes, quantizers and kernels work on the layer, not on its pieces.
KEPT_WHOLE = (
    aten.linear.default,
    aten.matmul.default,
    aten.layer_norm.default,
    aten.batch_norm.default,
    aten.scaled_dot_product_attention.default,
    aten.dropout.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.mish.default,
    aten.softmax.int,
    aten.relu6.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.max_pool2d.default,
    aten.pad.default,
)


def capture(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
    *,
    dynamic_batch: bool = False,
    name: str | None = None,
) -> Program:
    """Captures a PyTorch model into a Program.

    Args:
        model: a module (it is exported in eval mode; its own mode is restored) or an ExportedProgram.
        example_inputs: one tensor or a tuple of tensors; not needed for an ExportedProgram.
        dynamic_batch: leave dimension 0 of every input symbolic.
        name: used in reports; the class name by default.

    Raises:
        CaptureError: the model has data-dependent control flow, returns something else than tensors, or does not export.
        UnsupportedOpError: an operator outside ATen (a custom op) is left in the graph.
    """
    if isinstance(model, ExportedProgram):
        exported, name = model, name or "model"
    else:
        if example_inputs is None:
            raise CaptureError(f"capturing {type(model).__name__} needs example_inputs: one tensor or a tuple of tensors")
        name = name or type(model).__name__
        exported = _export(model, flatten_inputs(example_inputs), dynamic_batch, name)
    return _flatten(exported.run_decompositions(_decompositions()), name)


def _export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dynamic_batch: bool, name: str) -> ExportedProgram:
    shapes = None
    if dynamic_batch:
        shapes = tuple({0: Dim("batch", min=1)} for _ in inputs)
        # torch.export takes an example size of 1 for a constant.
        inputs = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in inputs)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        kind = type(error).__name__
        control_flow = "GuardOnDataDependent" in kind or "data-dependent" in str(error).lower()
        advice = (
            "the model branches on tensor values; replace the branch by torch.where or torch.cond, or export the part without it"
            if control_flow
            else "make the model traceable by torch.export.export, or pass an ExportedProgram or an ONNX file"
        )
        raise CaptureError(f"cannot capture {name}: {kind}: {reason}\n{advice}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def _decompositions() -> dict[Any, Any]:
    table = torch.export.default_decompositions()
    for op in KEPT_WHOLE:
        table.pop(op, None)
    return table  # type: ignore[return-value]


def _flatten(exported: ExportedProgram, name: str) -> Program:
    """Turns lifted parameters back into attributes. The tensors are the model's own: no second copy of the weights."""
    _reject_control_flow(exported.graph, name)
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise CaptureError(
            f"{name} writes to {', '.join(changed)} while it runs; a Program is a pure function: remove the update"
        )
    root = torch.nn.Module()
    attribute_of: dict[str, str] = {}  # placeholder name -> attribute name
    state = dict(exported.state_dict) | dict(exported.constants)
    for spec in signature.input_specs:
        if spec.target is None or spec.kind.name == "USER_INPUT":
            continue
        value = state[spec.target]
        if not isinstance(value, torch.Tensor):
            raise CaptureError(f"{name} holds '{spec.target}', a {type(value).__name__}; only tensors can be captured")
        attribute = unique_attribute(root, spec.target)
        register_tensor(root, attribute, value.detach())
        attribute_of[spec.arg.name] = attribute
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in attribute_of:
            copied = graph.get_attr(attribute_of[node.name])
            copied.meta = {"val": node.meta["val"]}
        elif node.op == "output":
            returned = fx.map_arg(node.args[0], lambda n: mapping[n])
            copied = graph.output(returned)
            copied.meta["names"] = [getattr(a.arg, "name", f"output{i}") for i, a in enumerate(signature.output_specs)]
        else:
            copied = graph.node_copy(node, lambda n: mapping[n])
            copied.meta = {"val": node.meta.get("val"), "origin": _module_path(node)}
        mapping[node] = copied
    program = Program(fx.GraphModule(root, graph, class_name="Program"), Stage.CAPTURED, name)
    _check(program)
    _single_output_batch_norm(program)
    program.sweep()
    return program


def _single_output_batch_norm(program: Program) -> None:
    """Rewrites getitem(_native_batch_norm_legit_no_training(...), 0) back to batch_norm, so that layers have one output."""
    for node in list(program.nodes):
        if node.target is aten._native_batch_norm_legit_no_training.default:
            x, weight, bias, mean, var, momentum, eps = node.args
            args = (x, weight, bias, mean, var, False, momentum, eps, False)
            whole = program.insert(aten.batch_norm.default, args, before=node, origin=node.meta["origin"])
            for reader in list(node.users):
                reader.replace_all_uses_with(whole)


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if entry[0]]
    return paths[-1].removeprefix("L['self'].") if paths else node.name


def _reject_control_flow(graph: fx.Graph, name: str) -> None:
    """Before flattening: branches are sub-graphs, which a flat program has no place for."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"{name} has control flow ({node.target}) at '{node.name}' (from {_module_path(node)}); "
                "a Program is straight-line code: export each branch on its own"
            )


def _check(program: Program) -> None:
    for node in program.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            namespace = getattr(node.target, "namespace", "")
            if namespace not in ("aten", "gw"):
                raise UnsupportedOpError(
                    f"'{node.target}' at '{node.name}' (module {node.meta.get('origin')}) is not an ATen operator; "
                    "give it a decomposition into ATen ops, or replace it before capture"
                )
    for node in program.outputs:
        if not isinstance(node, fx.Node):
            raise CaptureError(f"{program.name} returns the constant {node!r}; every output must be a tensor")
