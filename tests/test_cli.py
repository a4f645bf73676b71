"""The command line: exit status, messages, files."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.onnx_export import export_onnx
from graphwright.tools.cli import main, options
from models import small_cnn, small_inputs

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / ".link"), "COLUMNS": "200"}


def spawn(*arguments, cwd=None):
    """The command in a process of its own, as a user runs it."""
    command = [sys.executable, "-W", "ignore", "-m", "graphwright.tools.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def graphwright(*arguments, cwd="."):
    """The same entry point in this process: a new one spends seconds on imports."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as around:
        around.enter_context(contextlib.redirect_stdout(stdout))
        around.enter_context(contextlib.redirect_stderr(stderr))
        around.enter_context(contextlib.chdir(cwd))
        around.enter_context(mock.patch.object(sys, "argv", ["graphwright", *map(str, arguments)]))
        around.enter_context(mock.patch.dict(os.environ, ENVIRONMENT))
        for console in (options.out, options.err):
            around.enter_context(mock.patch.object(console, "_width", int(ENVIRONMENT["COLUMNS"])))
        try:
            main()
        except SystemExit as leaving:
            status = leaving.code
    return subprocess.CompletedProcess(arguments, status or 0, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """model.onnx, model.pt2, calib.npz and an int8 artifact made by `graphwright optimize`."""
    folder = tmp_path_factory.mktemp("cli")
    model = small_cnn()
    torch.export.save(torch.export.export(model, (small_inputs(),)), folder / "model.pt2")
    program = capture(model, small_inputs(), name="model")
    export_onnx(program, folder / "model.onnx")
    np.savez(folder / "calib.npz", **{program.input_specs[0].name: small_inputs(32, seed=1).numpy()})
    np.save(folder / "one.npy", small_inputs(1, seed=5).numpy())
    np.savez(folder / "named.npz", wrong=small_inputs(1, seed=5).numpy())
    np.savez(folder / "objects.npz", x=np.array([{}], dtype=object))
    arguments = ["--calibration", folder / "calib.npz", "-o", folder / "model.gw", "--plan", folder / "plan.json"]
    done = spawn("optimize", folder / "model.onnx", *arguments, "--report", folder / "report.html", "--dump", folder / "dump")
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    return folder


def test_optimize_writes_everything(files):
    assert (files / "model.gw").stat().st_size > 1000
    assert "<html" in (files / "report.html").read_text()
    assert json.loads((files / "plan.json").read_text())["pipeline"].startswith("canonicalize")
    dumps = sorted(p.name for p in (files / "dump").iterdir())
    assert dumps[0] == "000_input.txt" and dumps[-1] == "006_lower-integer.txt"


def test_run_and_inspect(files):
    done = graphwright("run", files / "model.gw", "--input", files / "one.npy", "-o", files / "out.npz", "--overwrite")
    assert done.returncode == 0, done.stderr
    with np.load(files / "out.npz") as outputs:
        assert outputs["output0"].shape == (1, 5)
    done = graphwright("inspect", files / "model.gw", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [row["name"] for row in data["certificate"]][-1] == "lower-integer"
    assert "convolution" in graphwright("inspect", files / "model.pt2").stdout


def test_inspect_groups(files):
    done = graphwright("inspect", files / "model.pt2", "--groups")
    assert done.returncode == 0, done.stderr
    assert "stem: 8 atoms\n    out   stem_weight" in done.stdout and "head: 5 atoms, pinned: it reaches" in done.stdout
    assert done.stdout.splitlines()[-1] == "groups that can be cut: 1, pinned: 1"
    groups = json.loads(graphwright("inspect", files / "model.pt2", "--groups", "--json").stdout)
    assert [len(g["members"][0]["indices"]) for g in groups] == [8, 5]
    refused = graphwright("inspect", files / "model.gw", "--groups")
    assert refused.returncode == 1 and "is an artifact: give the model" in refused.stderr


def test_rewrite_to_onnx_and_replay_of_a_plan(files):
    pipeline = "canonicalize,quantize"
    common = ["--calibration", files / "calib.npz"]
    done = graphwright(
        "rewrite", files / "model.onnx", "-p", pipeline, *common, "-o", files / "q.onnx", "--certificate", files / "c.json"
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((files / "c.json").read_text())) == 2
    done = graphwright("rewrite", files / "model.onnx", "--plan", files / "plan.json", *common)
    assert done.returncode == 0, done.stderr
    assert "gw.rescale" in done.stdout


def test_dry_run_writes_nothing(files, tmp_path):
    done = graphwright(
        "optimize", files / "model.onnx", "--calibration", files / "calib.npz", "-o", tmp_path / "x.gw", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert "dry run" in done.stderr and "quantize" in done.stderr
    assert not list(tmp_path.iterdir())


def test_passes_lists_options_and_effects():
    done = graphwright("passes", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["fold-batch-norm"]["effect"] == "exact"
    assert rows["quantize"]["effect"] == "lossy"
    assert {"weight_bits", "activation_bits"} <= {o["name"] for o in rows["quantize"]["options"]}
    assert all(row["summary"] for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "resnet2", "-o", "x.gw"], "did you mean 'resnet20'"),
        (["optimize", "{folder}/absent.onnx", "-o", "x.gw"], "no model file"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "-p", "quantise"], "did you mean 'quantize'"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "-p", "quantize{{weight_bitz=8}}"], "did you mean 'weight_bits'"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "--target", "x68"], "did you mean 'x86'"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw"], "needs calibration data"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "--size", "small"], "a number such as 0.4 or 0.4x"),
        (["analyze", "{folder}/model.onnx", "--scorers", "sqrn"], "did you mean 'sqnr'"),
        (
            [
                "optimize",
                "{folder}/model.onnx",
                "-o",
                "{folder}/model.onnx",
                "--overwrite",
                "--calibration",
                "{folder}/calib.npz",
            ],
            "model.onnx' is an input of this run",
        ),
        (["optimize", "{folder}/model.onnx", "-o", "/nonexistent/x.gw"], "does not exist"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "--calibration", "{folder}/model.onnx"], "no .npy or .npz file"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "--calibration", "{folder}/absent.npz"], "No such file"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "--dry-run"], "needs calibration data"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "--report", "x.gw"], "'x.gw' is another output of this run"),
        (
            ["rewrite", "{folder}/model.onnx", "-p", "canonicalize,quantize", "-o", "x.onnx", "--dry-run"],
            "needs calibration data",
        ),
        (["rewrite", "{folder}/model.onnx", "-p", "quantize", "-o", "x.onnx", "--dry-run"], "put canonicalize before quantize"),
        (["run", "{folder}/model.gw", "--input", "{folder}/named.npz"], "'wrong', but model takes 'x'"),
        (["run", "{folder}/model.gw", "--input", "{folder}/objects.npz"], "holds Python objects"),
        (["rewrite", "{folder}/model.onnx"], "exactly one"),
        (["rewrite", "{folder}/model.onnx", "-p", "canonicalize", "--print-after", "quantice"], "did you mean 'quantize'"),
        (["run", "{folder}/model.onnx", "--input", "{folder}/one.npy"], "ArtifactError"),
        (["run", "{folder}/model.gw", "--input", "{folder}/calib.npz"], "shape"),
        (["optimize", "{folder}/model.onnx", "-o", "x.gw", "--traget", "cpu"], "--target"),
        (["bench", "resnet20", "--peers", "ortt"], "did you mean 'ort'"),
        (["optimize", "resnet20", "-o", "x.gw", "--scorer", "fisher", "--calibration", "absent.npz"], "fisher needs a label"),
        (["analyze", "{folder}/model.onnx", "--scorers", "fisher", "--calibration", "absent.npz"], "Labels are needed by fisher"),
        (["ranks", "{folder}/model.onnx"], "name at least one limit"),
        (["ranks", "{folder}/model.onnx", "-p", "canonicalize", "--size", "0.5"], "needs a pipeline with one factorization"),
    ],
)
def test_bad_input_is_one_clear_message(files, tmp_path, arguments, message):
    done = graphwright(*[a.format(folder=files) for a in arguments], cwd=tmp_path)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failing_command_exits_with_1_and_prints_no_traceback(tmp_path):
    done = spawn("optimize", "resnet2", "-o", "x.gw", cwd=tmp_path)
    assert done.returncode == 1 and "did you mean 'resnet20'" in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_analyze_prints_and_saves_every_layer(files, tmp_path):
    arguments = ["--calibration", files / "calib.npz", "--cache", tmp_path / "cache", "-o", tmp_path / "scores.json"]
    done = graphwright("analyze", files / "model.onnx", "--scorers", "sqnr,hessian-trace", "--formats", "int8,int4", *arguments)
    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / "scores.json").read_text())
    assert [t["scorer"] for t in tables] == ["sqnr", "hessian-trace"]
    assert all(t["choices"] == ["int8", "int4"] and len(t["loss"]) == len(t["layers"]) > 1 for t in tables)
    assert all(layer in done.stdout for layer in tables[0]["layers"])


