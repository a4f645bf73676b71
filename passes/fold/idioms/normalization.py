"""Layer normalization and softmax that exporters write out as arithmetic (Ba et al. 2016, arXiv:1607.06450, equation 3)."""

from __future__ import annotations

from torch import fx

from ....ir.program import Program, single_user
from ..match import argument, aten, is_call, is_float, is_literal, normalized_dims, operands, same_type, scalar


def layer_norm_of_arithmetic(program: Program, node: fx.Node) -> fx.Node | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) -> aten.layer_norm(x); also as a product with rsqrt."""
    found = _centred_over_deviation(program, node)
    if found is None:
        return None
    centred, variance, eps = found
    if not is_call(centred, aten.sub.Tensor) or argument(centred, 2, "alpha", 1) != 1:
        return None
    x, mean = operands(centred)
    dims = _mean_dims(mean, x)
    if dims is None or not is_float(x) or not same_type(x, node):
        return None
    rank = x.meta["val"].dim()
    shape = list(x.meta["val"].shape[dims[0] :])
    trailing = dims == list(range(dims[0], rank)) and all(isinstance(d, int) for d in shape)
    square = _square_mean(program, variance, centred, dims) if trailing else None
    if square is None or any(user not in (square, node) for user in centred.users):
        return None
    return program.insert(aten.layer_norm.default, (x, shape, None, None, eps, False), node)


def _centred_over_deviation(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(c, v, eps) where node is c / sqrt(v + eps), and nothing else reads the deviation."""
    a, b = operands(node)
    pairs = [(a, b)] if node.target is aten.div.Tensor else [(a, b), (b, a)]
    for centred, deviation in pairs:
        if not isinstance(deviation, fx.Node) or not isinstance(centred, fx.Node) or single_user(deviation) is not node:
            continue
        inner = _root(program, deviation, inverse=node.target is aten.mul.Tensor)
        if not is_call(inner, aten.add.Tensor) or single_user(inner) is None:  # type: ignore[arg-type]
            continue
        assert inner is not None
        for variance, eps in (operands(inner), operands(inner)[::-1]):
            number = scalar(program, eps)
            if number is not None and number >= 0 and isinstance(variance, fx.Node) and single_user(variance) is inner:
                return centred, variance, number
    return None


def _root(program: Program, node: fx.Node, inverse: bool) -> fx.Node | None:
    """v where node is sqrt(v), or 1 / sqrt(v) where `inverse`."""
    if is_call(node, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor):
        return node.args[0] if is_literal(program, node.args[1], -0.5 if inverse else 0.5) else None  # type: ignore[return-value]
    if not inverse:
        return node.args[0] if is_call(node, aten.sqrt.default) else None  # type: ignore[return-value]
    if is_call(node, aten.rsqrt.default):
        return node.args[0]  # type: ignore[return-value]
    inner = node.args[0] if is_call(node, aten.reciprocal.default) else None
    single = is_call(inner, aten.sqrt.default) and single_user(inner) is node  # type: ignore[arg-type]
    return inner.args[0] if single else None  # type: ignore[union-attr, return-value]


def _mean_dims(node: object, x: object) -> list[int] | None:
    """The dimensions over which node is mean(x, dims, keepdim=True)."""
    if not is_call(node, aten.mean.dim):
        return None
    if node.args[0] is not x or not argument(node, 2, "keepdim", False) or node.kwargs.get("dtype") is not None:
        return None
    dims = argument(node, 1, "dim")
    return normalized_dims(dims, x.meta["val"].dim()) if dims else None  # type: ignore[union-attr]


def _square_mean(program: Program, variance: fx.Node, centred: fx.Node, dims: list[int]) -> fx.Node | None:
    """The square of `centred` whose mean over `dims` is `variance`."""
    square = variance.args[0] if variance.args else None
    if _mean_dims(variance, square) != dims or not isinstance(square, fx.Node) or single_user(square) is not variance:
        return None
    if is_call(square, aten.mul.Tensor):
        return square if square.args == (centred, centred) else None
    power = is_call(square, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor) and is_literal(program, square.args[1], 2.0)
    return square if power and square.args[0] is centred else None


def layer_norm_weight(program: Program, node: fx.Node) -> fx.Node | None:
    """layer_norm(x) * gamma -> aten.layer_norm(x, gamma)"""
    return _with_parameter(program, node, 2)


def layer_norm_bias(program: Program, node: fx.Node) -> fx.Node | None:
    """layer_norm(x, gamma) + beta -> aten.layer_norm(x, gamma, beta)"""
    return _with_parameter(program, node, 3)


def _with_parameter(program: Program, node: fx.Node, index: int) -> fx.Node | None:
    a, b = operands(node)
    for norm, value in ((a, b), (b, a)):
        if not is_call(norm, aten.layer_norm.default) or single_user(norm) is not node:
            continue
        args = [norm.args[0], norm.args[1], *(argument(norm, i, name) for i, name in ((2, "weight"), (3, "bias")))]
        free = all(a is None for a in args[index:]) and argument(node, 2, "alpha", 1) == 1
        tensor = program.parameter(value)
        if not free or tensor is None or not same_type(norm, node):
            continue
        shape = list(args[1])
        if list(tensor.shape) != [1] * (tensor.dim() - len(shape)) + shape:
            continue
        if tensor.dim() != len(shape):
            value = program.add_parameter(str(value.target), tensor.reshape(shape), node)
        args[index] = value
        return program.insert(aten.layer_norm.default, (*args, argument(norm, 4, "eps", 1e-5), False), node)
    return None


def whole_layer_norm(program: Program, node: fx.Node) -> fx.Node | None:
    """getitem(native_layer_norm(x, ...), 0) -> aten.layer_norm(x, ...)"""
    native = node.args[0]
    if not is_call(native, aten.native_layer_norm.default) or node.args[1] != 0:
        return None
    return program.insert(aten.layer_norm.default, (*native.args, False), node)  # type: ignore[union-attr]


def whole_softmax(program: Program, node: fx.Node) -> fx.Node | None:
    """aten._softmax(x, dim, half_to_float=False) -> aten.softmax(x, dim)"""
    return None if node.args[2] else program.insert(aten.softmax.int, tuple(node.args[:2]), node)
