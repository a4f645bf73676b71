"""Weight formats of float layers: every table against an independent definition, fitting, sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.passes.quantize.codebooks import CodebookFormat, parse_codebook
from graphwright.passes.quantize.formats import parse_format

TEXTS = ["int4g64", "uint3g32", "pot4", "pot4g16", "fp8e4m3", "fp8e5m2", "fp4e2m1", "fp6e3m2", "fp6e2m3g32", "pe4", "pe3g64"]


def form_of(text: str) -> CodebookFormat:
    form = parse_format(text)
    assert isinstance(form, CodebookFormat)
    return form


@pytest.mark.parametrize("text", TEXTS)
def test_a_format_prints_as_it_was_written(text):
    assert str(form_of(text)) == text


@pytest.mark.parametrize("text", ["int4g0", "int4g", "int9g8", "fp4", "fp4e2m2", "pot4e2m1", "uint4g-8", "pe1", "fp8e7m1x"])
def test_an_unknown_format_is_refused_with_the_known_ones(text):
    assert parse_codebook(text) is None
    with pytest.raises(OptionError, match="int4g64"):
        parse_format(text)


@pytest.mark.parametrize(("text", "dtype"), [("fp8e4m3", torch.float8_e4m3fn), ("fp8e5m2", torch.float8_e5m2)])
def test_fp8_is_what_torch_has(text, dtype):
    every = torch.arange(256).to(torch.uint8).view(dtype).to(torch.float32)
    table = form_of(text).table()
    assert torch.equal(torch.unique(every[every.isfinite()]), table)
    # Rounding too, ties included: the middles between all entries and random values.
    x = torch.cat([(table[1:].double() + table[:-1].double()).div(2).float(), torch.randn(5000) * 30])
    book = form_of(text).fit(torch.cat([x, table[-1:]])[None])
    assert book.scale.item() == 1.0
    assert torch.equal(book.dequantize(book.quantize(x[None]))[0], x.to(dtype).to(torch.float32))


@pytest.mark.parametrize(("e_bits", "m_bits"), [(2, 1), (3, 2), (2, 3), (3, 0), (1, 1), (4, 1), (3, 4)])
def test_minifloats_are_every_value_of_their_fields(e_bits, m_bits):
    bias = 2 ** (e_bits - 1) - 1
    values = set()
    for sign, e, m in itertools.product((-1, 1), range(2**e_bits), range(2**m_bits)):
        fraction = m / 2**m_bits
        values.add(sign * (fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias)) + 0.0)
    bits = 1 + e_bits + m_bits
    assert form_of(f"fp{bits}e{e_bits}m{m_bits}").table().tolist() == sorted(values)


def test_the_mx_formats_end_where_their_standard_says():
    assert [float(form_of(t).table()[-1]) for t in ("fp4e2m1", "fp6e3m2", "fp6e2m3")] == [6.0, 28.0, 7.5]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_powers_of_two(bits):
    table = form_of(f"pot{bits}").table().tolist()
    assert len(table) == 2**bits - 1 and table == [-v for v in reversed(table)]
    assert all(math.frexp(v)[0] in (0.0, 0.5) for v in table if v >= 0) and table[-1] == 1.0


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_a_power_exponent_table_is_uniform_under_its_power(bits):
    form = form_of(f"pe{bits}")
    table = form.table(0.5).double()
    steps = table.sign() * table.abs().sqrt() * (2 ** (bits - 1) - 1)
    assert torch.allclose(steps, steps.round(), atol=1e-6)
    assert torch.allclose(form.table(1.0) * (2 ** (bits - 1) - 1), form_of(f"int{bits}g4").table())


def test_the_exponent_follows_the_weight():
    generator = torch.Generator().manual_seed(0)
    bell, flat = torch.randn(64, 256, generator=generator), torch.rand(64, 256, generator=generator) * 2 - 1
    tables = {name: form_of("pe4").fit(w).table for name, w in (("bell", bell), ("flat", flat))}
    assert float(tables["bell"][8]) < 0.9 / 7 and float(tables["flat"][8]) > 0.9 / 7


@pytest.mark.parametrize("text", TEXTS)
def test_a_search_never_loses_to_the_largest_weight(text):
    weight = torch.randn(16, 5, 3, 3, generator=torch.Generator().manual_seed(1)) ** 3
    form = form_of(text)
    plain, searched = (form.fit(weight, search) for search in (False, True))
    errors = [(b.dequantize(b.quantize(weight)) - weight).square().sum() for b in (plain, searched)]
    assert errors[1] <= errors[0] * 1.0001


def test_groups_isolate_outliers():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    weight[:, 5] = 40.0
    errors = []
    for text in ("int4g128", "int4g16"):
        book = form_of(text).fit(weight)
        errors.append(float((book.dequantize(book.quantize(weight)) - weight).square().sum()))
    assert errors[1] < 0.2 * errors[0]


def test_all_zero_rows_stay_zero():
    for text in TEXTS:
        book = form_of(text).fit(torch.zeros(3, 40))
        assert not book.dequantize(book.quantize(torch.zeros(3, 40))).any()


def test_stored_bits_count_scales_and_tables():
    assert form_of("int4g64").stored_bits((10, 128)) == 10 * 128 * 4 + 10 * 2 * 32 + 15 * 32
    assert form_of("uint3g32").stored_bits((10, 33)) == 10 * 104 + 10 * 2 * 40 + 8 * 32
