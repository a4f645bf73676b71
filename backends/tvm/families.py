"""Which kernels a target uses: those of the CPUs, in `kernels/`, replaced function by function where it has its own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

_CPU = f"{__package__}.kernels"

#: Package of the families a target has its own versions of.
_PACKAGES = {"cuda": f"{__package__}.cuda.kernels"}


class Family:
    """One family's functions for a target: its own where it has them, the CPUs' otherwise."""

    def __init__(self, *modules: ModuleType) -> None:
        self._modules = modules

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"kernel family {self._modules[-1].__name__} has no '{name}'")


@functools.cache
def family_of(arch: str, module: ModuleType) -> Any:
    """The family of a target by the CPUs' module of it."""
    own = _own_module(arch, module.__name__)
    return module if own is None else Family(own, module)


@functools.cache
def generator_of(arch: str, generator: Callable[..., Any]) -> Callable[..., Any]:
    """The target's own version of a kernel generator; the generator itself where it has none."""
    own = _own_module(arch, generator.__module__)
    return getattr(own, generator.__name__, generator) if own is not None else generator


def _own_module(arch: str, name: str) -> ModuleType | None:
    package, prefix = _PACKAGES.get(arch), f"{_CPU}."
    if package is None or not name.startswith(prefix):
        return None
    own = f"{package}.{name.removeprefix(prefix)}"
    return importlib.import_module(own) if importlib.util.find_spec(own) is not None else None
