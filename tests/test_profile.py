"""Floors, the rates they rest on, and the profile of a whole program."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import tvm
from graphwright.backends.base import KernelRow, example_inputs
from graphwright.backends.host import host_arch
from graphwright.backends.target import Target
from graphwright.backends.tvm import profile as profile_module
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.ir.capture import capture
from graphwright.ir.errors import UnknownNameError
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.tools.bench import peaks as peaks_module
from graphwright.tools.bench.peaks import Peaks, peaks
from graphwright.tools.bench.profile import Profile, Step, floor_of, kind_rows, profile, step_rows
from graphwright.tools.quick import check_precision

RATES = Peaks(
    "some processor", "avx512-vnni", 2, "2026-01-31", {"int8": 1000.0, "float32": 200.0},
    {"l2": 100.0, "l3": 20.0, "memory": 5.0}, {"l2": 1 << 20, "l3": 16 << 20},
)  # fmt: skip


def row(name="convolution_int81", macs=0, size=0, weights=0, dtype="uint8", kind="designed"):
    return KernelRow(name, ("node",), kind, macs, size, weights, dtype, "8x4x4 -> 8x4x4, 1x1")


def test_the_floor_is_the_larger_of_compute_and_memory():
    # 50 M multiply-accumulates are 100 M operations: 100 us at 1000 GOP/s. 1 MB from L2 takes 10 us.
    assert floor_of(row(macs=50_000_000, size=1_000_000), RATES, 0) == (pytest.approx(100.0), "int8")
    assert floor_of(row(macs=50_000_000, dtype="float32"), RATES, 0) == (pytest.approx(500.0), "float32")
    assert floor_of(row(macs=1000, size=1_000_000), RATES, 0) == (pytest.approx(10.0), "memory")


def test_weights_come_from_the_level_that_holds_all_of_them():
    kernel = row(size=1_100_000, weights=1_000_000)
    assert floor_of(kernel, RATES, 2 << 20)[0] == pytest.approx(1.0 + 10.0)  # two cores' second level
    assert floor_of(kernel, RATES, 3 << 20)[0] == pytest.approx(1.0 + 50.0)
    assert floor_of(kernel, RATES, 64 << 20)[0] == pytest.approx(1.0 + 200.0)


def test_a_type_without_a_unit_of_its_own_is_computed_in_float32():
    assert RATES.unit("bfloat16") == "float32"
    assert RATES.unit("int8") == RATES.unit("uint8") == "int8"


def test_byte_products_are_held_to_the_tile_unit_where_there_is_one():
    tiled = dataclasses.replace(RATES, units={**RATES.units, "int8-tiles": 8000.0})
    assert tiled.unit("int8") == "int8-tiles" and tiled.unit("float32") == "float32"
    assert floor_of(row(macs=50_000_000), tiled, 0) == (pytest.approx(12.5), "int8-tiles")


@pytest.mark.skipif(host_arch() != "x86", reason="x86 code")
def test_the_tile_kernel_compiles_for_amx_and_counts_right_in_the_emulation(monkeypatch):
    """Only a processor with AMX can run the rate kernel itself; the emulated unit runs the same loops."""
    target = Target("x86", "avx512-amx")
    assert peaks_module._compile(peaks_module._tile_kernel(2, target), target, ()) is not None
    monkeypatch.setattr(peaks_module, "STEPS", 3)
    monkeypatch.setattr("graphwright.backends.tvm.target.kernel_levels", lambda target: ("portable-tiles", "portable"))
    here = Target("x86", "avx2")
    out = np.zeros(2 * 1024, np.int32)
    arrays = [np.full(1024, 2, np.int8), np.full(1024, 3, np.int8), np.full(1024, 5, np.int32)]
    tensors = [tvm.runtime.tensor(array) for array in (*arrays, out)]
    peaks_module._compile(peaks_module._tile_kernel(2, here), here, ())(*tensors)
    assert np.array_equal(tensors[3].numpy(), np.full(2 * 1024, 5 + 3 * 64 * 6))


def test_rates_are_measured_once_and_measuring_again_keeps_the_better(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = iter([("int8", 900.0), ("int8", 800.0)])

    def measure(target, threads):
        unit, rate = next(measured)
        return Peaks("p", target.level, threads, "d", {unit: rate}, {"l2": 1000.0 / rate}, {"l2": 1, "l3": 2})

    monkeypatch.setattr(peaks_module, "_measure", measure)
    target = Target("x86", "avx2")
    first = peaks(target, 1)
    assert peaks(target, 1) == first
    second = peaks(target, 1, fresh=True)
    assert (second.units["int8"], second.bandwidth["l2"]) == (900.0, 1.25)
    assert len(json.loads((tmp_path / "graphwright" / "peaks.json").read_text())) == 1


@pytest.mark.skipif(host_arch() != "x86", reason="rates are measured on x86")
def test_measured_rates_are_ordered_as_any_machine_has_them(monkeypatch):
    monkeypatch.setattr(peaks_module, "SECONDS", 0.05)
    found = peaks_module._measure(Target.parse("cpu"), 1)
    assert set(found.units) >= {"int8", "float32"} and set(found.bandwidth) == {"l2", "l3", "memory"}
    assert all(rate > 0.1 for rate in (*found.units.values(), *found.bandwidth.values()))
    assert 1 << 16 <= found.caches["l2"] <= found.caches["l3"]


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 20, 3, padding=1)
        self.linear = torch.nn.Linear(20, 7)

    def forward(self, x):
        y = torch.nn.functional.gelu(self.convolution(x), approximate="tanh")
        return self.linear(y.mean((2, 3)))


def test_every_kernel_of_a_program_is_timed_in_place():
    program = PassManager().run(capture(Small().eval(), torch.randn(1, 3, 12, 12)), parse("canonicalize")).program
    compiled = TVMBackend().compile(program, Target.parse("cpu"))
    times = TVMBackend().profile(compiled, example_inputs(program), repeats=5, threads=RATES.threads)
    found = profile("small", "float32", compiled.kernels, times, RATES)
    assert [step.row for step in found.steps] == list(compiled.kernels)
    assert all(step.microseconds > 0 for step in found.steps) and found.total > 0
    convolution = next(step for step in found.steps if step.kind == "convolution_f32")
    assert convolution.row.shape == "3x12x12 -> 20x12x12, 3x3, pad 1"
    assert convolution.row.macs == 12 * 12 * 9 * 3 * 20
    assert convolution.row.dtype == "float32"
    # Weights of 27 rows and a bias, 32 lanes each.
    assert convolution.row.weights == 4 * 32 * 28
    json.dumps(found.to_json(), allow_nan=False)


def test_tables_name_kinds_without_their_numbers_and_sum_them():
    steps = (
        Step(row("convolution_int81"), 30.0, 10.0, "int8"),
        Step(row("convolution_int812"), 10.0, 10.0, "int8"),
        Step(row("max_pool2d1"), 5.0, 0.0, "memory"),
        Step(row("add.Tensor", kind="generic"), 5.0, 1.0, "memory"),
    )
    found = Profile("some", "int8", RATES, steps, 60.0)
    kinds = kind_rows(found)
    assert [line[:3] for line in kinds] == [
        ["convolution_int8", "2", "40.0"], ["max_pool2d", "1", "5.0"], ["add.Tensor", "1", "5.0"],
        ["all kernels", "4", "50.0"], ["outside kernels", "", "10.0"],
    ]  # fmt: skip
    assert step_rows(found)[0] == ["convolution_int8", "8x4x4 -> 8x4x4, 1x1", "30.0", "60.0%", "10.00", "int8", "3.0"]


def test_a_wrong_precision_is_named():
    with pytest.raises(UnknownNameError, match="unknown precision 'int7'; did you mean 'int8'"):
        check_precision("int7")


def test_functions_are_attributed_to_rows_and_a_missing_one_is_an_error():
    rows = [row("a"), row("embedding", kind="generic"), row("add.Tensor", kind="generic"), row("b")]
    spent = profile_module._by_row(rows, [("a", 1.0), ("cast", 2.0), ("take", 3.0), ("add", 4.0), ("b", 5.0)])
    assert spent == [1.0, 2.0, 7.0, 5.0]
    steps = [("a", 0), ("b_0", 1), ("b_1", 1), ("a", 2)]
    assert profile_module._calls(steps, [1.0, 2.0, 3.0, 4.0]) == [("a", 1.0), ("b", 5.0), ("a", 4.0)]
    with pytest.raises(RuntimeError, match="has kernel 'b'"):
        profile_module._by_row(rows[:1] + rows[3:], [("a", 1.0), ("c", 5.0)])
    with pytest.raises(RuntimeError, match="ran 2 functions"):
        profile_module._by_row(rows[:1], [("a", 1.0), ("c", 5.0)])
