"""Integer programs with s8 codes give the bits of those with u8 ones."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.cuda.launch import ATTRIBUTE, triton_call
from graphwright.backends.tvm.cuda.signed import borders_with_zeros, signed
from graphwright.backends.tvm.lower import lower
from graphwright.ir.batch import with_batch
from graphwright.ir.dialect import gw
from graphwright.ir.program import Program
from graphwright.tools.quick import quick_program
from graphwright.tools.sources import resolve
from hypothesis import strategies as st
from integer_graphs import codes, integers, normal, program, scales

aten = torch.ops.aten
U8, S8 = torch.uint8, torch.int8


def unsigned(graph: Program) -> list[str]:
    """The nodes of u8 codes that are computed."""
    made = [(n, n.meta.get("val")) for n in graph.nodes if n.op == "call_function"]
    parts = [(n, value if isinstance(value, (list, tuple)) else [value]) for n, value in made]
    return [str(n.target) for n, values in parts if any(isinstance(v, torch.Tensor) and v.dtype is U8 for v in values)]


def same(graph: Program, *inputs: torch.Tensor) -> Program:
    made = signed(graph)
    for got, expected in zip(made(*inputs), graph(*inputs), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    return made


def flips(graph: Program) -> set[tuple[str, bool]]:
    """Which operands the kernels for sm_90 flip, and which they take as they are."""
    functions = [f for f in lower(graph, Target("cuda", "sm_90")).module.functions.values() if f.attrs and ATTRIBUTE in f.attrs]
    constants = [pair for f in functions for pair in triton_call(f).constants]
    return {(name, bool(value)) for name, value in constants if name.endswith("FLIP")}


def every_operator(p, x):
    q = gw.quantize(x, 0.03, 119, 3, 250, U8)
    framed = aten.constant_pad_nd.default(q, [1, 0, 0, 1], 119.0)
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


def moves(p, x):
    """Every operator that hands codes on, between a quantize and a linear layer or a constant's codes."""
    q = torch.cat([gw.quantize(x, 0.05, 131, 0, 255, U8), p.constant], 1)
    first, second = aten.split.Tensor(q, 3, 1)
    third, fourth = aten.split_with_sizes.default(aten.flip.default(first, [1]), [1, 2], 1)
    picked = aten.index.Tensor(q, [None, p.places]), aten.index_select.default(q, 1, p.places)
    large = aten.pixel_shuffle.default(aten.repeat.default(q[:, 2:], [1, 1, 1, 1]), 2).flatten(1)
    rows = [aten.unbind.int(v.flatten(2), 1)[0] for v in (*aten.chunk.default(second, 3, 1), third, fourth, *picked)]
    return [gw.scale(gw.linear(row, p.w, None, 131), p.s, -1) for row in rows], gw.dequantize(large, 0.05, 131)


def test_codes_that_are_split_picked_or_joined_with_constants_move():
    parameters = {"w": integers(-127, 128, 3, 16), "s": scales(1, 0.1), "constant": codes(2, 2, 4, 4)}
    x = normal(2, 4, 4, 4) * 3
    graph = program(moves, x, places=torch.tensor([3, 0, 3]), **parameters)
    made = same(graph, x)
    assert len(unsigned(graph)) > 20 and unsigned(made) == []
    assert [str(n.target) for n in made.nodes if n.op == "get_attr" and made.parameter(n).dtype is U8] == []


def test_codes_joined_with_another_type_stay():
    def graph(p, x):
        q, s = gw.quantize(x, 0.03, 119, 3, 250, U8), gw.quantize(x, 0.03, 0, -128, 127, S8)
        wide = torch.cat([q, s], 1).to(torch.int32)
        return wide, gw.dequantize(torch.cat([gw.quantize(x, 0.04, 9, 0, 255, U8), x > 0], 1)[:, 1:], 0.04, 9)

    x = normal(2, 4) * 3
    graph = program(graph, x)
    assert unsigned(same(graph, x)) == unsigned(graph)


def test_an_operator_by_name_or_with_its_defaults_left_out_stays():
    def graph(p, x):
        q = gw.quantize(x, 0.03, 119, 3, 250, U8)
        return gw.dequantize(aten.constant_pad_nd.default(q, [1, 1]), 0.03, 119)

    x = normal(2, 4) * 3
    graph = program(graph, x)
    assert unsigned(same(graph, x)) == unsigned(graph) and len(unsigned(graph)) == 2


# -- random programs ---------------------------------------------------------------------------------------------------------

SIZE = 4