def test_a_bit_search_and_its_replay(files, tmp_path):
    arguments = ["--calibration", files / "calib.npz", "--cache", tmp_path / "cache"]
    out = ["-o", tmp_path / "small.gw", "--plan", tmp_path / "plan.json", "--no-measure"]
    done = graphwright("optimize", files / "model.onnx", "--average-bits", 5, *arguments, *out)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["search"]["predicted"]["average_bits"] <= 5 and "weights=[" in plan["pipeline"]
    replay = ["--plan", tmp_path / "plan.json", "--calibration", files / "calib.npz", "--certificate", tmp_path / "rows.json"]
    done = graphwright("rewrite", files / "model.onnx", *replay)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "rows.json").read_text())[-1]["name"] == "lower-integer"


def test_a_limit_on_multiply_accumulates_cuts_channels(files, tmp_path):
    out = ["-o", tmp_path / "x.gw", "--plan", tmp_path / "plan.json", "--no-measure", "--cache", tmp_path / "cache"]
    done = graphwright("optimize", files / "model.onnx", "--macs", "0.8x", "--calibration", files / "calib.npz", *out)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["constraints"] == {"macs": 0.8} and plan["search"]["channels"]["predicted"]["macs"] <= 0.8
    assert "prune-channels{keep=[" in plan["pipeline"]


def test_ctrl_c_leaves_no_half_written_artifact(files, tmp_path):
    command = [sys.executable, "-m", "graphwright.tools.cli", "optimize", str(files / "model.onnx")]
    command += ["--calibration", str(files / "calib.npz"), "-o", str(tmp_path / "x.gw")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # The settings are echoed once the imports are done and the real work begins.
    assert process.stderr is not None
    for line in process.stderr:
        if "pipeline" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_torch_is_imported_is_one_line():
    command = [sys.executable, "-X", "importtime", "-m", "graphwright.tools.cli", "passes"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "torch." in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130 and said == ["interrupted: nothing half-written is left behind"], said
