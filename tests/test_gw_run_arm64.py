"""The same flow for AArch64: cross-compiled here, run by the AArch64 gw-run under qemu, the same integers out."""

import numpy as np
import pytest
from graphwright.backends.artifact import Artifact
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.ir.capture import capture
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from integers import artifact, program, samples
from models import small_cnn, small_inputs
from runner import gw_run, infer


@pytest.mark.parametrize(
    ("level", "cpu"),
    [("cortex-a53", "cortex-a53"), ("generic", "cortex-a72"), ("cortex-a76", "cortex-a76"), ("neoverse-v1", "max")],
)
def test_an_aarch64_artifact_equals_the_reference(level, cpu, tmp_path):
    path = tmp_path / "model.gw"
    artifact(f"arm64:{level}").save(path)
    check(path, tmp_path, cpu, 20)


def check(path, folder, cpu, count):
    stacked = samples(count)
    outputs = infer(path, [stacked.numpy()], folder, arch="aarch64", cpu=cpu)
    for index, sample in enumerate(stacked):
        for wanted, got in zip(program()(sample), outputs, strict=True):
            assert np.array_equal(got[index], wanted.numpy())


def test_one_file_serves_several_cores(tmp_path):
    """Each core takes the best library that it runs; which one says --info."""
    path, levels = tmp_path / "model.gw", ("neoverse-v1", "cortex-a76", "cortex-a53")
    artifact(*(f"arm64:{level}" for level in levels)).save(path)
    for cpu, first in (("cortex-a53", 2), ("cortex-a76", 1), ("max", 0)):
        check(path, tmp_path, cpu, 2)
        lines = gw_run(path, "--info", arch="aarch64", cpu=cpu).stdout.splitlines()
        rows = [next(line for line in lines if f"arm64:{level}" in line) for level in levels]
        assert ["does not run here" in row for row in rows] == [index < first for index in range(3)]


@pytest.mark.parametrize(("level", "cpu"), [("cortex-a53", "cortex-a53"), ("cortex-a76", "cortex-a76"), ("neoverse-v1", "max")])
def test_half_precision_is_float16_in_memory(level, cpu, tmp_path):
    path, x = tmp_path / "model.gw", small_inputs(3, seed=4)
    captured = capture(small_cnn().eval(), x[:1])
    half = PassManager().run(captured, parse("canonicalize,cast-float{dtype=float16}"), PassContext()).program
    compiled = TVMBackend().compile(half, Target("arm64", level))
    Artifact.build(half, [compiled], certificate=[], plan={"pipeline": "cast-float", "target": str(compiled.target)}).save(path)
    (outputs,) = infer(path, [x[:, None].numpy()], tmp_path, arch="aarch64", cpu=cpu)
    for output, sample in zip(outputs, x[:, None], strict=True):
        exact, rounded = captured(sample)[0].detach().numpy(), half(sample)[0].detach().numpy()
        # One rounding of 2^-11 for each of the values between the seven layers, as in torch; sums add none that would show.
        assert 0 < np.abs(output - exact).max() < 8 * 2.0**-11 * np.abs(exact).max()
        assert np.abs(output - rounded).max() < 8 * 2.0**-11 * np.abs(rounded).max()


@pytest.mark.parametrize(
    ("level", "cpu", "feature"), [("cortex-a76", "cortex-a72", "asimddp"), ("neoverse-v1", "neoverse-n1", "i8mm")]
)
def test_a_core_without_the_instructions_is_refused(level, cpu, feature, tmp_path):
    path = tmp_path / "model.gw"
    artifact(f"arm64:{level}").save(path)
    np.save(tmp_path / "x.npy", samples(1)[0].numpy())
    done = gw_run(path, "--input", tmp_path / "x.npy", "--repeat", 1, arch="aarch64", cpu=cpu)
    lacks = done.stderr.partition("this CPU lacks")[2]
    assert done.returncode == 4 and f"arm64:{level} needs" in done.stderr and feature in lacks and "crc32" not in lacks
    assert "or for target 'arm64:generic'" in lacks


def test_one_file_serves_both_architectures(tmp_path):
    path = tmp_path / "model.gw"
    artifact("x86:avx2", "arm64:generic").save(path)
    stacked = samples(3).numpy()
    for ours, theirs in zip(infer(path, [stacked], tmp_path), infer(path, [stacked], tmp_path, arch="aarch64"), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_wrong_cpu_is_refused(tmp_path):
    path = tmp_path / "model.gw"
    artifact("x86:avx2").save(path)
    np.save(tmp_path / "x.npy", samples(1)[0].numpy())
    done = gw_run(path, "--input", tmp_path / "x.npy", "--repeat", 1, arch="aarch64")
    assert done.returncode == 4 and "x86:avx2 needs" in done.stderr and "this CPU is arm64" in done.stderr
