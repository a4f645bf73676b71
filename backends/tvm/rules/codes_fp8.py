"""8-bit floats that the kernel of one layer makes for the next: `gw::quantize_fp8` of what it is about to store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.dialect.fp8 import inverse_of
from ....ir.program import dtype_of, shape_of, single_user
from ..cuda.kernels.plan_fp8 import LEVELS
from ..cuda.kernels.plan_store import Store
from ..lower import Lowering
from ..values import DTYPES, Expr, Value, arguments

aten = torch.ops.aten

#: Ops that give a dense tensor another shape.
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints})


def multiplies_fp8(lowering: Lowering) -> bool:
    """Whether the target's tensor cores multiply 8-bit floats."""
    return lowering.target.arch == "cuda" and lowering.target.level in LEVELS


def inverse(node: fx.Node) -> np.ndarray:
    """(1,): what `quantize_fp8` multiplies with."""
    return inverse_of(arguments(node)[1]).numpy().reshape(1)


def bytes_of(node: fx.Node, **place: Expr) -> Value:
    """The value of a node of 8-bit floats: no kernel but those that multiply them reads it, so it is bytes to all others."""
    return Value(shape_of(node), "uint8", **place)


def emit_end(
    lowering: Lowering,
    generator: Any,
    spec: Sequence[Any],
    nodes: Sequence[fx.Node],
    inputs: Sequence[Expr | np.ndarray],
    place: str,
    **options: Any,
) -> None:
    """Calls a kernel that covers `nodes` and binds what it writes, in the layout `place`: "dense" or "channels".

    A generator of a target with 8-bit floats takes a `Store` behind `spec`; a value that only codes are made of is not stored.
    """
    if multiplies_fp8(lowering) and place == "dense":
        nodes = _through_views(nodes)
    last = nodes[-1]
    codes = next((user for user in last.users if user.target is gw.quantize_fp8.default), None)
    if codes is None or not multiplies_fp8(lowering):
        (out,) = lowering.kernel_outputs(generator, *spec, inputs=inputs, nodes=nodes, **options)
        lowering.bind_all(nodes, Value(shape_of(last), DTYPES[dtype_of(last)], **{place: out}))
        return
    store = Store(value=len(last.users) > 1, codes=True)
    given = {"inputs": [*inputs, inverse(codes)], "nodes": [*nodes, codes], "outputs": store.outputs, **options}
    *value, made = lowering.kernel_outputs(generator, *spec, store, **given)
    for node in nodes:
        lowering.bind(node, [])
    if value:
        lowering.bind(last, Value(shape_of(last), DTYPES[dtype_of(last)], **{place: value[0]}))
    lowering.bind(codes, bytes_of(codes, **{place: made}))


def _through_views(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """`nodes` and the views behind them, where codes are made of these alone: a view of dense rows moves nothing."""
    views: list[fx.Node] = []
    reader = single_user(nodes[-1])
    while reader is not None and reader.target in VIEWS:
        views.append(reader)
        reader = single_user(reader)
    return [*nodes, *views] if reader is not None and reader.target is gw.quantize_fp8.default else list(nodes)
