"""The text form of a pipeline.

    pipeline := pass (',' pass)*
    pass     := name [ '{' option (',' option)* '}' ]
    option   := key '=' value
    value    := true | false | none | integer | float | word | "quoted text" | '[' value (',' value)* ']'

`parse(text)` gives passes, `str(pipeline)` prints them back with defaults left out, and parse(str(p)) == p.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..ir.errors import OptionError, PipelineSyntaxError, UnknownNameError
from .base import Pass, find

T = TypeVar("T")
P = TypeVar("P", bound=Pass)

_TOKEN = re.compile(r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<word>[^\s,{}\[\]="]+)|(?P<mark>[,{}\[\]=]))')


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ",".join(pass_text(p) for p in self.passes)

    def __iter__(self):
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def cut_at(self, kind: type[P], search: str, wanted: str) -> tuple[Pipeline, P, Pipeline]:
        """The passes before the only one of a kind, that one, and those behind it.

        Args:
            search, wanted: what asks for it and what it asks for, for the message.

        Raises:
            OptionError: not exactly one.
        """
        places = [i for i, p in enumerate(self.passes) if isinstance(p, kind)]
        if len(places) != 1:
            raise OptionError(f"a {search} needs a pipeline with one {wanted}, but '{self}' has {len(places)}")
        found = self.passes[places[0]]
        assert isinstance(found, kind)
        return Pipeline(self.passes[: places[0]]), found, Pipeline(self.passes[places[0] + 1 :])


def pass_text(instance: Any) -> str:
    """`name{option=value,...}` with the options that differ from their defaults."""
    changed = []
    for option in dataclasses.fields(instance):  # type: ignore[arg-type]
        value = getattr(instance, option.name)
        default = option.default_factory() if callable(option.default_factory) else option.default  # type: ignore[misc]
        if value != default:
            changed.append(f"{option.name}={value_text(value)}")
    return instance.name + (f"{{{','.join(changed)}}}" if changed else "")


def value_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{','.join(value_text(v) for v in value)}]"
    if isinstance(value, str):
        plain = _TOKEN.fullmatch(value)
        safe = plain is not None and plain["word"] == value and _literal(value) == value
        return value if safe else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def parse(text: str) -> Pipeline:
    """Parses pipeline text.

    Raises:
        PipelineSyntaxError: with the position. UnknownNameError: a pass or option that does not exist, with the nearest name.
        OptionError: a value of the wrong type or out of range.
    """
    return Pipeline(tuple(parse_instances(text, find, "a pass name")))


def parse_instances(text: str, find: Callable[[str], type[T]], what: str) -> list[T]:
    """Reads `name{option=value,...},...` as instances of frozen dataclasses: passes, scorers, whatever `find` knows by name."""
    reader = _Reader(text)
    instances = []
    while not reader.done:
        if instances:
            reader.mark(",")
        name = reader.word(what)
        options: dict[str, Any] = {}
        if reader.peek() == "{":
            reader.mark("{")
            while reader.peek() != "}":
                if options:
                    reader.mark(",")
                key = reader.word("an option name")
                if key in options:
                    raise reader.error(f"option '{key}' of {name} is given twice, again before")
                reader.mark("=")
                options[key] = reader.value()
            reader.mark("}")
        instances.append(build(find(name), name, options))
    return instances


def build(cls: type[T], name: str, options: dict[str, Any]) -> T:
    """Makes one instance from option values, checking each against its field's type."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    converted = {}
    for key, value in options.items():
        if key not in fields:
            raise UnknownNameError(f"option of {name}", key, fields)
        converted[key] = _convert(value, hints[key], f"option '{key}' of {name}")
    return cls(**converted)


def type_text(hint: Any) -> str:
    """How a field's type reads in help and errors, such as `int`, `mse | min-max`, `list of int`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_text(a) for a in args)
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _convert(value: Any, hint: Any, what: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in args:
            try:
                return _convert(value, choice, what)
            except OptionError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(v, args[0], what) for v in value)
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    elif isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise OptionError(f"{what} must be {type_text(hint)}, not {value_text(value)}")


def _literal(word: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if word in constants:
        return constants[word]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


class _Reader:
    """Token by token over the text; every error points at its column."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    @property
    def done(self) -> bool:
        return not self.text[self.at :].strip()

    def _next(self, expected: str) -> re.Match[str]:
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            self._fail(expected, "the end of the text" if self.done else repr(self.text[self.at]))
        return match  # type: ignore[return-value]

    def _fail(self, expected: str, found: str) -> None:
        raise self.error(f"expected {expected} but found {found} at")

    def error(self, what: str) -> PipelineSyntaxError:
        """`what` with the column of the next token and a mark under it."""
        at = len(self.text) - len(self.text[self.at :].lstrip())
        return PipelineSyntaxError(f"{what} column {at + 1}\n  {self.text}\n  {' ' * at}^")

    def peek(self) -> str | None:
        match = _TOKEN.match(self.text, self.at)
        return match["mark"] if match else None

    def mark(self, expected: str) -> None:
        match = self._next(f"'{expected}'")
        if match["mark"] != expected:
            self._fail(f"'{expected}'", f"'{match[0].strip()}'")
        self.at = match.end()

    def word(self, expected: str) -> str:
        match = self._next(expected)
        if match["word"] is None:
            self._fail(expected, f"'{match[0].strip()}'")
        self.at = match.end()
        return match["word"]

    def value(self) -> Any:
        if self.peek() == "[":
            self.mark("[")
            values: list[Any] = []
            while self.peek() != "]":
                if values:
                    self.mark(",")
                values.append(self.value())
            self.mark("]")
            return values
        match = self._next("a value")
        if match["mark"] is not None:
            self._fail("a value", f"'{match['mark']}'")
        self.at = match.end()
        if match["text"] is not None:
            return re.sub(r"\\(.)", r"\1", match["text"][1:-1])
        return _literal(match["word"])
