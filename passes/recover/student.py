"""Programs as networks that torch trains: which tensors learn, and how a compressed or annotated program is set up for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ...ir.batch import over_samples
from ...ir.dialect import gw, tokens
from ...ir.dialect.fake import broadcast_along
from ...ir.dialect.sparse import dense
from ...ir.errors import PassError
from ...ir.program import Program, dtype_of, origin_of, shape_of
from ...ir.verify import FAKE, is_gw
from ..outputs import class_scores
from ..quantize import operators as ops
from ..quantize.annotate import bias_on_grid
from ..quantize.encoding import is_fake_quantize, read_codes, read_encoding

aten = torch.ops.aten

#: Which arguments of an op learn. Constants that sums and products read (masks, positions, scales) stay.
_LEARNED = {
    ops.CONVOLUTION: (1, 2),
    ops.LINEAR: (1, 2),
    ops.LAYER_NORM: (2, 3),
    aten.embedding.default: (0,),
}
#: What an index passes through on its way to a lookup.
_INDEX_MOVES = {aten._to_copy.default, *ops.MOVES}
#: Ops of the dialect whose reference torch can batch and differentiate; called by name they are opaque.
_REFERENCES = {
    gw.match_tokens.default: tokens.match_tokens,
    gw.keep_tokens.default: tokens.keep_tokens,
    gw.sum_tokens.default: tokens.sum_tokens,
}
#: How near the middle between two codes a weight may start: a code is left by one small step, yet is surely that code.
_EDGE = 0.49


@dataclass(frozen=True)
class Network:
    """A program's class scores, or outputs, as a function of batches; on `device`.

    Attributes:
        module: its outputs are what the loss compares.
        learned: name -> parameter, empty for a teacher.
        kept: name -> False where a weight is exactly 0 and stays so: a sparse layer stays sparse.
    """

    module: fx.GraphModule
    learned: dict[str, nn.Parameter]
    kept: dict[str, torch.Tensor]
    free_batch: bool

    @classmethod
    def of(cls, program: Program, device: torch.device, train: bool, scores: bool) -> Network:
        """scores: compare the logits behind a final softmax. Tensors are copied where they learn or change device."""
        clone = program.clone()
        clone.output.args = (tuple(class_scores(o) if scores else o for o in clone.outputs),)
        clone.output.meta = {}
        _open_ops(clone)
        clone.sweep()
        _move_constants(clone, device)
        names = set(learned_names(clone)) if train else set()
        learned, kept = {}, {}
        for name, value in clone.parameters().items():
            value = value.detach().to(device)
            delattr(clone.graph_module, name)
            if name in names:
                learned[name] = nn.Parameter(value.clone())
                clone.graph_module.register_parameter(name, learned[name])
                if value.dim() > 1 and bool((value == 0).any()):
                    kept[name] = value != 0
            else:
                # Never a parameter: moving a module writes into its parameters, and these are the user's.
                clone.graph_module.register_buffer(name, value)
        return cls(clone.graph_module, learned, kept, None in [spec.shape[0] for spec in clone.input_specs if spec.shape])

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Outputs for inputs stacked as `stack` does, samples first."""
        return self.module(*inputs) if self.free_batch else over_samples(self.module, *inputs)


def learned_names(program: Program) -> list[str]:
    """The float parameters that convolutions, linear layers, layer norms and embeddings read, in graph order."""
    return list(dict.fromkeys(str(node.target) for _, node in _learned_nodes(program)))


