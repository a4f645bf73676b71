"""gw-run for tests: builds it (or finds it built) for this machine and for AArch64, and runs it, under qemu where needed."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
QEMU = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")

#: Programs the runner's tests need, and the Debian package each comes from. Their absence fails the tests: it hides nothing.
TOOLS = {
    "x86_64": {"make": "make", "x86_64-linux-gnu-g++": "g++"},
    "aarch64": {"make": "make", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64-static": "qemu-user-static"},
}


@functools.cache
def build(arch: str) -> Path:
    """The gw-run of `arch`, built under build/ at the repository root; make rebuilds only what is out of date."""
    missing = sorted({package for tool, package in TOOLS[arch].items() if shutil.which(tool) is None})
    if missing:
        raise RuntimeError(f"gw-run for {arch} needs Debian packages; run: apt-get install {' '.join(missing)}")
    make("PYTHON=" + sys.executable, arch)
    return ROOT / "build" / arch / "gw-run"


def make(*arguments: str) -> None:
    # Test processes run side by side: one builds, the others wait.
    (ROOT / "build").mkdir(exist_ok=True)
    command = ["flock", str(ROOT / "build" / ".lock"), "make", "-s", "-C", str(ROOT / "backends" / "runtime"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def gw_run(*arguments: object, arch: str = "x86_64", cpu: str = "max") -> subprocess.CompletedProcess[str]:
    """cpu: the one that qemu emulates."""
    command = [*((*QEMU, "-cpu", cpu) if arch == "aarch64" else ()), str(build(arch)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def infer(path: Path, inputs: Sequence[np.ndarray], folder: Path, arch: str = "x86_64", cpu: str = "max") -> list[np.ndarray]:
    """Runs an artifact on stacked samples, one by one in one process, and returns the stacked outputs."""
    arguments: list[object] = [path, "--each-sample"]
    for index, array in enumerate(inputs):
        np.save(folder / f"in{index}.npy", array)
        arguments += ["--input", folder / f"in{index}.npy"]
    done = gw_run(*arguments, "--output", folder / "out", arch=arch, cpu=cpu)
    assert done.returncode == 0, done.stderr
    single = folder / "out.npy"
    return [np.load(p) for p in ([single] if single.exists() else sorted(folder.glob("out.*.npy")))]
