"""`graphwright tune --rpc`: kernels built here, timed by another process behind TVM's tracker, which may die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from graphwright.backends.target import Target
from graphwright.backends.tvm.kernels import linear_int8
from graphwright.backends.tvm.kernels.base import Tail
from graphwright.backends.tvm.pipeline import import_llvm
from graphwright.backends.tvm.target import tvm_target
from graphwright.backends.tvm.tuning import TuningDatabase
from graphwright.backends.tvm.tuning import measure as measuring
from graphwright.backends.tvm.tuning.board import Board
from graphwright.ir.capture import capture
from graphwright.ir.errors import BoardError, OptionError
from graphwright.tools import tune as tuning
from graphwright.tools.cli import app
from graphwright.tools.quick import quick_program
from graphwright.tools.sources import Source
from runner import QEMU, build
from tvm import rpc
from typer.testing import CliRunner

HERE, KEY = Target.parse("cpu"), "board"


class Service:
    """What `python -m tvm.exec.rpc_tracker` and `rpc_server` run, in one process each where they take two."""

    def __init__(self, program: str, patch: str = "", **options: object) -> None:
        code = f"from tvm.rpc import server, tracker\n{patch}\n{program}('127.0.0.1', silent=True, **{options!r}).thread.join()"
        environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1", "OMP_NUM_THREADS": "1"}
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, start_new_session=True, stdout=devnull, stderr=devnull
        )

    def kill(self) -> None:
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tracker():
    port = free_port()
    service = Service("tracker.PopenTrackerServerState", port=port, port_end=port + 1)

    def up():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(up)
    yield f"127.0.0.1:{port}"
    service.kill()


def start_board(tracker: str, key: str = KEY, patch: str = "") -> Service:
    port = free_port()
    address = ("127.0.0.1", int(tracker.rpartition(":")[2]))
    service = Service("server.PopenRPCServerState", patch, port=port, port_end=port + 1, tracker_addr=address, key=key)
    wait_for(lambda: f"server:{key}" in {entry["key"] for entry in rpc.connect_tracker(*address).summary()["server_info"]})
    return service


def emulated_loop(folder: Path) -> str:
    """The patch that has each session served by TVM's AArch64 runtime, under qemu: its wheel has no server but Python's."""
    libraries, program = build("aarch64").parent, folder / "rpc_loop"
    compiler = ["aarch64-linux-gnu-g++", "-std=c++17", "-O1", "-isystem", libraries / "include"]
    links = [f"-L{libraries}", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", f"-Wl,-rpath,{libraries}"]
    subprocess.run([*compiler, Path(__file__).with_name("rpc_loop.cc"), "-o", program, *links], check=True)
    command = [*QEMU, "-cpu", "cortex-a72", str(program)]
    return f"""
import subprocess
def serve(sock, load_library, work_path):
    subprocess.run([*{command!r}, str(sock.fileno()), work_path.path], pass_fds=[sock.fileno()], check=True)
