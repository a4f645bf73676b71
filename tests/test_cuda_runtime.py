"""CUDA programs without a GPU: what is launched, what the driver is asked for, and what the memory-bound kernels compute.

A driver written for these tests stands in for NVIDIA's. It runs emulations of the kernels that the TIR road generated, so whole
programs of them give the reference's bits through the real runtime; each runs in a process of its own, which finds that driver.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import numpy as np
import pytest
import runner
import torch
from graphwright.backends import nvidia
from graphwright.backends.artifact import Artifact
from graphwright.backends.base import Compiled
from graphwright.backends.target import LEVELS, Target
from graphwright.backends.tvm import target as targets
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.cuda import tir
from graphwright.ir.dialect import gw
from graphwright.ir.errors import TargetError
from graphwright.ir.program import Program
from integer_graphs import codes, normal, program

U8 = torch.uint8
SM90 = Target("cuda", "sm_90")

#: Runs a library of the folder in argv[1] on arrays in.*.npy, and prints what it was told to.
CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from graphwright.backends.tvm.executor import load_library, to_tvm
folder = Path(sys.argv[1])
run = load_library(folder / "model.so")
inputs = [np.load(p) for p in sorted(folder.glob("in*.npy"))]
for _ in range(2):
    outputs = run(*inputs)
for index, array in enumerate(outputs):
    np.save(folder / f"out{index}.npy", array)
if sys.argv[2] == "profile":
    print(json.dumps(run.profile([to_tvm(x) for x in inputs], [to_tvm(y) for y in run.empty_outputs()])))
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return cuda_emulation.fake_driver(tmp_path_factory.mktemp("driver"))


class Machine:
    """A folder with one program, and the process that runs it beside the driver of these tests."""

    def __init__(self, folder: Path, driver: Path, graph: Program, monkeypatch: pytest.MonkeyPatch, *inputs: torch.Tensor) -> None:
        self.folder, self.graph, self.inputs = folder, graph, inputs
        self.environment = {"FAKE_CUDA_LOG": str(folder / "log"), "LD_LIBRARY_PATH": str(driver.parent)}
        monkeypatch.setattr(tir, "compile_cubin", self._emulate)
        monkeypatch.setattr("graphwright.backends.tvm.cuda.nvcc.find_nvcc", lambda: "nvcc")
        self.compiled: Compiled = TVMBackend().compile(graph, SM90)
        (folder / "model.so").write_bytes(self.compiled.library)
        for index, x in enumerate(inputs):
            np.save(folder / f"in{index}.npy", x.numpy())

    def _emulate(self, source: str, arch: str) -> bytes:
        self.environment["FAKE_CUDA_KERNELS"] = str(cuda_emulation.emulate(source, self.folder))
        return b"\x7fELF" + arch.encode()

    def run(self, mode: str = "run", **changed: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment, "PYTHONPATH": ".link", **{k: str(v) for k, v in changed.items()}}
        command = [sys.executable, "-c", CHILD, str(self.folder), mode]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=runner.ROOT)

    def check(self) -> None:
        done = self.run()
        assert done.returncode == 0, done.stderr
        for index, expected in enumerate(self.graph(*self.inputs)):
            np.testing.assert_array_equal(np.load(self.folder / f"out{index}.npy"), expected.numpy())

    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def machine(tmp_path, driver, monkeypatch):
    return functools.partial(_machine, tmp_path, driver, monkeypatch)


def _machine(folder: Path, driver: Path, monkeypatch: pytest.MonkeyPatch, function, *inputs: torch.Tensor) -> Machine:
    return Machine(folder, driver, program(function, *inputs), monkeypatch, *inputs)


def pooled(_, x):
    q = gw.quantize(x, 0.05, 3, 0, 255, U8)
    return gw.dequantize(gw.max_pool2d(q, [3, 3], [2, 2], [1, 1], [1, 1], False), 0.05, 3)


# -- kernels -------------------------------------------------------------------------------------------------------------------


def test_windows_and_layouts_have_the_references_bits(machine):
    machine(pooled, normal(2, 3, 9, 11) * 4).check()


def test_sums_tables_and_movements_have_the_references_bits(machine):
    table = codes(256)

    def graph(_, x):
        q = gw.quantize(x, 0.03, 120, 0, 255, U8)
        looked = gw.lookup(q, table.to(q.device))
        total = gw.sum(looked, [2, 3], False, 7)
        rows = looked.flatten(2).transpose(1, 2)[:, 1:]
        both = gw.add(looked, q, 3, 5, 4, 7, 120, 100, 0, 255, U8)
        return gw.scale(total, torch.full((20,), 0.125), -1), gw.dequantize(rows, 0.1, 7), torch.cat([both, q], 1)

    machine(graph, normal(2, 20, 5, 7) * 3).check()


def test_dyadic_rescales_of_odd_shapes_have_the_references_bits(machine):
    def graph(_, x):
        q = gw.quantize(x, 0.02, 0, -128, 127, torch.int8)
        total = gw.sum(q, [1], True, 0)
        done = gw.rescale_dyadic(total, torch.tensor([1103515245]), torch.tensor([36]), 5, -128, 127, torch.int8, 0)
        return gw.dequantize(done, 0.5, 5)

    machine(graph, normal(3, 13, 7)).check()


# -- the runtime ---------------------------------------------------------------------------------------------------------------


def test_the_driver_is_asked_once_and_every_run_is_one_graph(machine):
    here = machine(pooled, normal(1, 3, 8, 8))
    here.check()
    names = [row.name for row in here.compiled.kernels]
    log = here.log()
    first, run = log.index("alloc " + log[1].split()[1]), ["upload 768", f"launch {len(names)}", "download 192", "synchronize"]
    assert log[:first] == ["module 1"] and [line.split()[1] for line in log if line.startswith("capture")] == names
    start = log.index(f"instantiate {len(names)}") + 1
    assert log[start : start + 8] == run + run and log[start + 8 :] == ["free", "unload", "release"]


def test_a_profile_times_every_launch(machine):
    done = machine(pooled, normal(1, 3, 8, 8)).run("profile")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1000.0] * 4  # the driver's clock ticks once an event


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"LD_LIBRARY_PATH": ""}, "this machine has no NVIDIA driver: libcuda.so.1 does not load"),
        ({"FAKE_CUDA_DEVICES": 0}, "device 0 is wanted and 0 are visible"),
        ({"FAKE_CUDA_CAPABILITY": 80}, "for sm_90, and device 0 (Fake GPU 0) is sm_80: build it for target cuda:sm_80"),
        ({"FAKE_CUDA_MEMORY": 100}, "bytes of device memory (64 of them weights); device 0 (Fake GPU 0) has 1000 of 2000 free"),
        ({"FAKE_CUDA_BROKEN": "max_pool2d"}, "kernel 'max_pool2d', fails: invalid argument (CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_what_goes_wrong_is_named(machine, changed, message):
    done = machine(pooled, normal(1, 3, 8, 8)).run(**changed)
    assert done.returncode != 0 and message in done.stderr, done.stderr


def test_gw_run_runs_the_artifact(machine, driver, monkeypatch):
    x = normal(1, 3, 8, 8)
    here = machine(pooled, x)
    path = here.folder / "model.gw"
    Artifact.build(here.graph, [here.compiled]).save(path)
    done = runner.gw_run(path, "--info")
    assert "cuda:sm_90: does not run here: this machine has no NVIDIA driver" in done.stdout
    done = runner.gw_run(path, "--input", here.folder / "in0.npy", "--output", here.folder / "out.npy")
    assert done.returncode == 4 and "cuda:sm_90 needs a GPU, and this machine has no NVIDIA driver" in done.stderr
    for name, value in here.environment.items():
        monkeypatch.setenv(name, value)
    done = runner.gw_run(path, "--input", here.folder / "in0.npy", "--output", here.folder / "out.npy", "--repeat", 2, "--profile")
    assert done.returncode == 0 and "1000.00 us  max_pool2d" in done.stdout, done.stderr
    np.testing.assert_array_equal(np.load(here.folder / "out.npy"), here.graph(x)[0].numpy())
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "89")
    done = runner.gw_run(path, "--input", here.folder / "in0.npy", "--output", here.folder / "out.npy")
    assert done.returncode == 4 and "this machine's GPU (Fake GPU 0) is sm_89" in done.stderr


# -- targets -------------------------------------------------------------------------------------------------------------------


def test_cuda_alone_is_what_this_machine_has(monkeypatch):
    for capability, level in ((90, "sm_90"), (89, "sm_89"), (87, "sm_86"), (80, "sm_80"), (75, "sm_90")):
        gpu = nvidia.Gpu("GPU", capability)
        monkeypatch.setattr(nvidia, "first_gpu", lambda gpu=gpu: gpu)
        assert Target.parse("cuda") == Target("cuda", level)
    with pytest.raises(TargetError, match=r"this machine's GPU \(GPU\) is sm_75; name a level: sm_90"):
        Target.parse("cuda:native")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("graphwright.backends.tvm.cuda.nvcc.find_nvcc", lambda: None)
    monkeypatch.setattr(nvidia, "first_gpu", lambda: "this process sees no NVIDIA GPU")
    rows = {str(row.target): row for row in targets.target_rows() if row.target.arch == "cuda"}
    assert list(rows) == [f"cuda:{level}" for level in LEVELS["cuda"]]
    for row in rows.values():
        assert not row.emits and not row.runs
        assert "'nvcc' is not on the PATH; install NVIDIA's CUDA toolkit" in row.missing and "sees no NVIDIA GPU" in row.missing
    with pytest.raises(TargetError, match="cannot compile for cuda:sm_90: 'nvcc' is not on the PATH"):
        TVMBackend().compile(program(pooled, normal(1, 3, 8, 8)), SM90)
