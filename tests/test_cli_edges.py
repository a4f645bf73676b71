"""What users type wrong: every verb ends with one message that names the culprit, a status that is not 0, and no file left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.onnx_export import export_onnx
from models import small_cnn, small_inputs
from test_cli import graphwright

#: The verbs that take a model, with what else they need to begin.
VERBS = {
    "optimize": ["-o", "x.gw"],
    "rewrite": ["-p", "canonicalize"],
    "inspect": [],
    "bench": [],
    "tune": [],
    "analyze": [],
    "ranks": ["--size", "0.5"],
    "channels": ["--size", "0.5"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its calibration samples, and everything that is neither."""
    folder: Path = tmp_path_factory.mktemp("edges")
    program = capture(small_cnn(), small_inputs(), name="model")
    export_onnx(program, folder / "model.onnx")
    other = capture(torch.nn.Conv2d(3, 2, 1), small_inputs(), name="other")
    export_onnx(other, folder / "other.onnx")
    np.savez(folder / "calib.npz", **{program.input_specs[0].name: small_inputs(4, seed=1).numpy()})
    np.save(folder / "nan.npy", np.full((1, 3, 12, 12), np.nan, np.float32))
    np.save(folder / "classes.npy", np.zeros(4, np.int64))
    noise = np.random.default_rng(0).bytes(2000)
    for suffix in ("onnx", "pt2", "npz", "gw", "json"):
        (folder / f"empty.{suffix}").touch()
        (folder / f"noise.{suffix}").write_bytes(noise)
        (folder / f"folder.{suffix}").mkdir()
    whole = (folder / "model.onnx").read_bytes()
    (folder / "half.onnx").write_bytes(whole[: len(whole) // 2])
    plan = {"pipeline": "canonicalize", "target": "cpu", "model": "model", "model_hash": "0", "constraints": {}, "seed": 0}
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def refused(files, folder, arguments, message):
    before = {path: path.read_bytes() for path in files.iterdir() if path.is_file()}
    done = graphwright(*[a.format(f=files) for a in arguments], cwd=folder)
    text = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode in (1, 2), text
    assert message in text
    assert "Traceback" not in text
    assert not list(folder.iterdir())
    assert {path: path.read_bytes() for path in files.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{f}/absent.onnx", "no model file at"),
        ("{f}/empty.onnx", "is empty; it is not an ONNX model"),
        ("{f}/folder.onnx", "is a folder; give an .onnx file"),
        ("{f}/noise.onnx", "is not an ONNX model, or it is truncated"),
        ("{f}/half.onnx", "the file breaks off"),
        ("{f}/noise.pt2", "is not an ONNX model"),
        ("{f}/calib.npz", "is an archive without a model"),
        ("resnet2", "did you mean 'resnet20'?"),
        ("--bogus", "No such option"),
    ],
)
def test_no_model(files, tmp_path, verb, model, message):
    refused(files, tmp_path, [verb, model, *VERBS[verb]], message)


MODEL, DATA = "{f}/model.onnx", ["--calibration", "{f}/calib.npz"]


@pytest.mark.parametrize(
    "verb", ["optimize", "rewrite", "inspect", "run", "runner", "bench", "tune", "analyze", "ranks", "channels"]
)
def test_no_arguments(files, tmp_path, verb):
    refused(files, tmp_path, [verb], "tune takes MODELS" if verb == "tune" else "Missing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimise"], "No such command 'optimise'"),
        (["passes", "--bogus"], "No such option"),
        (["targets", "--bogus"], "No such option"),
        # outputs
        (["optimize", MODEL, *DATA, "-o", "/proc/x.gw"], "no file can be made in '/proc'"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--dump", "{f}/plan.json"], "plan.json' is a file; name another folder"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--cache", "/proc/x"], "no file can be made in '/proc'"),
        (["optimize", MODEL, *DATA, "-o", "{f}/folder.gw"], "it is a folder; name a file inside it"),
        (["rewrite", MODEL, "-p", "canonicalize", "-o", "{f}/other.onnx"], "exists already"),
        (["rewrite", MODEL, "-p", "canonicalize", "--dump", "/proc/x"], "no file can be made in '/proc'"),
        (["analyze", MODEL, *DATA, "-o", MODEL, "--overwrite"], "model.onnx' is an input of this run"),
        (["bench", MODEL, "--json", MODEL, "--overwrite"], "model.onnx' is an input of this run"),
        (["run", "{f}/noise.gw", "-i", "{f}/nan.npy", "-o", "{f}/nan.npy", "--overwrite"], "nan.npy' is an input of this run"),
        (["runner", "x86_64", "-o", "{f}/plan.json"], "plan.json' is a file; name another folder"),
        (["runner", "x68", "-o", "x"], "unknown architecture 'x68'"),
        (["tune", MODEL, "--database", "{f}/folder.json", "--budget", "0.01"], "is no tuning database"),
        (["tune", MODEL, "--database", "{f}/noise.json", "--budget", "0.01"], "is no tuning database"),
        # artifacts
        (["inspect", "{f}/empty.gw"], "is not a whole graphwright artifact"),
        (["inspect", "{f}/folder.gw"], "Is a directory"),
        (["run", "{f}/noise.gw", "-i", "{f}/nan.npy"], "is not a whole graphwright artifact"),
        (["inspect", MODEL, "--blocks", "--groups"], "ask for one at a time"),
        # data
        (["optimize", MODEL, "--calibration", "{f}/empty.npz", "-o", "x.gw"], "is damaged"),
        (["optimize", MODEL, "--calibration", "{f}/folder.npz", "-o", "x.gw"], "Is a directory"),
        (["optimize", MODEL, "--calibration", "{f}/noise.npz", "-o", "x.gw"], "is damaged"),
        (["optimize", MODEL, "--calibration", "{f}/nan.npy", "-o", "x.gw"], "holds nan at (0, 0, 0, 0)"),
        (["optimize", MODEL, "--calibration", "{f}/classes.npy", "-o", "x.gw"], "but model takes"),
        (["analyze", MODEL, *DATA, "--scorers", "fisher", "--labels", "{f}/empty.npz"], "write it with numpy.save"),
        (["analyze", MODEL, *DATA, "--scorers", "fisher", "--labels", "{f}/calib.npz"], "are an archive of arrays"),
        (["analyze", MODEL, *DATA, "--scorers", "fisher", "--labels", "{f}/absent.npy"], "No such file"),
        (["analyze", MODEL, *DATA, "--scorers", ""], "name at least one scorer"),
        # plans
        (["rewrite", MODEL, "--plan", "{f}/absent.json"], "cannot read plan"),
        (["rewrite", MODEL, "--plan", "{f}/empty.json"], "is not JSON"),
        (["rewrite", MODEL, "--plan", "{f}/noise.json"], "is not JSON"),
        (["rewrite", "{f}/other.onnx", "--plan", "{f}/plan.json"], "this plan was made for 'model'"),
        # targets
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--target", "cuda:sm_1"], "unknown level of target cuda 'sm_1'"),
        (["ranks", MODEL, *DATA, "--size", "0.5", "--target", "x68"], "did you mean 'x86'"),
        (["channels", MODEL, *DATA, "--size", "0.5", "--target", "x68"], "did you mean 'x86'"),
        (["tune", MODEL, "--target", "x68"], "did you mean 'x86'"),
        (["tune", MODEL, "--rpc", "nohost", "--key", "k"], "write HOST:PORT"),
        # numbers
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--size", "nan"], "--size takes a number such as 0.4 or 0.4x, not 'nan'"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--bops", "-1"], "--bops takes a number"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--macs", "inf"], "--macs takes a number"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--average-bits", "nan"], "Invalid value for '--average-bits'"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--average-bits", "-3"], "Invalid value for '--average-bits'"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--formats", ""], "'' is no weight format"),
        (["optimize", MODEL, *DATA, "-o", "x.gw", "--evaluate", "-1"], "Invalid value for '--evaluate'"),
        (["optimize", "resnet20", "-o", "x.gw", "--samples", "0"], "Invalid value for '--samples'"),
        (["ranks", MODEL, *DATA, "--size", "nan"], "--size takes a number"),
        (["channels", MODEL, *DATA, "--latency", "-1"], "--latency takes a number"),
        (["channels", MODEL, *DATA, "--size", "0.9", "--multiple", "0"], "--multiple must be at least 1"),
        (["bench", "resnet20", "--threads", "0"], "Invalid value for '--threads'"),
        (["bench", "resnet20", "--profile", "--rounds", "0"], "Invalid value for '--rounds'"),
        (["tune", MODEL, "--budget", "nan"], "--budget takes minutes"),
        (["tune", MODEL, "--threads", "-1"], "Invalid value for '--threads'"),
        (["inspect", MODEL, "--input-shape", "x=-1"], "--input-shape takes NAME="),
        (["rewrite", MODEL, "-p", "canonicalize", "--seed", "9" * 30], "Invalid value for '--seed'"),
        (["rewrite", MODEL, *DATA, "-p", "canonicalize,quantize{{weight_bits=-3}}"], "must lie in 2 to 8, not -3"),
        (["rewrite", MODEL, "-p", "split-outliers{{ratio=nan}}"], "'ratio' of split-outliers must be float, not nan"),
        (["rewrite", MODEL, "-p", "canonicalize,factorize-svd{{ratio=0.5,multiple=0}}"], "must be at least 1, not 0"),
        (["rewrite", MODEL, "-p", "canonicalize,,quantize"], "expected a pass name"),
    ],
)  # fmt: skip
def test_one_message_and_nothing_written(files, tmp_path, arguments, message):
    refused(files, tmp_path, arguments, message)