class Draft:
    """A random program under construction, by drawn numbers: codes (1, SIZE, SIZE, SIZE) with their zero points.

    pins: whether some of them may have to stay u8 ones: the program takes or returns them, or an unknown operator reads them.
    """

    def __init__(self, choose, p, x, stream, pins: bool) -> None:
        self.choose, self.p, self.pins = choose, p, pins
        self.made = [(gw.quantize(x, 0.02 * (1 + choose(4)), *self.limits(), U8), self.zero_point)]
        self.made += [(stream, choose(256))] if pins else []
        self.returned = []

    def limits(self) -> tuple[int, int, int]:
        """Zero point and limits of a next result; the zero point may be a limit, as behind a ReLU."""
        low, high = self.choose(100), 255 - self.choose(100)
        self.zero_point = (low, high, low + self.choose(high - low + 1))[self.choose(3)]
        return self.zero_point, low, high

    def pick(self) -> tuple[torch.Tensor, int]:
        return self.made[self.choose(len(self.made))]

    def add(self, value: torch.Tensor, zero_point: int | None = None) -> None:
        self.made.append((value, self.zero_point if zero_point is None else zero_point))

    def rescaled(self, acc: torch.Tensor) -> None:
        if self.choose(2):
            self.add(gw.rescale(acc, self.p.s, *self.limits(), U8, 1))
        else:
            self.add(gw.rescale_dyadic(acc, self.p.m, self.p.h, *self.limits(), U8, 1))

    def step(self) -> None:
        x, z = self.pick()
        y, zy = self.pick()
        framed = aten.constant_pad_nd.default(x, [1, 0, 1, 0], z)
        (
            lambda: self.rescaled(gw.convolution(x, self.p.w, self.p.b, [1, 1], [1, 1], [1, 1], 1, z)),
            lambda: self.rescaled(gw.convolution(x, self.p.d, None, [1, 1], [1, 1], [1, 1], SIZE, z)),
            lambda: self.rescaled(gw.linear(x, self.p.v, None, z)),
            lambda: self.rescaled(gw.matmul(x, y.transpose(2, 3), z, zy)),
            lambda: self.rescaled(gw.multiply(x, y, z, zy)),
            lambda: self.rescaled(gw.sum_pool2d(framed, [2, 2], [1, 1], [0, 0], z)),
            lambda: self.rescaled(gw.sum(x, [2], True, z).expand(1, SIZE, SIZE, SIZE)),
            lambda: self.add(gw.add(x, y, 700000, -900000, 20, z, zy, *self.limits(), U8)),
            lambda: self.add(gw.lookup(x, self.p.table), self.choose(256)),
            lambda: self.add(gw.max_pool2d(x, [3, 3], [1, 1], [1, 1], [1, 1], False), z),
            lambda: self.add(torch.cat([x, y], 1)[:, 1 : SIZE + 1], z),
            lambda: self.add(x.permute(0, 2, 3, 1), z),
            lambda: self.add(gw.quantize(gw.dequantize(x, 0.1, z), 0.07, *self.limits(), U8)),
            lambda: self.returned.append(torch.bitwise_xor(x, y).to(torch.int32)),
            lambda: self.returned.append(x.contiguous()),
        )[self.choose(15 if self.pins else 13)]()


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.data())
def test_random_programs_compute_the_same(data):
    def choose(count: int) -> int:
        return data.draw(st.integers(0, count - 1))

    steps, pins = choose(8) + 2, bool(choose(2))

    def graph(p, x, stream):
        draft = Draft(choose, p, x, stream, pins)
        for _ in range(steps):
            draft.step()
        return [*draft.returned, *(gw.dequantize(value, 0.1, z) for value, z in draft.made[-3:])]

    w, d, v = integers(-127, 128, SIZE, SIZE, 3, 3), integers(-127, 128, SIZE, 1, 3, 3), integers(-127, 128, SIZE, SIZE)
    parameters = {"w": w, "d": d, "v": v, "b": integers(-999, 1000, SIZE, dtype=torch.int32), "s": scales(SIZE, 1e-3)}
    parameters |= {"m": integers(1 << 20, 1 << 21, SIZE, dtype=torch.int32), "h": torch.full((1,), 30, dtype=torch.int32)}
    x, stream = normal(1, SIZE, SIZE, SIZE) * 3, codes(1, SIZE, SIZE, SIZE)
    made = program(graph, x, stream, table=codes(256), **parameters)
    left = unsigned(same(made, x, stream))
    assert pins or any(map(borders_with_zeros, made.nodes)) or left == []


# -- what is faster unsigned --------------------------------------------------------------------------------------------------


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


# -- networks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "left"), [("resnet20", 30), ("mobilenetv2", 0), ("vit-tiny", 0)])
def test_no_unsigned_codes_are_left_in_a_network_but_those_that_zeros_border(model, left):
    source = resolve(model, dynamic_batch=True)
    graph = with_batch(quick_program(source, "int8"), 2)
    assert source.reference is not None
    columns = zip(*source.reference.calibration(2), strict=True)
    assert len(unsigned(same(graph, *(torch.cat(column)[:2] for column in columns)))) == left
    found = flips(graph)
    assert ("FLIP", False) in found and any(flipped for _, flipped in found) == (left > 0)


def test_codes_of_the_program_itself_are_flipped():
    graph = program(
        lambda p, x: gw.scale(gw.linear(x, p.w, None, 3), p.s, -1), codes(9, 64), w=integers(-9, 9, 32, 64), s=scales(1, 1)
    )
    assert flips(graph) == {("FLIP", True)}
