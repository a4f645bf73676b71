"""Things known by name: classes that register themselves when their module is imported, found by importing a whole package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import MutableMapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import PassError, UnknownNameError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Name -> class of one kind, from every module of a package and from plug-ins.

    Attributes:
        kind: what an error calls them, such as `pass`.
        known: those whose modules have been imported so far.
    """

    def __init__(self, kind: str, package: str, entry_point_group: str | None = None) -> None:
        """entry_point_group: plug-ins of other distributions are loaded from this entry point group."""
        self.kind = kind
        self.known: MutableMapping[str, Any] = {}
        self._package = package
        self._group = entry_point_group
        self._complete = False

    def register(self, cls: C) -> C:
        """Class decorator: makes a class known under its `name`.

        Raises:
            PassError: another class has that name; both are named.
        """
        named: Any = cls
        other = self.known.get(named.name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            places = " and ".join(f"{c.__module__}.{c.__qualname__}" for c in (other, cls))
            raise PassError(f"the {self.kind} '{named.name}' is defined twice: {places}")
        self.known[named.name] = cls
        return cls

    def all(self) -> dict[str, type[T]]:
        """Every class by name, in order of the names."""
        if not self._complete:
            package = importlib.import_module(self._package)
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
            if self._group is not None:
                for plugin in entry_points(group=self._group):
                    self.register(plugin.load())
            self._complete = True
        return dict(sorted(self.known.items()))

    def find(self, name: str) -> type[T]:
        """Raises UnknownNameError, with the nearest name, where there is none."""
        known = self.all()
        if name not in known:
            raise UnknownNameError(self.kind, name, known)
        return known[name]
