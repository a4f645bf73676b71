"""The same flow for AArch64: cross-compiled here, run by the AArch64 gw-run under qemu, the same integers out."""

import numpy as np
import pytest
from integers import artifact, program, samples
from runner import gw_run, infer


@pytest.mark.parametrize("level", ["cortex-a76", "generic"])
def test_an_aarch64_artifact_equals_the_reference(level, tmp_path):
    path = tmp_path / "model.gw"
    artifact(f"arm64:{level}").save(path)
    stacked = samples(20)
    outputs = infer(path, [stacked.numpy()], tmp_path, arch="aarch64")
    for index, sample in enumerate(stacked):
        for wanted, got in zip(program()(sample), outputs, strict=True):
            assert np.array_equal(got[index], wanted.numpy())


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