def _learned_nodes(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(layer, `get_attr` node) of every parameter that learns."""
    for layer in program.nodes:
        for position in () if _is_function(layer) else _LEARNED.get(layer.target, ()):  # type: ignore[arg-type]
            node: Any = layer.args[position] if len(layer.args) > position else None
            while isinstance(node, fx.Node) and (node.target in FAKE or node.target in ops.MOVES):
                node = node.args[0]
            value = program.parameter(node)
            if value is not None and value.dtype is torch.float32:
                yield layer, node


def _is_function(layer: fx.Node) -> bool:
    """Whether the index of a lookup is a number that was computed: its table is a function (log of a size), and no embedding."""
    index: Any = layer.args[1] if layer.target is aten.embedding.default else None
    while isinstance(index, fx.Node) and index.target in _INDEX_MOVES and not dtype_of(index).is_floating_point:
        index = index.args[0]
    return isinstance(index, fx.Node) and dtype_of(index).is_floating_point


def free_codes(program: Program) -> int:
    """Gives weights whose codes a rounding pass chose to the straight-through estimator; returns how many there were.

        fake_quantize(w, s, z, qmin, qmax, axis, codes)    ->    fake_quantize(w', s, z, qmin, qmax, axis)

    w' is the value nearest to w that rounds to the chosen code, so the program computes what it did before, bit for bit.

    Raises:
        PassError: chosen codes of a table (`gw.fake_codebook`).
    """
    freed = 0
    for node in [n for n in program.nodes if n.target in FAKE and program.parameter(n.args[0]) is not None]:
        chosen = node.args[6:] if is_fake_quantize(node) else node.args[5:]
        if not chosen or chosen[0] is None:
            continue
        if not is_fake_quantize(node):
            raise PassError(
                f"distill cannot move the weight of '{origin_of(node)}': a pass chose its codes from a table; "
                "put distill before that pass"
            )
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        moved = _nearest_of_code(program, node)
        fresh = program.add_parameter(str(source.target), moved, before=node, origin=source.meta.get("origin", ""))
        node.args = (fresh, *node.args[1:6])
        freed += 1
    program.sweep()
    return freed


def _nearest_of_code(program: Program, node: fx.Node) -> torch.Tensor:
    """The values nearest to a weight that round to the codes chosen for it."""
    weight = program.parameter(node.args[0])
    assert weight is not None
    encoding, codes, weight = read_encoding(program, node), read_codes(program, node), weight.detach()
    scale, zero = (broadcast_along(v, weight.dim(), encoding.axis) for v in (encoding.scale, encoding.zero_point))
    steps = codes.to(weight.dtype) - zero.to(weight.dtype)
    near = torch.minimum(torch.maximum(weight, (steps - _EDGE) * scale), (steps + _EDGE) * scale)
    moved = torch.where(encoding.quantize(weight) == codes, weight, near)
    if not torch.equal(encoding.quantize(moved), codes):
        raise PassError(f"no weight of '{origin_of(node)}' rounds to the codes that a pass chose for it")
    return moved


def write_back(program: Program, values: dict[str, torch.Tensor]) -> None:
    """Puts trained values in place of the parameters of these names; biases of integer layers go to their accumulator's grid."""
    values = dict(values)
    for layer, node in _learned_nodes(program):
        name = str(node.target)
        if layer.target in (ops.CONVOLUTION, ops.LINEAR) and (*layer.args, None)[2] is node and name in values:
            values[name] = bias_on_grid(program, layer, values[name])
    fresh: dict[str, fx.Node] = {}
    for node in [n for n in program.nodes if n.op == "get_attr" and str(n.target) in values]:
        name = str(node.target)
        if name not in fresh:
            fresh[name] = program.add_parameter(name, values[name], before=node, origin=node.meta.get("origin", ""))
        node.replace_all_uses_with(fresh[name])
        program.graph.erase_node(node)
    program.sweep()


def _open_ops(program: Program) -> None:
    """Writes the ops of the dialect so that gradients pass: an opaque one would cut them off without a word.

        gw.sparse_linear(x, rows of a matrix)    ->    linear(x, the matrix)
        gw.match_tokens(keys), ...               ->    their references, see `dialect.tokens`

    Raises:
        PassError: another op of the dialect that computes on activations.
    """
    constant: set[fx.Node] = set()
    for node in list(program.nodes):
        if node.op == "get_attr" or (node.op == "call_function" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
        elif node.target is gw.sparse_linear.default:
            x, *rows = node.all_input_nodes
            start, columns, values = (program.parameter(n) for n in rows)
            assert start is not None and columns is not None and values is not None
            matrix = program.add_parameter(f"{node.name}_dense", dense(start, columns, values, shape_of(x)[-1]), before=node)
            node.target, node.args = ops.LINEAR, (x, matrix)
        elif node.target in _REFERENCES:
            node.target = _REFERENCES[node.target]  # type: ignore[index]
        elif is_gw(node) and node.target not in FAKE:
            raise PassError(f"distill cannot differentiate {node.target} at '{node.name}' (from {origin_of(node)})")


def _move_constants(program: Program, device: torch.device) -> None:
    """Points the ops that make tensors (arange, full, ...) at `device`."""
    for node in program.nodes:
        if node.op == "call_function" and isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    program.graph_module.recompile()
