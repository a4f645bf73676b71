"""gw-run on this machine: the same bits as the reference, and an exit code and a message for each bad input."""

import json
import random
import subprocess

import graphwright
import numpy as np
import pytest
import runner
import torch
from graphwright.backends.container import MANIFEST, pack
from integers import artifact, program, samples
from runner import gw_run, infer

USAGE, ARTIFACT, CPU, INPUT, OUTPUT = 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gw_run") / "model.gw"
    artifact("x86:avx2", "arm64:generic").save(path)
    return path


@pytest.fixture
def x(tmp_path):
    np.save(tmp_path / "x.npy", samples(1)[0].numpy())
    return tmp_path / "x.npy"


def resealed(path, edit):
    """A copy of the artifact with its manifest edited and sealed again."""
    good = artifact("x86:avx2", "arm64:generic")
    manifest = json.loads(good.manifest.to_bytes())
    edit(manifest)
    path.write_bytes(pack({MANIFEST: json.dumps(manifest).encode(), **good.members}))
    return path


def check_failure(done: subprocess.CompletedProcess, code: int, message: str) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("gw-run: error: ") and message in done.stderr, done.stderr


def test_the_parts_without_tvm_under_sanitizers():
    runner.make("check")


def test_many_samples_equal_the_reference_and_python(path, tmp_path):
    stacked = samples(200)
    outputs = infer(path, [stacked.numpy()], tmp_path)
    model = graphwright.load(path)
    for index, sample in enumerate(stacked):
        for wanted, python, got in zip(program()(sample), model(sample), outputs, strict=True):
            assert got[index].dtype == wanted.numpy().dtype
            assert np.array_equal(got[index], wanted.numpy()) and np.array_equal(got[index], python.numpy())


def test_one_run_writes_one_file_an_output(path, x, tmp_path):
    done = gw_run(path, "--input", x, "--output", tmp_path / "out.npy")
    assert done.returncode == 0, done.stderr
    assert "scale: float32[1x5]" in done.stdout and "add: uint8[1x8x8x8]" in done.stdout
    for index, wanted in enumerate(program()(samples(1)[0])):
        assert torch.equal(torch.from_numpy(np.load(tmp_path / f"out.{index}.npy")), wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.0.npy", "out.1.npy", "x.npy"]


def test_repeat_prints_latency(path, x):
    done = gw_run(path, "--input", x, "--repeat", 3, "--warmup", 1, "--threads", 1)
    assert done.returncode == 0 and "latency ms: median" in done.stdout and "(3 runs after 1, 1 threads)" in done.stdout


def test_info(path):
    done = gw_run(path, "--info")
    assert done.returncode == 0
    for part in ("integers (integer)", "x: float32[1x3x8x8]", "x86:avx2: runs here", "arm64:generic: does not run here"):
        assert part in done.stdout


def test_truncated_and_flipped_artifacts(path, x, tmp_path):
    data = path.read_bytes()
    draw = random.Random(0)
    damaged = [data[: draw.randrange(len(data))] for _ in range(10)] + [b"", b"not a zip"]
    for _ in range(40):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        (tmp_path / "bad.gw").write_bytes(content)
        done = gw_run(tmp_path / "bad.gw", "--input", x, "--output", tmp_path / "out.npy")
        check_failure(done, ARTIFACT, "copy or build")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (lambda m: m.update(version=3), ARTIFACT, "format version 3; this gw-run reads version 2"),
        (lambda m: m.pop("targets"), ARTIFACT, "wrong at 'targets'"),
        (lambda m: [t["requires"].append("avx99") for t in m["targets"]], CPU, "this CPU lacks avx99"),
        (lambda m: m["targets"].pop(0), CPU, "arm64:generic needs asimd, fp, and this CPU is x86"),
        (lambda m: m["outputs"].pop(), ARTIFACT, "returns 2 tensors, but its manifest lists 1"),
    ],
)
def test_wrong_manifests(x, tmp_path, edit, code, message):
    bad = resealed(tmp_path / "bad.gw", edit)
    check_failure(gw_run(bad, "--input", x, "--output", tmp_path / "out.npy"), code, message)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 3, 8, 9), np.float32), "float32[1x3x8x9], but input 'x' of integers takes float32[1x3x8x8]"),
        (np.zeros((3, 8, 8), np.float32), "float32[3x8x8]"),
        (np.zeros((1, 3, 8, 8), np.float64), "is float64[1x3x8x8]"),
        (np.asfortranarray(np.zeros((1, 3, 8, 8), np.float32)), "Fortran order; save numpy.ascontiguousarray"),
        (np.zeros((1, 3, 8, 8), ">f4"), "elements of type '>f4'"),
        (np.zeros((1, 3, 8, 8), np.complex64), "elements of type '<c8'"),
    ],
)
def test_wrong_input_arrays(path, tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    check_failure(gw_run(path, "--input", tmp_path / "x.npy", "--repeat", 1), INPUT, message)


def test_wrong_input_files(path, x, tmp_path):
    check_failure(gw_run(path, "--input", tmp_path / "none.npy", "--repeat", 1), INPUT, "No such file")
    check_failure(gw_run(path, "--input", tmp_path, "--repeat", 1), INPUT, "not a file")
    check_failure(gw_run(path, "--repeat", 1), INPUT, "takes 1 inputs, not 0; give one --input for each: x: float32[1x3x8x8]")
    check_failure(gw_run(path, "--input", x, "--input", x, "--repeat", 1), INPUT, "takes 1 inputs, not 2")
    x.write_bytes(x.read_bytes()[:-1])
    check_failure(gw_run(path, "--input", x, "--repeat", 1), INPUT, "truncated")


def test_wrong_outputs(path, x, tmp_path):
    for output, message in (
        (tmp_path / "none" / "out.npy", "does not exist; create it first"),
        ("/proc/out.npy", "cannot write"),
    ):
        done = gw_run(path, "--input", x, "--output", output)
        assert done.returncode == OUTPUT and message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model given"),
        (["m.gw"], "nothing to do"),
        (["m.gw", "--inptu", "x"], "unknown option '--inptu'"),
        (["m.gw", "--input"], "--input needs a value"),
        (["m.gw", "--repeat", "0"], "--repeat takes a whole number of at least 1, not '0'"),
        (["m.gw", "--repeat", "1e3"], "not '1e3'"),
        (["m.gw", "n.gw", "--info"], "second model"),
        (["m.gw", "--each-sample", "--repeat", "1"], "leave --each-sample out"),
    ],
)
def test_usage(arguments, message):
    check_failure(gw_run(*arguments), USAGE, message)


def test_a_missing_model_and_too_many_threads(path, x, tmp_path):
    check_failure(gw_run(tmp_path / "none.gw", "--info"), ARTIFACT, "No such file")
    check_failure(gw_run(path, "--input", x, "--repeat", 1, "--threads", 100000), USAGE, "this process may use 1 to")
