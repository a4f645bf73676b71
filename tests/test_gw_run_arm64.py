"""The same flow for AArch64: cross-compiled here, run by the AArch64 gw-run under qemu, the same integers out."""

import numpy as np
import pytest
from integers import artifact, program, samples
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
    path = tmp_path / "model.gw"
    artifact("arm64:cortex-a53", "arm64:cortex-a76").save(path)
    for cpu, lacking in (("cortex-a53", "arm64:cortex-a76: does not run here"), ("cortex-a76", "")):
        check(path, tmp_path, cpu, 3)
        assert lacking in gw_run(path, "--info", arch="aarch64", cpu=cpu).stdout


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
