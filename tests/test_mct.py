"""The bench's Model Compression Toolkit row: what its process is given, and what is said when that process fails."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from graphwright.tools import zoo
from graphwright.tools.bench import mct

# The other environment has no graphwright: neither has this process, whose import path is the standard one.
PREDICT = """
import numpy, sys, torch
model = torch.package.PackageImporter(sys.argv[1] + "/model.pt").load_pickle("model", "model.pkl")
with torch.no_grad(), numpy.load(sys.argv[1] + "/evaluation.npz") as stored:
    numpy.savez(sys.argv[1] + "/outputs.npz", *[model(torch.from_numpy(stored[name])).numpy() for name in stored.files])
assert "graphwright" not in sys.modules
"""


def test_the_exported_network_runs_without_graphwright(tmp_path):
    reference = zoo.load("resnet20")
    mct.export(reference, tmp_path, 40, [inputs[0] for inputs, _ in reference.evaluation(33)])
    subprocess.run([sys.executable, "-P", "-c", PREDICT, tmp_path], check=True, env={"OMP_NUM_THREADS": "1"})
    with np.load(tmp_path / "calibration.npz") as stored, np.load(tmp_path / "outputs.npz") as outputs:
        assert [len(stored[name]) for name in stored.files] == [32, 8]
        assert [len(outputs[name]) for name in outputs.files] == [32, 1]
        for (inputs, _), name in zip(reference.evaluation(33), outputs.files, strict=True):
            with torch.inference_mode():
                torch.testing.assert_close(torch.from_numpy(outputs[name]), reference.model(*inputs))


def test_an_environment_without_mct_is_named():
    with pytest.raises(mct.MctError, match=r"(?s)MCT in .* ended with 1: .*No module named"):
        mct.run_mct(Path(sys.executable), "resnet20", 4.5, samples=1, score_images=1, evaluate=1, threads=1)


def test_bytes_and_average_bits_count_every_weight(monkeypatch):
    layers = [{"name": "a", "bits": 8, "weights": 100}, {"name": "b", "bits": 2, "weights": 300}]

    def answer(command, **_):
        (command[-1] / "result.json").write_text(json.dumps({"version": "0", "seconds": 1.0, "layers": layers}))
        np.savez(command[-1] / "outputs.npz", np.eye(10, dtype=np.float32)[:4])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(mct.subprocess, "run", answer)
    result = mct.run_mct(Path("python"), "resnet20", 4.0, samples=1, score_images=1, evaluate=4, threads=1)
    assert (result.weight_bytes, result.average_bits, result.bits) == (175.0, 3.5, {"a": 8, "b": 2})


def test_models_of_two_inputs_are_refused():
    with pytest.raises(mct.MctError, match="minilm-l6 has 2 inputs"):
        mct.run_mct(Path("python"), "minilm-l6", 4.5, samples=1, score_images=1, evaluate=1, threads=1)
