"""CUDA programs without a GPU: what is launched, what the driver is asked for, and what the memory-bound kernels compute.

A driver written for these tests stands in for NVIDIA's. It runs emulations of the kernels that the TIR road generated, so whole
programs of them give the reference's bits through the real runtime; each runs in a process of its own, which finds that driver.
"""

from __future__ import annotations

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
from graphwright.backends.loader import load
from graphwright.backends.target import LEVELS, Target
from graphwright.backends.tvm import target as targets
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.cuda import overlap, tir
from graphwright.ir.dialect import gw
from graphwright.ir.errors import ArtifactError, TargetError, UnsupportedOpError
from graphwright.ir.program import Program
from integer_graphs import normal, program, scales

U8 = torch.uint8
SM90 = Target("cuda", "sm_90")

#: Runs the library of the folder in argv[1] twice on its in*.npy, and prints a profile; before that, what goes wrong under each
#: of the settings in argv[2].
CHILD = """
import json, os, sys
from pathlib import Path
import numpy as np
from graphwright.backends.tvm.executor import load_library, to_tvm
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
run = load_library(folder / "model.so")
inputs = [np.load(p) for p in sorted(folder.glob("in*.npy"))]
messages = []
for name, value in settings:
    os.environ[name] = value
    try:
        run(*inputs)
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
    del os.environ[name]
Path(os.environ["FAKE_CUDA_LOG"]).unlink(missing_ok=True)
for _ in range(2):
    outputs = run(*inputs)
for index, array in enumerate(outputs):
    np.save(folder / f"out{index}.npy", array)
log = Path(os.environ["FAKE_CUDA_LOG"]).read_text().splitlines()
times = run.profile([to_tvm(x) for x in inputs], [to_tvm(y) for y in run.empty_outputs()])
print(json.dumps([messages, log, times]))
"""


