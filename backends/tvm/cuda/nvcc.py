"""nvcc: where it is, and CUDA source to cubin, kept by content in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ....ir.errors import TargetError
from ....ir.files import write_atomically
from ...cache import cache_folder

#: The exact float ops round after every operation, and so does what torch computes op by op.
OPTIONS = ("-O3", "--fmad=false", "-std=c++17", "-cubin")

WHERE = "install NVIDIA's CUDA toolkit (https://developer.nvidia.com/cuda-downloads) and put its bin folder on the PATH"


def find_nvcc() -> str | None:
    """The nvcc of the PATH, of `$CUDA_HOME`, or of the toolkit's usual folder."""
    places = [shutil.which("nvcc"), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"]
    return next((str(place) for place in places if place and os.access(place, os.X_OK)), None)


def missing_nvcc(level: str) -> str:
    """What this machine lacks to compile CUDA source for a chip (sm_90, ...); empty where nothing."""
    nvcc = find_nvcc()
    if nvcc is None:
        return f"'nvcc' is not on the PATH; {WHERE}"
    if level not in _chips(nvcc):
        return f"'{nvcc}' does not compile for {level}: its CUDA toolkit is too old or too new; {WHERE}"
    return "" if shutil.which("g++") else "'g++', which nvcc needs, is not on the PATH; install it (Debian: apt-get install g++)"


def compile_cubin(source: str, arch: str) -> bytes:
    """Machine code of `arch` (sm_90, ...). Raises TargetError where nvcc is missing or rejects the source, in its own words."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise TargetError(f"cannot compile for {arch}: {missing_nvcc(arch)}")
    key = hashlib.sha256("\0".join([_version(nvcc), arch, *OPTIONS, source]).encode()).hexdigest()
    kept = cache_folder() / "cubins" / f"{key}.cubin"
    if kept.exists():
        return kept.read_bytes()
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        path, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        path.write_text(source)
        command = [nvcc, *OPTIONS, f"-arch={arch}", "-o", str(cubin), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"'{nvcc}' cannot compile the program's kernels for {arch}: {done.stderr.strip()}")
        code = cubin.read_bytes()
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, code)
    return code


def _version(nvcc: str) -> str:
    return _answer(nvcc, "--version")


def _chips(nvcc: str) -> list[str]:
    return _answer(nvcc, "--list-gpu-code").split()


@functools.cache
def _answer(nvcc: str, question: str) -> str:
    done = subprocess.run([nvcc, question], capture_output=True, text=True)
    if done.returncode:
        raise TargetError(f"'{nvcc} {question}' fails: {done.stderr.strip()}; {WHERE}")
    return done.stdout
