"""The tuning database, and that a row changes how a kernel is cut and never what it computes."""

import dataclasses

import numpy as np
import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm import tuning
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.kernels import convolution_f32, convolution_int8, linear_int8
from graphwright.backends.tvm.kernels.base import Convolution, Tail
from graphwright.backends.tvm.kernels.float_base import FloatSpec, fits
from graphwright.backends.tvm.kernels.gemm_int8 import Pixels
from graphwright.backends.tvm.kernels.isa import ISAS, isa_of
from graphwright.backends.tvm.kernels.tilings import Cut, cuts, tiling
from graphwright.backends.tvm.tuning import TuningDatabase, TuningRow, shipped_path, user_path
from graphwright.backends.tvm.tuning.families import FAMILIES, tuned
from graphwright.ir.errors import TuningError
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_cases import LEVELS, run

LINEAR = linear_int8.LinearInt8(9, 40, 70, "uint8", 3)
KEY = "linear_int8 uint8 9x40 -> 9x70"


def row(choice, key=KEY, level="portable", microseconds=1.0):
    return TuningRow(key, level, choice, microseconds, 2.0, 1, "some processor", "2026-01-31")


@st.composite
def products(draw):
    isa = isa_of(draw(st.sampled_from(sorted(ISAS))))
    columns = 16 * draw(st.integers(1, 40))
    ragged = draw(st.integers(0, 15))
    images, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.integers(1, 60))
    pixels = Pixels(images, height, width, 0, 0, 0, columns - ragged)
    cut = Cut(draw(st.integers(1, 99)), draw(st.integers(1, 99)), draw(st.integers(1, 99)), draw(st.booleans()))
    return isa, pixels, columns, cut


