"""Plans for a target that does not run here, priced by kernel times recorded elsewhere."""

from __future__ import annotations

import json
import re

import pytest
import torch
from graphwright.backends.base import Compiled, KernelRow
from graphwright.backends.target import Target
from graphwright.backends.tvm.tuning import latency
from graphwright.ir.errors import TuningError
from graphwright.tools.bit_search import BitSearch
from graphwright.tools.optimize import optimize
from graphwright.tools.report import ConstraintError
from torch import nn

ROW = KernelRow("convolution_int829", ("a",), "designed", 9, 100, 50, "uint8", "3x8x8 -> 4x8x8, 3x3")
SM90 = Target("cuda", "sm_90")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of this test's own, and how to write it."""
    path = tmp_path / "latency.jsonl"
    monkeypatch.setattr(latency, "path_of", lambda arch: path)

    def put(*rows: latency.LatencyRow):
        latency.write(path, rows)
        latency._table.cache_clear()
        return path

    yield put
    latency._table.cache_clear()


def recorded(row: KernelRow, microseconds: float) -> latency.LatencyRow:
    return latency.LatencyRow(latency.kernel_key(row), "sm_90", microseconds, "GPU", "2026-01-01")


def test_a_program_takes_the_sum_of_its_kernels(table):
    narrow = KernelRow(ROW.name, ROW.nodes, ROW.kind, ROW.macs, 75, 25, ROW.dtype, ROW.shape)
    table(recorded(ROW, 9.0), recorded(narrow, 3.0), recorded(ROW, 2.5))  # the later row of a kernel holds
    times = latency.recorded(Compiled(SM90, b"", (ROW, narrow, ROW)))
    assert times is not None and times.microseconds == (2.5, 3.0, 2.5) and times.total == 8.0


def test_a_kernel_that_was_never_measured_leaves_no_time(table):
    table(recorded(ROW, 2.5))
    other = KernelRow("pool", ("b",), "designed", bytes=7)
    assert latency.recorded(Compiled(SM90, b"", (ROW, other))) is None
    assert latency.recorded(Compiled(Target("cuda", "sm_80"), b"", (ROW,))) is None


def test_another_table_is_another_version(table):
    table(recorded(ROW, 2.5))
    before = latency.version("cuda")
    path = table(recorded(ROW, 2.4))
    assert latency.version("cuda") != before
    path.write_text(path.read_text() + json.dumps({"kernel": "x"}) + "\n")
    latency._table.cache_clear()
    with pytest.raises(TuningError, match="line 2 of the latency table"):
        latency.version("cuda")


class ByWeights(dict):
    """Takes a microsecond for each byte of weights, as where memory is the limit."""

    def get(self, key, default=None):
        found = re.search(r"; (\d+) of \d+ bytes are weights", key[1])
        return float(found.group(1)) if found else default


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 32)).eval()


def test_a_latency_limit_is_met_by_recorded_times(monkeypatch):
    """The target is another machine's: nothing runs, and layers get four bits until the recorded times are within the limit."""
    monkeypatch.setattr(latency, "_table", lambda arch: (ByWeights(), "by weights"))
    x = torch.randn(8, 3, 8, 8)
    search = BitSearch(formats=("int8", "int4"), scorer="sqnr")
    result = optimize(
        network(),
        "arm64:cortex-a53",
        example_inputs=x[:1],
        calibration=[x],
        constraints={"latency": 0.2},
        search=search,
    )
    before, after = result.report.rows
    assert before.latency_ms and after.latency_ms and after.latency_ms <= 0.2 * before.latency_ms
    assert set(result.plan.search["layers"].values()) == {"int8", "int4"}
    assert any("sum of its kernels' times" in note for note in result.report.notes)


def test_without_recorded_times_a_latency_limit_says_so():
    x = torch.randn(8, 3, 8, 8)
    with pytest.raises(ConstraintError, match="times are recorded"):
        optimize(network(), "arm64:cortex-a53", example_inputs=x[:1], calibration=[x], constraints={"latency": 0.2}, search=None)
