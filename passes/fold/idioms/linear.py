"""Matrix products with a constant on the right are linear layers."""

from __future__ import annotations

from torch import fx

from ....ir.program import Program, single_user
from ..match import aten, channel_vector, is_call, is_float, same_dim, same_shape


def linear_of_matmul(program: Program, node: fx.Node) -> fx.Node | None:
    """matmul(x, W^T) -> aten.linear(x, W). x (..., I), W constant (O, I)."""
    x, right = node.args[0], node.args[1]
    if not is_float(x) or x.meta["val"].dim() < 2 or program.parameter(x) is not None:  # type: ignore[union-attr]
        return None
    weight = _weight(program, node, right)
    return None if weight is None else program.insert(aten.linear.default, (x, weight, None), node)


def linear_of_addmm(program: Program, node: fx.Node) -> fx.Node | None:
    """addmm(b, x, W^T) -> aten.linear(x, W, b), or + b where b is no constant vector. x (N, I), W constant (O, I)."""
    bias, x, right = node.args[:3]
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or not is_float(x) or program.parameter(x) is not None:
        return None
    weight = _weight(program, node, right)
    if weight is None:
        return None
    vector = channel_vector(program, bias, node, -1)
    if vector is None:
        return program.insert(aten.add.Tensor, (program.insert(aten.linear.default, (x, weight, None), node), bias), node)
    if program.parameter(bias).dim() != 1 or program.parameter(bias).numel() != vector.numel():  # type: ignore[union-attr]
        value = vector.to(program.parameter(bias).dtype).contiguous()  # type: ignore[union-attr]
        bias = program.add_parameter(str(bias.target), value, node)  # type: ignore[union-attr]
    return program.insert(aten.linear.default, (x, weight, bias), node)


def _weight(program: Program, node: fx.Node, right: object) -> fx.Node | None:
    """The (O, I) parameter whose transpose is `right`; a transposed copy where only (I, O) exists."""
    if is_call(right, aten.permute.default, aten.t.default, aten.transpose.int):
        inner: fx.Node = right.args[0]  # type: ignore[union-attr]
        swapped = right.target is not aten.permute.default or [d % 2 for d in right.args[1]] == [1, 0]  # type: ignore[union-attr]
        parameter = program.parameter(inner)
        if swapped and parameter is not None and parameter.dim() == 2 and parameter.is_floating_point():
            return inner
        return None
    parameter = program.parameter(right)
    if parameter is None or parameter.dim() != 2 or not parameter.is_floating_point():
        return None
    return program.add_parameter(str(right.target), parameter.detach().t().contiguous(), node)  # type: ignore[union-attr]


def linear_without_flattening(program: Program, node: fx.Node) -> fx.Node | None:
    """reshape(linear(reshape(x, [-1, I])), [..., O]) -> aten.linear(x): leading dimensions need no flattening."""
    layer = node.args[0]
    if not is_call(layer, aten.linear.default) or single_user(layer) is not node:  # type: ignore[arg-type]
        return None
    flat = layer.args[0]  # type: ignore[union-attr]
    if not is_call(flat, aten.reshape.default, aten.view.default):
        return None
    x: fx.Node = flat.args[0]  # type: ignore[union-attr, assignment]
    before, after = x.meta["val"].shape, node.meta["val"].shape
    width = flat.meta["val"].shape[-1]  # type: ignore[union-attr]
    leading = len(before) == len(after) and all(same_dim(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    if len(before) < 2 or not leading or not same_dim(before[-1], width):
        return None
    if not same_dim(after[-1], layer.meta["val"].shape[-1]):  # type: ignore[union-attr]
        return None
    whole = program.insert(aten.linear.default, (x, *layer.args[1:]), node)  # type: ignore[union-attr]
    assert same_shape(whole, node)
    return whole
