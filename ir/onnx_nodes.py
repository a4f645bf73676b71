"""Writing ONNX nodes in place of one that stands for something else: what the two lowerings of the export share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

#: The domain of nodes that stand for `gw::` ops while PyTorch's exporter translates the rest.
DOMAIN = "graphwright.export"


def initializer(graph: ir.Graph, name: str, values: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """A new constant of `graph`, under `name` or one near it."""
    while name in graph.initializers:
        name += "_"
    numpy_type = values.dtype if dtype is None else dtype.numpy()
    tensor = ir.tensor(np.asarray(values, order="C").astype(numpy_type), name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node]) -> None:
    """Puts `new` (its last node makes the value) in the place of `node`."""
    old, made = node.outputs[0], new[-1].outputs[0]
    made.name, made.shape, made.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [old], [made])


def drop_unused(graph: ir.Graph) -> None:
    """Takes constants out of `graph` that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


class Writer:
    """Nodes of a model, one after the other: `w.Add(x, 1.0)` appends an Add and returns its value.

    Numbers and arrays among the operands become constants: Python floats are float32, and equal constants are stored once.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def constant(self, values: Any, dtype: type[np.generic] | None = None) -> ir.Value:
        array = np.asarray(values, dtype=np.float32 if dtype is None and isinstance(values, float) else dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = initializer(self.graph, f"exact_{len(self._constants)}", array)
        return self._constants[key]

    def op(self, kind: str, operands: tuple[Any, ...], outputs: int = 1, **attributes: Any) -> tuple[ir.Value, ...]:
        inputs = [v if isinstance(v, ir.Value) or v is None else self.constant(v) for v in operands]
        node = ir.node(kind, inputs, attributes, num_outputs=outputs)
        self.nodes.append(node)
        return tuple(node.outputs)

    def __getattr__(self, kind: str) -> Any:
        if not kind[0].isupper():
            raise AttributeError(kind)
        return lambda *operands, **attributes: self.op(kind, operands, **attributes)[0]

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.Cast(x, to=int(dtype))

    def take(self) -> list[ir.Node]:
        """The nodes written since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes
