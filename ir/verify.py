"""What each stage promises, as rules over nodes; `verify()` names the first node that breaks one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from .dialect import gw
from .errors import VerificationError
from .program import Program, Stage, origin_of

aten = torch.ops.aten

#: A rule yields (node, complaint) for each violation.
Rule = Callable[[Program], Iterator[tuple[fx.Node, str]]]

#: Operators that only make sense while training or that canonicalization removes.
NON_CANONICAL: dict[Any, str] = {
    aten.batch_norm.default: "batch normalization must be folded or turned into scale and shift (fold-batch-norm)",
    aten.dropout.default: "dropout is a no-op at inference (remove-no-ops)",
    aten.native_dropout.default: "dropout is a no-op at inference (remove-no-ops)",
    aten.clone.default: "copies are no-ops (remove-no-ops)",
    aten.alias.default: "aliases are no-ops (remove-no-ops)",
    aten.detach.default: "detach is a no-op at inference (remove-no-ops)",
    aten.scaled_dot_product_attention.default: "attention is expanded into matmul and softmax (expand-attention)",
}

#: What calls of static shapes return, by call: the same layers are verified after every pass. Emptied when it is full.
KNOWN_RESULTS: dict[Any, Any] = {}
MOST_KNOWN = 20_000

#: The ops of the annotated stage.
FAKE = frozenset({gw.fake_quantize.default, gw.fake_codebook.default})

#: Float ops that ATen lacks, and weights whose zeros are not stored; any stage may hold them.
FLOAT = frozenset(
    {
        gw.quantize_fp8.default,
        gw.linear_fp8.default,
        gw.convolution_fp8.default,
        gw.sparse_linear.default,
        gw.from_bitmask.default,
        gw.match_tokens.default,
        gw.keep_tokens.default,
        gw.sum_tokens.default,
    }
)


def is_gw(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "gw"


def known_ops(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.op != "call_function":
            yield node, f"a {node.op} node; programs hold only placeholders, parameters, ATen and gw calls"
        elif getattr(node.target, "namespace", "") not in ("aten", "gw") and node.target is not operator.getitem:
            yield node, f"'{node.target}' is neither an ATen op nor a gw op"


def shapes_known(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield node, "no shape; a pass added it without Program.insert or infer_shapes"


def parameters_present(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.nodes:
        if node.op == "get_attr" and not isinstance(getattr(program.graph_module, str(node.target), None), torch.Tensor):
            yield node, f"names parameter '{node.target}', which the program does not hold"


def shapes_consistent(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Recomputes every shape and compares: catches an edit that left stale shapes behind."""
    if _surely_consistent(program):
        return
    fresh = program.clone()
    fresh.infer_shapes()
    for node, again in zip(program.nodes, fresh.nodes, strict=True):
        before, after = node.meta.get("val"), again.meta.get("val")
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            old, new = (tuple(before.shape), before.dtype), (tuple(after.shape), after.dtype)
            if old != new:
                yield node, f"records {old[0]} {old[1]} but computes {new[0]} {new[1]}"


class Layout(NamedTuple):
    """All of a tensor that the shape of a result can depend on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device


def _surely_consistent(program: Program) -> bool:
    """Whether every recorded shape is the computed one, by results of calls that are known. False where it takes more to know."""
    layouts: dict[fx.Node, Any] = {}
    try:
        for node in program.nodes:
            if node.op == "output":
                continue
            recorded = _layout(node.meta["val"])
            if node.op == "get_attr":
                layouts[node] = _layout(program.parameter(node))
            else:
                layouts[node] = _result(node, layouts) if node.op == "call_function" else recorded
            if isinstance(recorded, Layout) and recorded[:2] != layouts[node][:2]:
                return False
    except Exception:  # symbolic sizes, or an op that rejects its inputs: inferring the whole program says which, and why
        return False
    return True


def _result(node: fx.Node, layouts: dict[fx.Node, Any]) -> Any:
    """The layout of a call's result, or of each of its results."""

    def key(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return layouts[value]
        if isinstance(value, (tuple, list)):
            return tuple(map(key, value))
        return type(value), value

    def stand_in(layout: Any) -> Any:
        if not isinstance(layout, Layout):
            return [stand_in(item) for item in layout]
        return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=layout.device)

    call = (node.target, key(node.args), *((name, key(value)) for name, value in node.kwargs.items()))
    if call not in KNOWN_RESULTS:
        if len(KNOWN_RESULTS) >= MOST_KNOWN:
            KNOWN_RESULTS.clear()
        with enable_python_dispatcher(), FakeTensorMode(), torch.no_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: stand_in(layouts[n]))  # type: ignore[misc]
            KNOWN_RESULTS[call] = _layout(node.target(*args, **kwargs))  # type: ignore[operator]
    return KNOWN_RESULTS[call]


def _layout(value: Any) -> Any:
    """The layout of a tensor, or of each one of several. Unhashable where a size is symbolic."""
    if isinstance(value, torch.Tensor):
        return Layout(tuple(value.shape), value.dtype, value.stride(), value.device)
    return tuple(map(_layout, value)) if isinstance(value, (tuple, list)) else value


def inference_only(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.nodes:
        if node.target in NON_CANONICAL:
            yield node, NON_CANONICAL[node.target]


def float_only(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.nodes:
        if is_gw(node) and node.target not in FLOAT:
            yield node, f"'{node.target}' belongs to a later stage"


def fake_quantize_only(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.nodes:
        if is_gw(node) and node.target not in FAKE | FLOAT:
            yield node, f"'{node.target}' belongs to the integer stage"


def no_fake_quantize(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.nodes:
        if node.target in FAKE:
            yield node, "fake quantization left behind in the integer stage (lower-integer)"


def packed_parameters(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Backends unpack inside their kernels, from memory they lay out at build time."""
    for node in program.nodes:
        if node.target in (gw.unpack.default, gw.from_bitmask.default):
            computed = [n for n in node.all_input_nodes if n.op != "get_attr"]
            if computed:
                yield node, f"reads '{computed[0].name}', which is computed; only parameters are packed"


STRUCTURE: tuple[Rule, ...] = (known_ops, parameters_present, shapes_known, shapes_consistent)

SPECS: dict[Stage, tuple[Rule, ...]] = {
    Stage.CAPTURED: (*STRUCTURE, float_only),
    Stage.CANONICAL: (*STRUCTURE, float_only, inference_only),
    Stage.COMPRESSED: (*STRUCTURE, float_only, inference_only),
    Stage.ANNOTATED: (*STRUCTURE, fake_quantize_only, inference_only),
    Stage.INTEGER: (*STRUCTURE, no_fake_quantize, packed_parameters, inference_only),
}


def neighbourhood(node: fx.Node) -> str:
    """The node with its producers and readers, one a line, for error messages."""
    lines = [f"    {n.name} = {n.target}" for n in node.all_input_nodes]
    lines.append(f" -> {node.format_node()}")
    lines.extend(f"    read by {u.name} = {u.target}" for u in node.users)
    return "\n".join(lines)


def verify(program: Program, stage: Stage | None = None) -> None:
    """Checks a program against the spec of `stage` (its own by default).

    Raises:
        VerificationError: with the node, its origin, the broken rule and its neighbours.
    """
    stage = program.stage if stage is None else stage
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"'{program.name}' is not a well-formed graph: {error}") from error
    for rule in SPECS[stage]:
        for node, complaint in rule(program):
            raise VerificationError(
                f"'{program.name}' is not a valid {stage.label} program: '{node.name}' (from {origin_of(node)}): {complaint}\n"
                f"{neighbourhood(node)}"
            )
