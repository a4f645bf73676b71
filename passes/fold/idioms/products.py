"""Products taken apart: the association a model writes x * 0.5 * (1 + erf(...)) in does not matter to a match."""

from __future__ import annotations

from torch import fx

from ....ir.program import Program, single_user
from ..match import MOVEMENT, argument, aten, is_call, is_float, is_literal, operands, same_type, scalar

PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


def factors(program: Program, node: fx.Node, root: bool = True) -> tuple[float, list[fx.Node]]:
    """node as (number, other factors). Inner products are taken apart where nothing else reads them."""
    if not is_call(node, *PRODUCTS) or not is_float(node) or not (root or len(node.users) == 1):
        return 1.0, [node]
    a, b = operands(node)
    if node.target is aten.div.Tensor:
        divisor = scalar(program, b)
        if not divisor or not isinstance(a, fx.Node):
            return 1.0, [node]
        number, found = _term(program, a)
        return number / divisor, found
    left, right = _term(program, a), _term(program, b)
    return left[0] * right[0], left[1] + right[1]


def _term(program: Program, value: object) -> tuple[float, list[fx.Node]]:
    number = scalar(program, value)
    if number is not None:
        return number, []
    assert isinstance(value, fx.Node)
    return factors(program, value, root=False)


def plus(program: Program, node: object, number: float) -> fx.Node | None:
    """x where node is x + number and nothing else reads the sum."""
    if not is_call(node, aten.add.Tensor):
        return None
    if single_user(node) is None or argument(node, 2, "alpha", 1) != 1:
        return None
    a, b = operands(node)
    for x, other in ((a, b), (b, a)):
        if is_literal(program, other, number) and isinstance(x, fx.Node) and program.parameter(x) is None:
            return x
    return None


def merge_scalar_product(program: Program, node: fx.Node) -> fx.Node | None:
    """(x * a) / b -> x * (a / b)"""
    number, found = factors(program, node)
    if len(found) != 1 or found[0] is node or found[0] in node.all_input_nodes or not same_type(found[0], node):
        return None
    return program.insert(aten.mul.Tensor, (found[0], number), node)


def scale_before_matmul(program: Program, node: fx.Node) -> fx.Node | None:
    """matmul(q, k) * a -> matmul(q * a, k): the form in which attention is expanded, and where a may fold into q's layer."""
    number, found = factors(program, node)
    if len(found) != 1 or number == 1 or not is_call(found[0], aten.matmul.default):
        return None
    product = found[0]
    if len(product.users) != 1 or not same_type(product, node):
        return None
    left, right = operands(product)
    if any(program.parameter(x) is not None for x in (left, right)):
        return None
    return program.insert(aten.matmul.default, (program.insert(aten.mul.Tensor, (left, number), node), right), node)


def scale_before_left_operand(program: Program, node: fx.Node) -> fx.Node | None:
    """matmul(q, permute(k * a)) -> matmul(q * a, permute(k)): exporters share an attention scale between both sides."""
    left, right = operands(node)
    if any(not isinstance(x, fx.Node) or program.parameter(x) is not None for x in (left, right)) or not is_float(left):
        return None
    reader: fx.Node = node
    current: fx.Node = right
    while single_user(current) is reader and is_call(current, *MOVEMENT):
        reader, current = current, current.args[0]  # type: ignore[assignment]
    if single_user(current) is not reader:
        return None
    number, found = factors(program, current)
    if len(found) != 1 or found[0] is current or not same_type(found[0], current):
        return None
    current.replace_all_uses_with(found[0])
    right = found[0] if reader is node else right
    return program.insert(aten.matmul.default, (program.insert(aten.mul.Tensor, (left, number), node), right), node)
