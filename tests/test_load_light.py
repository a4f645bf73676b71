"""What a process that only runs a model imports: no torch, no compiler."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from graphwright import load, optimize
from torch import nn

CHILD = """
import sys
if sys.argv[3] == "absent":
    sys.modules["torch"] = None  # an import fails, as where torch is not installed
import numpy as np
import graphwright
model = graphwright.load(sys.argv[1])
np.save(sys.argv[2], model(np.load(sys.argv[1] + ".npy")))
present = {name for name, module in sys.modules.items() if module is not None}
print(repr(model), sorted({"torch", "tvm", "tvm_ffi", "onnx", "typer", "rich", "highspy"} & present))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    samples = [(torch.randn(1, 3, 8, 8),) for _ in range(4)]
    result = optimize(network, target="cpu", example_inputs=samples[0], calibration=samples, measure=False)
    path = tmp_path_factory.mktemp("light") / "model.gw"
    result.artifact.save(path)
    np.save(f"{path}.npy", samples[0][0].numpy())
    return path


@pytest.mark.parametrize("torch_is", ["installed", "absent"])
def test_a_model_runs_without_torch_and_gives_the_same_bits(artifact, tmp_path, torch_is):
    output = tmp_path / "y.npy"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(artifact), str(output), torch_is], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.rstrip().endswith("[]") and "LoadedModel(" in child.stdout
    x = np.load(f"{artifact}.npy")
    expected = load(artifact)(torch.from_numpy(x))
    assert isinstance(expected, torch.Tensor) and np.load(output).tobytes() == expected.numpy().tobytes()


def test_read_only_inputs_are_read_where_they_lie(artifact):
    model, x = load(artifact), np.load(f"{artifact}.npy")
    expected = model(x)
    x.flags.writeable = False
    assert model(x).tobytes() == expected.tobytes()