@given(products())
def test_any_cut_covers_every_panel_once_and_fits_the_registers(product):
    isa, pixels, columns, cut = product
    made = tiling(cut, pixels, columns, isa)
    covered = [p for s in made.segments for p in range(s.start, s.start + s.tiles * s.panels)]
    assert covered == list(range(columns // 16))
    for segment in made.segments:
        assert 1 <= segment.height <= pixels.height
        assert 1 <= segment.width <= pixels.width
        rows = segment.height * segment.width
        assert rows == 1 or rows * segment.panels + segment.panels + 1 <= isa.registers
    if pixels.pitch < columns:
        assert made.segments[-1] == dataclasses.replace(made.segments[-1], tiles=1, panels=1)


@given(products(), st.integers(1, 600))
def test_the_space_is_small_distinct_and_never_empty(product, steps):
    isa, pixels, columns, _ = product
    space = cuts(pixels, columns, steps, isa)
    assert 1 <= len(space) <= 24
    made = [tiling(cut, pixels, columns, isa) for cut in space]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=6, deadline=None)
@given(cut=st.builds(Cut, st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.booleans()), seed=st.integers(0, 2**32 - 1))
def test_a_convolution_is_the_same_bits_with_any_cut(level, cut, seed):
    rng = np.random.default_rng(seed)
    spec = convolution_int8.ConvolutionInt8(Convolution(1, 20, 7, 9, 40, (3, 3), (1, 1), (1, 1)), "uint8", 7)
    tail = Tail("none", "int32")
    weight = rng.integers(-128, 128, (40, 20, 3, 3)).astype(np.int8)
    x = rng.integers(0, 256, (1, 7, 9, 32)).astype(np.uint8)
    packed = convolution_int8.pack(spec, tail, level, weight, None)
    family = FAMILIES[convolution_int8.build]
    spec_with = family.chosen((spec, tail, level), dataclasses.asdict(cut))
    out = run(convolution_int8.build(*spec_with), level, [x, *packed], np.zeros((1, 7, 9, 48), np.int32))
    image = torch.from_numpy(x[..., :20].astype(np.int32).transpose(0, 3, 1, 2)) - 7
    expected = torch.nn.functional.conv2d(image.double(), torch.from_numpy(weight).double(), padding=1)
    assert np.array_equal(out[..., :40].transpose(0, 3, 1, 2), expected.numpy().astype(np.int32))


def test_float_choices_always_fit_the_register_file():
    shape = Convolution(1, 24, 14, 14, 100, (1, 1))
    family = FAMILIES[convolution_f32.convolution]
    for plain in (FloatSpec(), FloatSpec(level="portable"), FloatSpec(level="avx512-bf16", dtype="bfloat16")):
        spec = (shape, plain, False)
        assert str(family.key(spec)).endswith("24x14x14 -> 100x14x14, 1x1")
        space = family.space(spec)
        assert 4 < len(space) <= 32
        for choice in [*space, {"rows": 99, "groups": 99}, {"rows": 1, "groups": 99}]:
            tiled = family.chosen(spec, choice)[1]
            assert fits(tiled.machine, tiled.tile)


@pytest.mark.parametrize("level", ("fp16fml", "fullfp16"))
def test_choices_for_an_image_in_planes_fit_its_own_unit(level):
    spec = (Convolution(1, 3, 14, 14, 100, (3, 3)), FloatSpec(level=level, dtype="float16"), True)
    family = FAMILIES[convolution_f32.convolution]
    for choice in [*family.space(spec), {"rows": 99, "groups": 1}, {"rows": 1, "groups": 99}]:
        convolution_f32.convolution(*family.chosen(spec, choice))  # refuses what does not fit


def test_a_row_is_found_by_key_and_level_and_changes_only_the_tiling():
    spec = (LINEAR, Tail("none", "int32"), "portable")
    database = TuningDatabase([row({"panels": 1, "height": 1, "width": 3, "rows_outer": True})])
    found, key = tuned(linear_int8.build, spec, database)
    assert key == KEY
    assert found[:3] == spec and found[3].segments[0].width == 3 and found[3].rows_outer
    assert tuned(linear_int8.build, (*spec[:2], "avx512-vnni"), database) == ((*spec[:2], "avx512-vnni"), None)
    assert tuned(linear_int8.build, spec, TuningDatabase([row(None)])) == (spec, None)
    assert tuned(linear_int8.build, found, database) == (found, None)
    assert tuned(len, spec, database) == (spec, None)


def test_a_users_row_overrides_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package, mine = tmp_path / "package.jsonl", row({"rows": 1, "groups": 1})
    monkeypatch.setattr(tuning, "shipped_path", lambda arch: package)
    TuningDatabase([row(None), row(None, "another")]).write(package)
    assert len(TuningDatabase.of("x86")) == 2
    TuningDatabase().with_row(mine).write(user_path("x86"))
    assert TuningDatabase.of("x86").find(KEY, "portable") == mine
    assert len(TuningDatabase.of("x86")) == 2


def test_a_damaged_database_names_the_file_and_the_line(tmp_path):
    path = tmp_path / "x86.jsonl"
    TuningDatabase([row(None)]).write(path)
    path.write_text(path.read_text() + '{"key": "half a ro\n')
    with pytest.raises(TuningError, match=r"line 2 of .*x86\.jsonl"):
        TuningDatabase.read(path)


def test_every_shipped_row_names_a_tunable_family_and_was_worth_shipping():
    names = {family.name for family in FAMILIES.values()}
    for shipped in TuningDatabase.read(shipped_path("x86")).rows:
        assert shipped.key.split()[0] in names
        assert shipped.choice is None or shipped.microseconds < 0.97 * shipped.guess_microseconds


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(40, 70)

    def forward(self, x):
        return self.linear(x)


def test_the_artifact_names_the_rows_it_was_built_with():
    from graphwright.ir.capture import capture
    from graphwright.passes.manager import PassManager
    from graphwright.passes.pipeline import parse

    program = PassManager().run(capture(Small().eval(), torch.randn(9, 40)), parse("canonicalize")).program
    key = "linear_f32 9x40 -> 9x70"
    target = Target("x86", "avx2")
    plain = TVMBackend(TuningDatabase()).compile(program, target)
    assert plain.options["tuned"] == []
    with_row = TVMBackend(TuningDatabase([row({"rows": 2, "groups": 1}, key)])).compile(program, target)
    assert with_row.options["tuned"] == [key]
    assert plain.kernels == with_row.kernels
