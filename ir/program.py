"""`Program`: the one intermediate representation every pass, solver and backend works on.

A Program is a flat `torch.fx.GraphModule` of ATen core ops and `gw::` ops with its parameters, the stage it has reached, and
for each node its shape and dtype (`meta["val"]`, a fake tensor) and the place it came from (`meta["origin"]`, a module path or
an ONNX node name). It runs in torch at every stage.
"""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .errors import VerificationError

#: The 16-bit floats.
HALF = frozenset({torch.float16, torch.bfloat16})


class Stage(enum.IntEnum):
    """How far a Program has been rewritten; see `ir.verify` for what each stage promises."""

    CAPTURED = 0
    CANONICAL = 1
    COMPRESSED = 2
    ANNOTATED = 3
    INTEGER = 4

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a program input or output. A symbolic dimension is None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        dims = "x".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{dims}]"


class Program:
    """A graph, its parameters and its stage. Tensors are shared between clones and never written in place.

    Args:
        graph_module: flat module; `get_attr` nodes name its parameters and buffers directly.
        stage: what `verify()` may assume.
        name: used in reports and dumps.
    """

    def __init__(self, graph_module: fx.GraphModule, stage: Stage = Stage.CAPTURED, name: str = "model") -> None:
        self.graph_module = graph_module
        self.stage = stage
        self.name = name
        self._compiled = self._calls()

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes whose values the program returns, in order."""
        returned = self.output.args[0]
        return list(returned) if isinstance(returned, (tuple, list)) else [returned]  # type: ignore[list-item]

    @property
    def input_specs(self) -> list[TensorSpec]:
        return [tensor_spec(n, str(n.target)) for n in self.inputs]

    @property
    def output_specs(self) -> list[TensorSpec]:
        names = self.output.meta.get("names") or [f"output{i}" for i in range(len(self.outputs))]
        return [tensor_spec(n, name) for n, name in zip(self.outputs, names, strict=True)]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs the program in torch, as its graph is now. Always returns a tuple, one tensor an output."""
        self._refresh()
        with torch.no_grad():
            result = self.graph_module(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    # -- parameters ------------------------------------------------------------------------------------------------------

    def parameter(self, node: fx.Node | Any) -> torch.Tensor | None:
        """The tensor behind a `get_attr` node; None for any other node or value."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return getattr(self.graph_module, str(node.target))
        return None

    def parameters(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of every parameter the graph reads, in graph order."""
        return {str(n.target): getattr(self.graph_module, str(n.target)) for n in self.graph.nodes if n.op == "get_attr"}

    def add_parameter(self, name: str, value: torch.Tensor, before: fx.Node, origin: str = "") -> fx.Node:
        """Registers `value` under a fresh name derived from `name` and returns its `get_attr` node, placed before `before`."""
        name = unique_attribute(self.graph_module, name)
        register_tensor(self.graph_module, name, value)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta = {"val": self.fake(value), "origin": origin or before.meta.get("origin", "")}
        return node

    def replace_parameter(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        """Points every user of a `get_attr` node at a new tensor; clones that still read the old tensor are untouched."""
        fresh = self.add_parameter(str(node.target), value, before=node, origin=node.meta.get("origin", ""))
        node.replace_all_uses_with(fresh)
        self.graph.erase_node(node)
        return fresh

    # -- editing ---------------------------------------------------------------------------------------------------------

    def insert(
        self, target: Callable[..., Any], args: tuple[Any, ...], before: fx.Node, origin: str = "", **kwargs: Any
    ) -> fx.Node:
        """Adds a call node before `before`, with its shape inferred at once."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        node.meta["origin"] = origin or before.meta.get("origin", "")
        infer_node(self, node)
        return node

    def clone(self) -> Program:
        """A copy with its own graph. Tensors are shared, so a clone costs no weight memory."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        returned = graph.graph_copy(self.graph, mapping)
        out = graph.output(returned)
        out.meta = copy.copy(self.output.meta)
        attributes = {str(n.target): getattr(self.graph_module, str(n.target)) for n in self.graph.nodes if n.op == "get_attr"}
        module = fx.GraphModule(dict_root(attributes), graph, class_name="Program")
        return Program(module, self.stage, self.name)

    def sweep(self) -> bool:
        """Drops nodes nobody reads and parameters no node names; recompiles. Returns whether a node went."""
        removed = self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        module = self.graph_module
        for name in [k for k in (*module._parameters, *module._buffers) if k not in used]:
            delattr(module, name)
        self.graph.lint()
        self._refresh()
        return removed

    def _calls(self) -> list[tuple[Any, ...]]:
        """What the code of the graph depends on. An edited node has new arguments, which are other objects."""
        return [(node, node.target, node.args, node.kwargs) for node in self.graph.nodes]

    def _refresh(self) -> None:
        """Compiles the graph where it was edited since it was compiled last."""
        calls = self._calls()
        same = len(calls) == len(self._compiled) and all(
            new is old for pair in zip(calls, self._compiled, strict=True) for new, old in zip(*pair, strict=True)
        )
        if not same:
            self.graph_module.recompile()
            self._compiled = calls

    # -- shapes ----------------------------------------------------------------------------------------------------------

    @property
    def fake_mode(self) -> FakeTensorMode:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(self, value: torch.Tensor) -> torch.Tensor:
        return self.fake_mode.from_tensor(value, static_shapes=True)

    def infer_shapes(self) -> None:
        """Recomputes `meta["val"]` of every node from the inputs' values."""
        for node in self.graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = self.fake(self.parameter(node))  # type: ignore[arg-type]
            elif node.op == "call_function":
                infer_node(self, node)


def tensor_spec(node: fx.Node, name: str) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name, tuple(d if isinstance(d, int) else None for d in value.shape), value.dtype)


def infer_node(program: Program, node: fx.Node) -> None:
    """Computes `meta["val"]` of one call node with fake tensors; raises VerificationError where the op rejects its inputs."""

    def value(arg: fx.Node) -> Any:
        if "val" not in arg.meta:
            raise VerificationError(f"node '{arg.name}' has no shape; it is read by '{node.name}' ({node.target})")
        return arg.meta["val"]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)  # type: ignore[misc]
    try:
        # As torch.export traces: composite ops whose C++ form asks for plain sizes have a Python form that takes symbolic ones.
        with enable_python_dispatcher(), program.fake_mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except VerificationError:
        raise
    except Exception as error:
        shapes = [f"{a.name}{tuple(a.meta['val'].shape)}" for a in node.all_input_nodes]
        raise VerificationError(
            f"{node.target} at '{node.name}' (from {node.meta.get('origin') or 'unknown'}) rejects its inputs {shapes}: {error}"
        ) from error


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def half_node(program: Program) -> fx.Node | None:
    """The first input or computed value of 16-bit floats; None where all are wider.

    A parameter may be stored in 16 bits for an op that computes in float32.
    """
    for node in program.nodes:
        if node.op != "get_attr" and any(value.dtype in HALF for value in tensors_of(node)):
            return node
    return None


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The (fake) tensors that a node makes: one, several, or none for the output."""
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]


def origin_of(node: fx.Node) -> str:
    return node.meta.get("origin", "") or node.name


def single_user(node: fx.Node) -> fx.Node | None:
    """The only reader of a value, or None where it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def dict_root(attributes: dict[str, torch.Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, value in attributes.items():
        register_tensor(root, name, value)
    return root


def register_tensor(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Parameters stay parameters (trainable in a later fine-tune); everything else is a buffer."""
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value.detach() if value.requires_grad else value)


def unique_attribute(module: torch.nn.Module, name: str) -> str:
    name = re.sub(r"\W", "_", name)
    base = re.sub(r"__v\d+$", "", name)
    taken = set(module._parameters) | set(module._buffers)
    candidate, count = name, 0
    while candidate in taken or hasattr(type(module), candidate):
        count += 1
        candidate = f"{base}__v{count}"
    return candidate


def flatten_inputs(inputs: Sequence[torch.Tensor] | torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