#: Calls the artifact in argv[1] with tensors that say they are on a GPU, on three streams in turn, and with some that do not fit.
#: A GPU's memory is this process's, as the driver of these tests has it.
DEVICE_CHILD = """
import json, os, sys
from pathlib import Path
import numpy as np, torch
from graphwright.backends import loader, nvidia
from graphwright.backends.tvm import abi

class OnDevice(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda, device = True, torch.device("cuda", 0)
    def get_device(self): return self.device.index
    def new_empty(self, shape, dtype): return torch.empty(shape, dtype=dtype).as_subclass(OnDevice)

class OnOther(OnDevice):
    device = torch.device("cuda", 1)

loader.missing_to_run = lambda level: ""
model, (left, right) = loader.load(sys.argv[1]), [torch.from_numpy(np.load(path)) for path in sys.argv[2:]]
messages = []
for inputs in ((left.as_subclass(OnDevice), right), (left, right.as_subclass(OnDevice)),
               (left.as_subclass(OnDevice), right.as_subclass(OnOther))):
    try:
        model(*inputs)
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
expected, equal = model(left, right), []
log = Path(os.environ["FAKE_CUDA_LOG"])
def lines():
    found = log.read_text().splitlines()
    log.unlink()
    return found
log.unlink()
abi.set_stream(0, 3)
for stream in (0, 7, 7, 0):
    torch._C._cuda_getCurrentRawStream = lambda index, stream=stream: stream
    out = model(left.as_subclass(OnDevice), right.mT.contiguous().mT.as_subclass(OnDevice))
    equal.append(type(out) is OnDevice and torch.equal(out.as_subclass(torch.Tensor), expected))
    equal.append(abi.set_stream(0, 3) == 3)
streams = lines()
def again(x, y, out):
    # A run on these tensors; out: of the result. Returns what the driver was told.
    model._run.run_on_device([t.as_subclass(OnDevice) for t in (x, y)], [out.as_subclass(OnDevice)])
    equal.append(torch.equal(out, expected))
    return [*lines(), ""]
out, shifted, second = torch.empty_like(expected), torch.empty(left.numel() + 1), right.clone()
shifted = shifted[1:].reshape(left.shape).copy_(left)
placed = [again(left, right, out), again(left, right, out), again(left, second, out), again(shifted, second, out)]
placed += [again(left, second, second), again(left, right, left)]
print(json.dumps([messages, equal, streams, placed]))
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return cuda_emulation.fake_driver(tmp_path_factory.mktemp("driver"))


class Machine:
    """A folder with one program, and the process that runs it beside the driver of these tests."""

    def __init__(self, folder: Path, driver: Path, graph: Program, *inputs: torch.Tensor) -> None:
        self.folder, self.graph, self.inputs = folder, graph, inputs
        self.environment = {"FAKE_CUDA_LOG": str(folder / "log"), "LD_LIBRARY_PATH": str(driver.parent)}
        with pytest.MonkeyPatch.context() as patch:  # nvcc is not needed for what these machines run
            patch.setattr(tir, "compile_cubin", self._emulate)
            patch.setattr(targets, "missing_nvcc", lambda level: "")
            self.compiled: Compiled = TVMBackend().compile(graph, SM90)
        (folder / "model.so").write_bytes(self.compiled.library)
        for index, x in enumerate(inputs):
            np.save(folder / f"in{index}.npy", x.numpy())

    def _emulate(self, source: str, arch: str) -> bytes:
        self.environment["FAKE_CUDA_KERNELS"] = str(cuda_emulation.emulate(source, self.folder))
        return b"\x7fELF" + arch.encode()

    def run(self, *settings: tuple[str, str], **changed: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment, "PYTHONPATH": ".link", **changed}
        command = [sys.executable, "-c", CHILD, str(self.folder), json.dumps(settings)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=runner.ROOT)

    def check(self, *settings: tuple[str, str]) -> tuple[list[str], list[str], list[float]]:
        """Compares with the reference. Returns what went wrong under each setting, the log of two runs, and a profile."""
        done = self.run(*settings)
        assert done.returncode == 0, done.stderr
        for index, expected in enumerate(self.graph(*self.inputs)):
            np.testing.assert_array_equal(np.load(self.folder / f"out{index}.npy"), expected.numpy())
        messages, log, times = json.loads(done.stdout)
        return messages, log, times


@pytest.fixture(scope="module")
def machine(tmp_path_factory, driver):
    def made(function, *inputs: torch.Tensor, **parameters: torch.Tensor) -> Machine:
        return Machine(tmp_path_factory.mktemp("machine"), driver, program(function, *inputs, **parameters), *inputs)

    return made


@pytest.fixture(scope="module")
def pool(machine) -> Machine:
    return machine(pooled, normal(2, 3, 9, 11) * 4)


def pooled(_, x):
    q = gw.quantize(x, 0.05, 3, 0, 255, U8)
    return gw.dequantize(gw.max_pool2d(q, [3, 3], [2, 2], [1, 1], [1, 1], False), 0.05, 3)


# -- kernels -------------------------------------------------------------------------------------------------------------------


def test_sums_and_movements_have_the_references_bits(machine):
    def graph(p, x):
        q = gw.quantize(x, 0.03, 120, 0, 255, U8)
        total = gw.sum(q, [2, 3], False, 7)
        rows = q.flatten(2).transpose(1, 2)[:, 1:]
        both = gw.add(q, gw.quantize(x, 0.05, 100, 0, 255, U8), 3, 5, 4, 7, 120, 100, 0, 255, U8)
        extremes = torch.amax(x, [2, 3]), torch.amin(x, -1, True), torch.amax(q, 1)
        return gw.scale(total, p.scale, -1), gw.dequantize(rows, 0.1, 7), torch.cat([both, q], 1), *extremes

    machine(graph, normal(2, 20, 5, 7) * 3, scale=scales(20, 0.1)).check()


def test_dyadic_rescales_of_odd_shapes_have_the_references_bits(machine):
    def graph(p, x):
        q = gw.quantize(x, 0.02, 0, -128, 127, torch.int8)
        total = gw.sum(q, [1], True, 0)
        done = gw.rescale_dyadic(total, p.multiplier, p.shift, 5, -128, 127, torch.int8, 0)
        return gw.dequantize(done, 0.5, 5)

    constants = {"multiplier": torch.tensor([1103515245], dtype=torch.int32), "shift": torch.tensor([36], dtype=torch.int32)}
    machine(graph, normal(3, 13, 7), **constants).check()


def test_chains_of_element_wise_ops_are_one_kernel_with_the_references_bits(machine):
    """Rows of a table, broadcasts, limits, quotients, roots, and a value that two read."""
    ids, x = torch.tensor([[3, 0, 7], [1, 8, 8]]), normal(2, 3, 5)

    def graph(p, ids, x):
        rows = torch.nn.functional.embedding(ids, p.table) + p.place + x
        q = gw.quantize(rows * 2.0, 0.05, 0, -128, 127, torch.int8)
        ratio = torch.clamp(x, -0.5, 0.75) / p.place
        norm = torch.clamp(gw.square_root(ratio * ratio), min=0.25).expand(2, 3, 5)
        mask = (1.0 - (ids > 1).to(torch.float32)) * -10000.0
        return gw.dequantize(q, 0.05, 0), (ratio - x) / norm, mask

    here = machine(graph, ids, x, table=normal(9, 5), place=normal(1, 1, 5).abs() + 0.5)
    here.check()
    names = [row.name for row in here.compiled.kernels]
    assert "gather_add_add_mul" in names and "cast_sub_mul" in names and len(names) < 8


# -- the runtime ---------------------------------------------------------------------------------------------------------------


#: What to set, and what the run then says.
FAILURES = {
    ("FAKE_CUDA_DEVICES", "0"): "(sm_90); device 0 is wanted and 0 are visible",
    ("FAKE_CUDA_CAPABILITY", "80"): "sm_90, and device 0 (Fake GPU 0) is sm_80: build it for target cuda:sm_80",
    ("FAKE_CUDA_MEMORY", "100"): "bytes of device memory (64 of them weights); device 0 (Fake GPU 0) has 1000 of 2000 free",
    (
        "FAKE_CUDA_BROKEN",
        "gw_max_pool2d",
    ): "kernel 'gw_max_pool2d', fails: invalid argument (CUDA_ERROR_INVALID_VALUE, CUDA error 1)",
}


def test_failures_are_named_then_every_run_is_one_graph(pool):
    """The program recovers from each failure; then its windows and layouts have the reference's bits."""
    messages, log, times = pool.check(*FAILURES)
    for message, expected in zip(messages, FAILURES.values(), strict=True):
        assert expected in message
    assert messages[0].startswith("RuntimeError: ") and messages[2].startswith("MemoryError: ")
    names = [row.name for row in pool.compiled.kernels]
    run = ["upload 2376", f"launch {len(names)}", "download 720", "synchronize"]
    assert log[0] == "module 1" and log[1].startswith("alloc ") and log[2:4] == ["upload 64", "synchronize"]
    assert [line.split()[1] for line in log if line.startswith("capture")] == [f"gw_{name}" for name in names]
    assert log[log.index(f"instantiate {len(names)}") + 1 :] == run + run
    assert times == [1000.0] * len(names)  # the driver's clock ticks once an event
    assert (pool.folder / "log").read_text().splitlines()[-3:] == ["free", "unload", "release"]


