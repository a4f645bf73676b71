"""Batches cut into parts: which programs can be, and that parts compute what the whole does."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from graphwright.backends.base import KernelRow
from graphwright.backends.target import Target
from graphwright.backends.tvm import parts as parts_module
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes, to_tvm
from graphwright.backends.tvm.link import header_folders
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.parts import in_parts
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from torch import nn
from torch.nn import functional as F

BATCH = 6


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.table = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x):
        return self.function(self, x)


def captured(function, shape=(BATCH, 4, 8)):
    torch.manual_seed(0)
    return capture(Function(function).eval(), torch.randn(shape))


def attention(m, x):
    """Queries, keys and values from one product: the samples become the second axis for a while."""
    qkv = F.linear(x, m.weight.repeat(3, 1)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    mixed = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
    return mixed.transpose(1, 2).reshape(x.shape[0], -1, 8)


SEPARATE = {
    "attention": attention,
    "merged rows": lambda m, x: (x.reshape(-1, 8) @ m.weight).reshape(x.shape),
    "a learned token": lambda m, x: torch.cat([m.table.expand(x.shape[0], -1, -1), x], 1),
    "a fixed operand": lambda m, x: torch.relu(x + m.table[:, :1]) * m.weight[:4],
    "along other axes": lambda m, x: torch.cat(
        [x.mean(1, keepdim=True), x[:, 1:3], x.amax(-1, keepdim=True).expand(-1, -1, 8)], 1
    ),
    "one axis more": lambda m, x: x.unsqueeze(0).permute(1, 0, 2, 3).squeeze(1).transpose(1, 2),
    "a pool": lambda m, x: F.max_pool2d(x.reshape(x.shape[0], 1, 4, 8), 2).flatten(1),
    "a normalization": lambda m, x: F.layer_norm(x, (8,)),
}

MIXED = {
    "mean over the batch": lambda m, x: x - x.mean(0, keepdim=True),
    "softmax over the batch": lambda m, x: torch.softmax(x, 0),
    "a sample for all": lambda m, x: x + x[:1],
    "reversed roles": lambda m, x: x.permute(1, 0, 2) + m.weight[:6],
    "rows of other samples": lambda m, x: (lambda flat: flat @ flat.T)(x.flatten(1)),
    "samples as channels": lambda m, x: F.conv1d(x.permute(1, 0, 2), torch.ones(6, 6, 1)).permute(1, 0, 2),
    "one image": lambda m, x: F.conv1d(x[:, 0], torch.ones(6, 6, 1)),
    "batches of batches": lambda m, x: torch.cat([x, x], 0),
    "normalized over the batch": lambda m, x: F.layer_norm(x, x.shape),
    "halves of the batch": lambda m, x: x.reshape(2, -1, 4, 8).mean(0),
}


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_compute_what_the_whole_does(name, size):
    program = captured(SEPARATE[name])
    part = in_parts(program, size)
    assert part is not None
    assert [spec.shape[0] for spec in (*part.input_specs, *part.output_specs)] == [size, size]
    x = torch.randn(BATCH, 4, 8)
    whole = torch.cat([part(piece)[0] for piece in x.split(size)])
    torch.testing.assert_close(whole, program(x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MIXED)
def test_a_batch_whose_samples_meet_stays_whole(name):
    assert in_parts(captured(MIXED[name]), 2) is None


def test_a_size_that_does_not_divide_the_batch_is_no_part():
    program = captured(SEPARATE["a pool"])
    assert in_parts(program, 4) is None and in_parts(program, 0) is None


def test_inputs_of_different_batches_stay_whole():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    program = capture(Two().eval(), (torch.randn(6, 4), torch.randn(1, 4)))
    assert in_parts(program, 2) is None


# -- how many --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "moved", "expected"),
    [(1, 1 << 22, 1), (8, 1 << 23, 8), (8, 1 << 20, 4), (32, 1 << 20, 4), (32, 1 << 30, 32), (8, 1 << 10, 1), (6, 1 << 22, 6)],
)
def test_parts_fit_the_cache_and_are_enough_for_several_cores(batch, moved, expected):
    program = captured(SEPARATE["a pool"], (batch, 4, 8))
    _, count = parts_module.cut(program, [KernelRow("k", (), "designed", macs=99 * 16 * batch, bytes=moved + 99, weights=99)])
    assert count == expected


@pytest.mark.parametrize(("reuse", "expected"), [(1, 1), (3, 1), (4, 4), (8, 4), (16, 4)])
def test_parts_are_large_enough_for_their_weights(reuse, expected):
    """Few multiply-accumulates for a byte of weights: a part has as many samples as make up for it, or the batch stays whole."""
    program = captured(SEPARATE["a pool"], (16, 4, 8))
    _, count = parts_module.cut(program, [KernelRow("k", (), "designed", macs=1000 * 16 * reuse, bytes=1 << 20, weights=1000)])
    assert count == expected


# -- compiled --------------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Its part of two samples begins at no multiple of 64 bytes, in the input and in the output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.last = nn.Linear(40, 10)

    def forward(self, x):
        y = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(y.mean((2, 3))), y


def integer(batch):
    torch.manual_seed(0)
    program = capture(Network().eval(), torch.randn(batch, 3, 17, 17))
    data = Calibration.for_program(program, [torch.randn(batch, 3, 17, 17)])
    return PassManager().run(program, parse("canonicalize,quantize,lower-integer"), PassContext(calibration=data)).program


@pytest.fixture(scope="module")
def cut_network():
    program = integer(12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "LEAST_BYTES", 0)
        compiled = TVMBackend().compile(program, Target.parse("cpu"))
    assert compiled.options["parts"] == 4
    return program, compiled


def test_a_batch_in_parts_has_the_bits_of_the_whole(cut_network):
    program, compiled = cut_network
    run = load_bytes(compiled.library)
    for seed in range(3):
        x = torch.randn(12, 3, 17, 17, generator=torch.Generator().manual_seed(seed))
        for got, expected in zip(run(x.numpy()), program(x), strict=True):
            np.testing.assert_array_equal(got, expected.numpy())


def test_rows_count_the_work_of_all_parts(cut_network):
    program, compiled = cut_network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "LEAST_BYTES", 1 << 60)
        whole = TVMBackend().compile(program, Target.parse("cpu"))
    assert whole.options["parts"] == 1
    assert [row.macs for row in compiled.kernels] == [row.macs for row in whole.kernels]


def test_a_profile_adds_up_the_parts(cut_network):
    _, compiled = cut_network
    run = load_bytes(compiled.library)
    x = np.random.default_rng(0).standard_normal((12, 3, 17, 17), np.float32)
    outputs = [to_tvm(y) for y in run.empty_outputs()]
    times = run.profile([to_tvm(x)], outputs)
    assert len(times) == len(run.step_names) and min(times) > 0
    assert len(TVMBackend().profile(compiled, [torch.from_numpy(x)], 3).microseconds) == len(compiled.kernels)


#: Starts as many tasks as TASKS says, whatever the machine has.
LAUNCH = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <tvm/runtime/c_backend_api.h>
typedef struct { FTVMParallelLambda run; TVMParallelGroupEnv env; void* data; int task, status; } job;
static void* start(void* given) {
  job* mine = given;
  mine->status = mine->run(mine->task, &mine->env, mine->data);
  return NULL;
}
int TVMBackendParallelLaunch(FTVMParallelLambda run, void* data, int unused) {
  const int tasks = atoi(getenv("TASKS"));
  pthread_t threads[tasks];
  job jobs[tasks];
  int status = 0;
  printf("%d tasks\\n", tasks);
  for (int task = 0; task < tasks; ++task) {
    jobs[task] = (job){run, {.num_task = tasks}, data, task, 0};
    pthread_create(&threads[task], NULL, start, &jobs[task]);
  }
  for (int task = 0; task < tasks; ++task) {
    pthread_join(threads[task], NULL);
    if (jobs[task].status) status = jobs[task].status;
  }
  return status;
}
"""


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 9])
def test_any_number_of_tasks_shares_the_parts(cut_network, tasks, tmp_path):
    """Tasks that are more than the parts, or no divisor of them, work on one part together."""
    program, compiled = cut_network
    x = torch.randn(12, 3, 17, 17)
    np.save(tmp_path / "x.npy", x.numpy())
    (tmp_path / "model.so").write_bytes(compiled.library)
    (tmp_path / "launch.c").write_text(LAUNCH)
    includes = [f"-I{folder}" for folder in header_folders()]
    command = ["cc", "-shared", "-fPIC", "-pthread", *includes, "-o", tmp_path / "launch.so", tmp_path / "launch.c"]
    subprocess.run(command, check=True)
    code = (
        "import sys, numpy as np\n"
        "from graphwright.backends.tvm.executor import Executor\n"
        "run = Executor(sys.argv[1] + '/model.so')\n"
        "for _ in range(20): y = run(np.load(sys.argv[1] + '/x.npy'))[0]\n"
        "np.save(sys.argv[1] + '/y.npy', y)\n"
    )
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "launch.so"), "TASKS": str(tasks)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [f"{tasks} tasks"] * 20
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), program(x)[0].numpy())
