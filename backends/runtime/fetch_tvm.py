"""Puts TVM's runtime libraries and C++ headers for one architecture into a folder: `fetch_tvm.py x86_64|aarch64 FOLDER`.

They come from the wheels of the installed TVM version: the installed ones for this machine's architecture, else downloaded.
FOLDER gets libtvm_runtime.so, libtvm_ffi.so, and include/.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

#: Module, distribution, the library gw-run links, and the wheel's Python version (TVM's wheel fits any).
PACKAGES = (
    ("tvm", "apache-tvm", "libtvm_runtime.so", ()),
    ("tvm_ffi", "apache-tvm-ffi", "libtvm_ffi.so", ("--python-version", "3.11")),
)


def installed(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"fetch_tvm.py: {module} is not installed for {sys.executable}; run make setup")
    return Path(spec.origin).parent


def download(distribution: str, options: tuple[str, ...], arch: str, folder: Path) -> Path:
    """Unpacks a wheel of another architecture and returns the folder it is in."""
    wanted = f"{distribution}=={version(distribution)}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--platform", f"manylinux_2_28_{arch}", *options, "--dest", str(folder), wanted], check=True)
    (wheel,) = folder.glob(f"{distribution.replace('-', '_')}-{version(distribution)}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if "/include/" in n or n.endswith(("/libtvm_runtime.so", "/libtvm_ffi.so"))]
        archive.extractall(folder, names)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=("x86_64", "aarch64"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for module, distribution, library, options in PACKAGES:
            native = platform.machine() == arguments.arch
            source = installed(module) if native else download(distribution, options, arguments.arch, Path(scratch)) / module
            arguments.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "lib" / library, arguments.folder)
            shutil.copytree(source / "include", arguments.folder / "include", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