server._serve_loop = serve"""


@pytest.fixture(scope="module")
def board(tracker):
    service = start_board(tracker)
    yield service
    service.kill()


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(20, 40), torch.nn.Linear(40, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def program():
    return quick_program(Source(capture(Small().eval(), torch.randn(3, 20))), "int8")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(measuring, "BATCH_SECONDS", 1e-6)
    monkeypatch.setattr(measuring, "FINAL_ROUNDS", 1)


def test_the_command_measures_on_the_board(tracker, board, short, tmp_path):
    path, rows = tmp_path / "small.pt2", tmp_path / "rows.jsonl"
    torch.export.save(torch.export.export(Small().eval(), (torch.randn(3, 20),)), path)
    options = ["--rpc", tracker, "--key", KEY, "--database", str(rows), "--no-compare", "--precision", "float32"]
    done = CliRunner().invoke(app, ["tune", str(path), *options])
    assert done.exit_code == 0, done.output
    assert "2 kernels measured, 0 had rows" in done.output and {r.machine for r in TuningDatabase.read(rows).rows} == {
        "board (rpc)"
    }


def test_a_board_runs_what_this_machine_runs(tracker, board):
    spec = linear_int8.LinearInt8(3, 20, 40, "uint8", 3), Tail("none", "int32"), "portable"
    connected = Board(tracker, KEY)
    function = linear_int8.build(*spec).with_attr("global_symbol", "kernel0")
    library = tvm.compile(tvm.transform.Sequential([import_llvm])(tvm.IRModule({"kernel0": function})), target=tvm_target(HERE))
    arrays = measuring._arrays(function)
    module = connected.load(measuring.shared_library(library, HERE))
    there = [connected.tensor(array) for array in arrays]
    (here,) = measuring._operands(arrays)[:1]
    assert len(connected.time(module, "kernel0", there, 3)) == 3
    library["kernel0"](*here)
    assert np.array_equal(there[-1].numpy(), here[-1].numpy()) and here[-1].numpy().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rpc", "127.0.0.1:9190"], "--rpc and --key belong together"),
        (["--key", "rpi4"], "--rpc and --key belong together"),
        (["--rpc", "rpi4", "--key", "rpi4"], "write HOST:PORT"),
        (["--rpc", "127.0.0.1:9190", "--key", "gpu", "--target", "cuda:sm_90"], "on processors"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, message):
    done = CliRunner().invoke(app, ["tune", "resnet20", *arguments])
    assert isinstance(done.exception, OptionError) and message in str(done.exception)


def test_no_tracker_no_board_and_too_many_threads(tracker, board):
    nobody = f"127.0.0.1:{free_port()}"
    with pytest.raises(BoardError, match=f"no RPC tracker answers at {nobody} .* tvm.exec.rpc_tracker"):
        Board(nobody, KEY)
    with pytest.raises(
        BoardError, match=rf"no board of key 'rpi4' .* \(registered: {KEY}\); .* tvm.exec.rpc_server .* --key rpi4"
    ):
        Board(tracker, "rpi4")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(5)

        def answer():
            connection, _ = listener.accept()
            connection.sendall(b"HTTP")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(BoardError, match="is no RPC tracker"):
            Board(f"127.0.0.1:{listener.getsockname()[1]}", KEY)


def test_an_aarch64_board_runs_and_times_what_is_built_here(tracker, program, short, tmp_path):
    target, rows = Target.parse("arm64:cortex-a72"), tmp_path / "rows.jsonl"
    service = start_board(tracker, "rpi4", emulated_loop(tmp_path))
    try:
        board = Board(tracker, "rpi4", threads=1)
        outcome = tuning.tune(tuning.kernels_of(program, target)[1:], target, board.threads, rows, board=board)
        assert [(row.level, row.machine) for row in outcome.measured] == [("neon", "rpi4 (rpc)")]
        # Code for a core that has more than the board kills the server's process, and says so.
        modern = Target.parse("arm64:neoverse-v1")
        with pytest.raises(BoardError, match="'rpi4' .* may lack instructions of the target"):
            tuning.tune(tuning.kernels_of(program, modern)[1:], modern, 1, rows, board=board)
        assert len(TuningDatabase.read(rows)) == 1
    finally:
        service.kill()


def test_a_board_lost_in_the_middle_keeps_its_rows_and_a_second_run_goes_on(
    tracker, board, program, short, tmp_path, monkeypatch
):
    path, kernels = tmp_path / "rows.jsonl", tuning.kernels_of(program, HERE)
    assert len(kernels) == 2
    first = Board(tracker, KEY, threads=1)
    assert (first.threads, first.name) == (1, "board (rpc)")
    choose, measured = measuring._choose, []

    def choose_and_kill(candidates, timer):
        if measured:
            board.kill()
        measured.append(len(candidates))
        return choose(candidates, timer)

    monkeypatch.setattr(measuring, "_choose", choose_and_kill)
    with pytest.raises(BoardError, match=rf"'{KEY}' at {tracker} was lost .* measuring .* start the server again and repeat"):
        tuning.tune(kernels, HERE, 1, path, board=first)
    (kept,) = TuningDatabase.read(path).rows
    assert (kept.key, kept.machine) == (kernels[0].key, "board (rpc)") and 0 < kept.microseconds <= kept.guess_microseconds
    monkeypatch.setattr(measuring, "_choose", choose)

    again = start_board(tracker)
    try:
        second = Board(tracker, KEY)
        outcome = tuning.tune(kernels, HERE, 1, path, board=second)
        assert [row.key for row in outcome.measured] == [kernels[1].key]
        assert (outcome.kept, outcome.remaining) == (1, 0) and len(TuningDatabase.read(path)) == 2
        both = tuning.end_to_end(program, HERE, 1, path, rounds=1, board=second)
        assert 0 < both.tuned[0] <= both.tuned[1] and both.guess[0] > 0
    finally:
        again.kill()
