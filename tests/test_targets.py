"""`graphwright targets` tells the truth about machines that lack something: each is made up here by what is on the PATH."""

from __future__ import annotations

import importlib.util

import pytest
from graphwright.backends import nvidia
from graphwright.backends.host import host_arch
from graphwright.backends.target import LEVELS
from graphwright.backends.tvm import target as targets
from graphwright.backends.tvm.cuda import nvcc, triton_aot
from graphwright.tools.cli import app
from graphwright.tools.cli.options import out
from typer.testing import CliRunner

#: Compilers of the two CPU architectures, seen from this machine.
NATIVE = "gcc"
CROSS = {"x86": "aarch64-linux-gnu-gcc", "arm64": "x86_64-linux-gnu-gcc"}[host_arch()]
OTHER = {"x86": "arm64", "arm64": "x86"}[host_arch()]


@pytest.fixture(autouse=True)
def fresh():
    """Answers of compilers are kept for a process's life; these tests change them."""
    nvcc._answer.cache_clear()
    targets._complaint.cache_clear()
    yield
    nvcc._answer.cache_clear()
    targets._complaint.cache_clear()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A PATH with nothing on it; returns a function that puts programs there: real ones, or scripts."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-toolkit"))

    def install(name: str, script: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return install


def missing(arch: str) -> dict[str, str]:
    return {row.target.level: row.missing for row in targets.target_rows() if row.target.arch == arch and not row.emits}


def test_every_level_is_listed_once():
    listed = [str(row.target) for row in targets.target_rows()]
    assert listed == [f"{arch}:{level}" for arch in ("x86", "arm64", "cuda") for level in LEVELS[arch]]


def test_no_compilers(machine):
    package = "gcc-" + CROSS.removesuffix("-gcc").replace("_", "-")
    for arch, advice in ((host_arch(), "apt-get install gcc libc6-dev"), (OTHER, f"apt-get install {package} libc6-dev-")):
        command = NATIVE if arch == host_arch() else CROSS
        assert list(missing(arch)) == list(LEVELS[arch])
        assert all(f"'{command}' is not on the PATH; install it (Debian: {advice}" in reason for reason in missing(arch).values())


def test_a_cross_compiler_without_its_c_library(machine):
    machine(CROSS, "echo '<stdin>:1:10: fatal error: stdlib.h: No such file or directory' >&2; exit 1")
    for reason in missing(OTHER).values():
        assert f"'{CROSS}' cannot link a library (<stdin>:1:10: fatal error: stdlib.h" in reason
        assert "apt-get install libc6-dev-" in reason
    assert len(missing(OTHER)) == len(LEVELS[OTHER])


def test_a_compiler_that_works_is_enough(machine):
    machine(CROSS, "exit 0")
    assert missing(OTHER) == {}


def test_an_old_toolkit_no_host_compiler_and_no_triton(machine, monkeypatch):
    machine("nvcc", "printf 'sm_75\\nsm_80\\nsm_86\\n'")
    machine("gcc", "exit 0")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(triton_aot.importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    found = missing("cuda")
    assert list(found) == list(LEVELS["cuda"])
    for level, reason in found.items():
        assert "'triton' is not installed; pip install 'graphwright[cuda]'" in reason
        assert (f"does not compile for {level}" in reason) == (level in ("sm_90", "sm_89"))
        assert ("'g++', which nvcc needs, is not on the PATH" in reason) == (level in ("sm_86", "sm_80"))
    machine("g++", "exit 0")
    monkeypatch.setattr(targets, "missing_triton", lambda: "")
    assert list(missing("cuda")) == ["sm_90", "sm_89"]


def test_the_command_prints_the_rows(monkeypatch):
    monkeypatch.setattr(out, "width", 400)  # nothing wraps
    monkeypatch.setattr(nvidia, "first_gpu", lambda: nvidia.Gpu("GPU", 86))
    monkeypatch.setattr(triton_aot.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["targets"])
    assert done.exit_code == 0
    cells = [[cell.strip() for cell in line.split("│")] for line in done.output.splitlines() if line.count("│") > 3]
    runs = {target: here for _, target, _, here, *_ in cells}
    assert list(runs) == [str(row.target) for row in targets.target_rows()]
    assert "pip install 'graphwright[cuda]'" in done.output  # no markup
    assert [runs[f"cuda:{level}"] for level in LEVELS["cuda"]] == ["no", "no", "yes", "yes"]
