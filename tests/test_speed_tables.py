"""The tables of speed: what is kept between runs, how rows are laid out, what a cold start and a compilation report."""

import json
import os
import sys

import pytest
import torch
from graphwright.ir.errors import GraphwrightError, OptionError, UnknownNameError
from graphwright.tools.bench import interleave, latency, speed
from graphwright.tools.bench.cold_start import _start
from graphwright.tools.bench.compile_cost import peak_gib, reset_peak
from graphwright.tools.bench.latency import Timing, latency_rows, measure_latency
from graphwright.tools.bench.tables import app
from graphwright.tools.progress import silent
from graphwright.tools.quick import PRECISIONS, quick_program
from graphwright.tools.sources import resolve
from typer.testing import CliRunner


@pytest.fixture
def combinations(monkeypatch):
    """Measured (batch, threads) pairs; building and timing are replaced."""
    done = []

    def combination(folder, batch, threads, peers, rounds, seconds, progress):
        done.append((batch, threads))
        return [Timing("graphwright", "int8", batch, threads, 2.0, 1.0), Timing("ort", "", batch, threads, None, None, "absent")]

    monkeypatch.setattr(latency, "_combination", combination)
    monkeypatch.setattr(latency, "resolve", lambda *arguments, **options: None)
    monkeypatch.setattr(latency, "prepare", lambda *arguments: None)
    monkeypatch.setattr(latency, "quick_program", lambda *arguments: None)
    return done


def run(store, batches=(1, 8), threads=(1, 2), **options):
    return measure_latency("resnet20", batches, threads, ["ort"], store, silent, **options)


def test_finished_combinations_are_kept_and_an_interrupted_run_continues(combinations, tmp_path, monkeypatch):
    store = tmp_path / "kept" / "rows.json"
    assert len(run(store, threads=(2,))) == 4
    assert combinations == [(1, 2), (8, 2)]
    rows = run(store)
    assert combinations[2:] == [(1, 1), (8, 1)]
    assert [(t.batch, t.threads) for t in rows[::2]] == [(1, 1), (1, 2), (8, 1), (8, 2)]
    run(store)
    assert len(combinations) == 4
    run(store, fresh=True)
    assert len(combinations) == 8
    monkeypatch.setattr(latency, "machine", lambda: "another day")
    run(store)
    assert len(combinations) == 12


def test_an_unknown_peer_and_a_model_file_are_refused_before_any_work(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown peer 'otr'; did you mean 'ort'"):
        measure_latency("resnet20", [1], [1], ["otr"], tmp_path / "x.json", silent)
    with pytest.raises(OptionError, match="is a file, whose batch is fixed"):
        resolve("some.onnx", dynamic_batch=True)


def test_one_column_a_combination_with_the_ratio_to_ours():
    timings = [
        Timing("graphwright", "int8", 1, 1, 2.0, 1.5), Timing("ort", "float32", 1, 1, 5.0, 4.0),
        Timing("graphwright", "int8", 8, 1, 10.0, 9.0), Timing("ort", "float32", 8, 1, None, None, "failed"),
    ]  # fmt: skip
    head, body = latency_rows(timings, [1, 8], [1])
    assert head[2:] == ["batch 1, 1 threads", "batch 8, 1 threads"]
    assert body == [
        ["graphwright", "int8", "2.000 (1.00x)", "10.000 (1.00x)"],
        ["ort", "float32", "5.000 (2.50x)", "-"],
    ]


class SlowWorker:
    """A system that takes 200 ms a run and counts the runs it was asked for."""

    def __init__(self):
        self.asked = []

    def time(self, warm_up, runs):
        self.asked.append((warm_up, runs))
        return [200.0] * runs


def test_slow_systems_get_short_turns_and_the_time_limit_keeps_a_few_rounds(monkeypatch):
    monkeypatch.setattr("graphwright.tools.bench.SETTLE_SECONDS", 0.0)
    worker = SlowWorker()
    (times,) = interleave([worker], 20, silent, seconds=0.0)
    assert worker.asked[2:] == [(1, 1)] * 5
    assert times == [200.0] * 5


def test_the_same_program_serves_every_batch(tmp_path):
    source = resolve("resnet20", dynamic_batch=True)
    programs = {precision: quick_program(source, precision) for precision in PRECISIONS}
    latency.prepare(source, programs, 3, tmp_path, silent)
    from graphwright import load

    x = torch.cat(source.reference.calibration(3)[0])
    assert torch.equal(load(tmp_path / "int8.gw")(x), programs["int8"](x)[0])
    torch.testing.assert_close(load(tmp_path / "float.gw")(x), programs["float32"](x)[0], rtol=1e-4, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"float.onnx", "samples.npz", "float.gw", "int8.gw"}


def test_a_start_is_timed_from_the_outside_and_a_failure_is_named():
    process, load = _start(["/bin/sleep", "0.05"])
    assert process == load >= 50.0
    with pytest.raises(GraphwrightError, match="'ls' failed with status 2"):
        _start(["/bin/ls", "/no/such/folder"])


def test_peak_memory_is_counted_from_the_reset():
    block = bytearray(256 << 20)
    assert (high := peak_gib()) > 0.25
    del block
    reset_peak()
    assert peak_gib() < high - 0.2


def test_compile_reports_a_row_a_precision(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    done = CliRunner().invoke(app, ["compile", "resnet20"])
    assert done.exit_code == 0, done.output
    rows = [line.split("|")[1:-1] for line in done.output.splitlines() if line.startswith("| resnet20")]
    assert [row[1].strip() for row in rows] == ["int8", "float32"]
    assert all(0 < float(row[2]) < 300 and 0.1 < float(row[3]) < 8 for row in rows)


@pytest.mark.parametrize(("text", "wanted"), [("1,8, 32", [1, 8, 32]), ("2", [2])])
def test_lists_of_numbers(text, wanted):
    assert speed.numbers(text) == wanted


@pytest.mark.parametrize("text", ["", "1,,2", "0", "x"])
def test_wrong_lists_are_refused(text):
    with pytest.raises(OptionError, match="no list of whole numbers"):
        speed.numbers(text)


def test_profiles_print_as_markdown(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from graphwright.tools.bench import peaks as peaks_module

    monkeypatch.setattr(peaks_module, "SECONDS", 0.01)
    done = CliRunner().invoke(app, ["floors", "resnet20", "--threads", "1", "--rounds", "1", "--json", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| convolution_int8 | 16x28x28 -> 16x28x28, 3x3, pad 1 |" in done.output
    assert "| all kernels |" in done.output and "| outside kernels |" in done.output
    assert len(json.loads((tmp_path / "floors-resnet20-int8-1.json").read_text())["steps"]) > 20