def test_every_launch_but_the_first_may_overlap_the_one_before_it(machine):
    """On drivers that record such launches; profiles, and older drivers, order launches one behind the other."""
    here = machine(lambda _, x: pooled(_, pooled(_, x)), normal(2, 3, 9, 11) * 4)
    _, log, _ = here.check()
    names = [line.split()[1] for line in log if line.startswith("capture")]
    assert len(names) > 1 and [line.split()[1] for line in log if line.startswith("overlap")] == names[1:]
    assert (here.folder / "log").read_text().count("overlap") == len(names) - 1  # and none in the profile
    done = here.run(FAKE_CUDA_VERSION="12020")
    assert done.returncode == 0 and "overlap" not in (here.folder / "log").read_text()


def test_kernels_start_by_waiting_for_the_one_before_where_the_chip_can(tmp_path):
    source = """extern "C" __global__ void f(float* x);
extern "C" __global__ void __launch_bounds__(32) f(float* x) {
  x[0] = 1;
}
"""
    assert overlap.in_source(source).count(overlap.WAIT) == 1
    assert f'{{\n  asm volatile("{overlap.WAIT}"' in overlap.in_source(source)
    ptx = ".visible .entry f(\n.param .u64 f_0\n)\n.reqntid 64\n{\n\t.reg .b32 %r<2>;\n\tret;\n}\n"
    assert overlap.in_ptx(ptx).index(overlap.WAIT) < ptx.index(".reg") + len(overlap.WAIT)
    with pytest.raises(RuntimeError, match="2 kernels"):
        overlap.in_ptx(ptx + ptx)
    assert [level for level in LEVELS["cuda"] if overlap.overlaps(level)] == ["sm_90"]


