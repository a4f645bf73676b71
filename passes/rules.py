"""`NAME=VALUE` items of pass options: which layers (or groups) they mean, and what each of them gets.

One form for all options: a name may be a glob (`blocks.*.fc1`), the last item that matches a name counts, and an item that
matches nothing is an error with the nearest name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from ..ir.errors import OptionError, UnknownNameError

V = TypeVar("V")


def split_rule(item: str, option: str, form: str) -> tuple[str, str]:
    """(pattern, value) of `PATTERN=VALUE`; the last `=` separates. Raises OptionError where it is not written so."""
    pattern, _, value = item.rpartition("=")
    if not pattern or not value:
        raise OptionError(f"'{item}' in {option} is no rule; write {form}")
    return pattern, value


def values_by_name(
    items: Sequence[str], names: Collection[str], option: str, form: str, parse: Callable[[str], V]
) -> dict[str, V]:
    """Name -> value of the last item that matches it; names that none matches are left out.

    Args:
        items: `PATTERN=VALUE` texts. names: all there are.
        option: what the items are, for messages, such as "'ranks' of factorize-svd".
        form: how an item is written, such as "LAYER=RANK, such as fc1=64".
        parse: makes a value of its text; its ValueError is one of the form, other errors are its own.

    Raises:
        OptionError: an item of another form. UnknownNameError: an item that matches nothing, with the nearest name.
    """
    found: dict[str, V] = {}
    for item in items:
        pattern, text = split_rule(item, option, form)
        try:
            value = parse(text)
        except ValueError as error:
            raise OptionError(f"'{item}' in {option} is no rule; write {form}") from error
        found.update(dict.fromkeys(matching([pattern], names, option), value))
    return found


def matching(patterns: Sequence[str], names: Collection[str], option: str) -> list[str]:
    """The names that a pattern matches, in their order. Raises UnknownNameError for a pattern that matches none."""
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise UnknownNameError(f"name in {option}:", pattern, names)
    return [name for name in dict.fromkeys(names) if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
