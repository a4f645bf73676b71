"""`graphwright runner`: gw-run, which runs artifacts without Python, built from the sources that come with the package."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..backends import artifact
from ..ir.errors import OutputError, TargetError
from ..ir.files import check_folder, make_folder

#: Architectures as compilers name them.
ARCHITECTURES = ("x86_64", "aarch64")

#: What a machine needs beside an artifact.
FILES = ("gw-run", "libtvm_runtime.so", "libtvm_ffi.so")


def build_runner(arch: str, folder: Path) -> None:
    """Leaves gw-run and the two libraries it loads in `folder`: copied anywhere together, they run.

    Raises:
        TargetError: make or the architecture's C++ compiler is missing or fails; their own words are in the message.
        OutputError: the folder cannot be written.
    """
    check_folder(folder)  # before minutes of compiling
    compiler = f"{arch}-linux-gnu-g++"
    package = "g++" if arch == platform.machine() else f"g++-{arch.replace('_', '-')}-linux-gnu"
    for tool, needed in (("make", "make"), (compiler, package)):
        if shutil.which(tool) is None:
            raise TargetError(f"gw-run for {arch} needs '{tool}'; install it (Debian: apt-get install {needed})")
    sources = Path(artifact.__file__).parent / "runtime"
    with tempfile.TemporaryDirectory(prefix="graphwright-") as scratch:
        command = ["make", "-s", "-C", str(sources), arch, f"BUILD={scratch}", f"PYTHON={sys.executable}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"gw-run for {arch} was not built: {done.stderr.strip() or done.stdout.strip()}")
        make_folder(folder)
        try:
            for name in FILES:
                shutil.copy2(Path(scratch) / arch / name, folder)
        except OSError as error:
            raise OutputError(f"cannot write gw-run to '{folder}': {error.strerror}") from error