@pytest.mark.parametrize(
    ("shape", "reason"), [((2, 3, 9, 11), "only known as it runs"), ((2, 3), "computed between them on the host")]
)
def test_kernels_that_the_host_steers_are_refused(shape, reason):
    """TVM's scans: a cumulative sum along an inner axis counts its threads as it runs, a small one its rounds on the host."""
    with pytest.raises(UnsupportedOpError, match=f"cumsum.*{reason}"):
        TVMBackend().compile(program(lambda _, x: torch.cumsum(x, 1) + 1.0, normal(*shape)), SM90)


def test_tensors_on_the_gpu_stay_there_and_go_to_torchs_stream(machine, tmp_path):
    """Each call is queued on the current stream, behind the run before it where that was on another, and waits for nothing."""
    here = machine(lambda _, x, y: torch.relu(x) + y, normal(1, 3, 5), normal(1, 3, 5))
    Artifact.build(here.graph, [here.compiled]).save(tmp_path / "model.gw")
    command = [sys.executable, "-c", DEVICE_CHILD, tmp_path / "model.gw", here.folder / "in0.npy", here.folder / "in1.npy"]
    environment = {**os.environ, **here.environment, "PYTHONPATH": ".link"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=runner.ROOT)
    assert done.returncode == 0, done.stderr
    messages, equal, log, placed = json.loads(done.stdout)
    assert [message.split(" is ")[1] for message in messages] == [
        "on cpu; move it to cuda:0",
        "on cuda:0; move it to cpu",
        "on cuda:1; move it to cuda:0",
    ]
    assert all(message.startswith("DataError: input '") for message in messages) and all(equal)
    launch = f"launch {len(here.compiled.kernels)}"
    assert [line for line in log if not line.startswith("bind")] == [
        *(launch, "record", "stream 7", "wait", launch, "record"),
        *("wait", launch, "record", "stream 0", "wait", launch),
    ]
    # Tensors that stay where they are cost nothing; another one is bound to the kernels that read it; those at odd addresses, and
    # outputs that are inputs, too, are copied.
    first, same, other, odd, on_second, on_first = ([line.split()[0] for line in lines if line] for lines in placed)
    assert same == ["launch"] and set(first) == set(other) == {"bind", "launch"}
    assert odd.count("move") == 1 and odd.index("move") < odd.index("launch")
    assert on_second[-2:] == on_first[-2:] == ["launch", "move"]


def test_a_machine_without_a_driver_is_told_so(pool):
    done = pool.run(LD_LIBRARY_PATH="")
    assert done.returncode != 0 and "this machine has no NVIDIA driver: libcuda.so.1 does not load" in done.stderr


def test_gw_run_runs_the_artifact(pool, tmp_path, monkeypatch):
    here, path = pool, tmp_path / "model.gw"
    Artifact.build(here.graph, [here.compiled]).save(path)
    done = runner.gw_run(path, "--info")
    assert "cuda:sm_90: does not run here: this machine has no NVIDIA driver" in done.stdout
    done = runner.gw_run(path, "--input", here.folder / "in0.npy", "--output", tmp_path / "out.npy")
    assert done.returncode == 4 and "cuda:sm_90 needs a GPU, and this machine has no NVIDIA driver" in done.stderr
    for name, value in here.environment.items():
        monkeypatch.setenv(name, value)
    done = runner.gw_run(path, "--input", here.folder / "in0.npy", "--output", tmp_path / "out.npy", "--repeat", 2, "--profile")
    assert done.returncode == 0 and "1000.00 us  max_pool2d" in done.stdout, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), here.graph(*here.inputs)[0].numpy())
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "89")
    done = runner.gw_run(path, "--input", here.folder / "in0.npy", "--output", tmp_path / "out.npy")
    assert done.returncode == 4 and "this machine's GPU (Fake GPU 0) is sm_89" in done.stderr


def test_loading_an_artifact_names_what_this_machine_lacks(pool, tmp_path, monkeypatch):
    Artifact.build(pool.graph, [pool.compiled]).save(tmp_path / "model.gw")
    nvidia.first_gpu.cache_clear()
    with pytest.raises(ArtifactError, match="cuda:sm_90 needs a GPU, and this machine has no NVIDIA driver"):
        load(tmp_path / "model.gw")
    monkeypatch.setattr(nvidia, "first_gpu", lambda: nvidia.Gpu("Older GPU", 80))
    with pytest.raises(ArtifactError, match=r"this machine's GPU \(Older GPU\) is sm_80"):
        load(tmp_path / "model.gw")


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
