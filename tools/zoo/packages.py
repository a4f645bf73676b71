"""Files that other installed Python packages carry, found without importing those packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...ir.errors import DataError


def package_file(package: str, relative: str, distribution: str) -> Path:
    """Path of `relative` inside the installed top-level `package`, which the PyPI project `distribution` provides.

    Raises:
        DataError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the Python package {distribution} is not installed: run pip install 'graphwright[zoo]'")
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    if not path.is_file():
        raise DataError(
            f"the installed package {distribution} lacks {relative}: run pip install --force-reinstall {distribution}"
        )
    return path
