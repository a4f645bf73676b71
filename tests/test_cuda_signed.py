"""Integer programs with s8 codes give the bits of those with u8 ones."""

from __future__ import annotations

import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.cuda.launch import triton_call
from graphwright.backends.tvm.cuda.signed import signed
from graphwright.backends.tvm.lower import lower
from graphwright.ir.batch import with_batch
from graphwright.ir.dialect import gw
from graphwright.ir.program import Program
from graphwright.tools.quick import quick_program
from graphwright.tools.sources import resolve
from integer_graphs import codes, integers, normal, program, scales

U8 = torch.uint8


def unsigned(graph: Program) -> list[str]:
    """The nodes of u8 codes that are computed."""
    found = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)]
    return [str(n.target) for n in found if n.meta["val"].dtype is U8]


def same(graph: Program, *inputs: torch.Tensor) -> Program:
    made = signed(graph)
    for got, expected in zip(made(*inputs), graph(*inputs), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    return made


def every_operator(p, x):
    q = gw.quantize(x, 0.03, 119, 3, 250, U8)
    framed = torch.ops.aten.constant_pad_nd.default(q, [1, 0, 0, 1], 119.0)
    acc = gw.convolution(framed, p.w, None, [1, 1], [1, 1], [1, 1], 1, 119)
    a = gw.rescale(acc, p.s, 100, 0, 255, U8, 1)
    b = gw.lookup(gw.rescale_dyadic(acc, p.m, p.h, 7, 0, 255, U8, 0), p.table)
    c = gw.add(a, b, 70000, 90000, 17, 100, 90, 30, 2, 255, U8)
    pooled = gw.max_pool2d(torch.cat([a, c], 1)[:, 1:], [2, 2], [2, 2], [1, 1], [1, 1], False)
    rows = pooled.flatten(2).transpose(1, 2).unsqueeze(1)
    product = gw.matmul(rows, rows.transpose(2, 3), 100, 30)
    return (
        gw.dequantize(pooled.reshape(2, -1), 0.1, 100),
        gw.scale(gw.linear(rows.squeeze(1), p.v, None, 100), p.t, -1),
        gw.scale(product, p.t, -1),
        gw.scale(gw.sum_pool2d(c, [2, 2], [2, 2], [1, 1], 30), p.t, -1),
        gw.scale(gw.multiply(a, gw.sum(c, [2, 3], True, 30).to(torch.int32).clamp(0, 9).to(torch.int8), 100, 0), p.t, -1),
    )


def test_every_operator_computes_the_same_with_codes_less_128():
    parameters = {"w": integers(-127, 128, 5, 4, 3, 3), "v": integers(-127, 128, 6, 9), "s": scales(5, 0.01), "t": scales(1, 0.1)}
    parameters |= {
        "table": codes(256),
        "m": torch.tensor([1103515245], dtype=torch.int32),
        "h": torch.tensor([37], dtype=torch.int32),
    }
    x = normal(2, 4, 9, 7) * 3
    graph = program(every_operator, x, **parameters)
    assert len(unsigned(graph)) > 12 and unsigned(same(graph, x)) == []
    assert unsigned(graph), "the program itself stays as it is"


def test_codes_of_the_program_itself_and_of_unknown_operators_stay():
    def graph(p, x, stream):
        kept = gw.rescale(gw.linear(x, p.w, None, 3), p.s, 5, 0, 255, U8, -1)
        odd = gw.quantize(stream, 0.1, 5, 0, 255, U8)
        moved = gw.dequantize(gw.quantize(stream, 0.1, 9, 0, 255, U8)[1:], 0.1, 9)
        return kept, torch.bitwise_not(odd).to(torch.int32), moved

    x, stream = codes(5, 6), normal(5, 6)
    graph = program(graph, x, stream, w=integers(-127, 128, 4, 6), s=scales(1, 0.01))
    assert sorted(unsigned(same(graph, x, stream))) == ["aten.bitwise_not.default", "gw.quantize.default", "gw.rescale.default"]


def test_a_residual_addition_keeps_one_type():
    """Else the product before it could not add: that is another launch."""

    def graph(p, x):
        q = gw.quantize(x, 0.1, 0, 0, 255, U8)
        one = [1, 1]
        a = gw.rescale(gw.convolution(q, p.w, None, one, [0, 0], one, 1, 0), p.s, 100, 0, 255, U8, 1)
        total = gw.add(a, q, 70000, 90000, 17, 100, 0, 0, 0, 255, U8)
        return gw.scale(gw.convolution(total, p.w, None, one, one, one, 1, 0), p.s, 1)

    x = normal(2, 4, 6, 5)
    traced = program(graph, x, w=integers(-127, 128, 4, 4, 1, 1), s=scales(1, 0.01))
    assert len(unsigned(same(traced, x))) == 3
    names = [row.name.rstrip("0123456789") for row in lower(traced, Target("cuda", "sm_90")).kernels]
    assert "add" not in names


def test_codes_that_zeros_border_stay_where_tensor_cores_read_them():
    def graph(p, x):
        q = [gw.quantize(x, 0.1, zero, 0, 255, U8) for zero in (0, 0, 0, 7, 0)]
        framed = torch.ops.aten.constant_pad_nd.default(q[4], [1, 0, 0, 1])
        one = [1, 1]
        return (
            gw.convolution(q[0], p.w, None, one, [1, 0], one, 1, 0),
            gw.convolution(q[1], p.d, None, one, one, one, 4, 0),
            gw.convolution(q[2], p.w, None, one, [0, 0], one, 1, 0),
            gw.convolution(q[3], p.w, None, one, one, one, 1, 7),
            gw.convolution(framed, p.w, None, one, [0, 0], one, 1, 0),
        )

    x = normal(2, 4, 6, 5)
    made = same(program(graph, x, w=integers(-127, 128, 8, 4, 3, 3), d=integers(-127, 128, 4, 1, 3, 3)), x)
    left = [n.name for n in made.nodes if n.op == "call_function" and n.meta["val"].dtype is U8]
    assert left == ["quantize", "quantize_4", "constant_pad_nd"]


@pytest.mark.parametrize(("model", "left"), [("resnet20", 30), ("vit-tiny", 0)])
def test_no_unsigned_codes_are_left_in_a_network_but_those_that_zeros_border(model, left):
    source = resolve(model, dynamic_batch=True)
    graph = with_batch(quick_program(source, "int8"), 2)
    assert source.reference is not None
    columns = zip(*source.reference.calibration(2), strict=True)
    assert len(unsigned(same(graph, *(torch.cat(column)[:2] for column in columns)))) == left
    calls = map(triton_call, lower(graph, Target("cuda", "sm_90")).module.functions.values())
    flips = [dict(call.constants)["FLIP"] for call in calls if call is not None and "FLIP" in dict(call.constants)]
    assert len(flips) > 5 and any(flips) == (left > 0)
