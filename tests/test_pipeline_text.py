"""Pipeline text parses, prints back with defaults left out, and fails with a position and the nearest name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest
from graphwright.ir.errors import OptionError, PassError, PipelineSyntaxError, UnknownNameError
from graphwright.passes import base
from graphwright.passes.base import EXACT, Pass, PassResult, find, register, registry
from graphwright.passes.pipeline import Pipeline, build, parse, pass_text, type_text
from hypothesis import given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Options(Pass):
    """A pass with an option of every kind."""

    flag: bool = False
    count: int = 3
    ratio: float = 0.5
    text: str = "word"
    mode: Literal["mse", "min-max"] = "mse"
    limit: int | None = None
    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ("a",)

    name = "all-options"
    effect = EXACT

    def run(self, program, context):
        return PassResult(program, False)


@pytest.fixture(scope="module", autouse=True)
def registered():
    registry()
    register(Options)
    yield
    del base._PASSES.known["all-options"]


passes = st.builds(
    Options,
    flag=st.booleans(),
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    text=st.text(),
    mode=st.sampled_from(["mse", "min-max"]),
    limit=st.none() | st.integers(),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    names=st.lists(st.text(), max_size=3).map(tuple),
)


@given(st.lists(passes, max_size=3))
def test_parse_of_print_is_the_same_pipeline(instances):
    pipeline = Pipeline(tuple(instances))
    assert parse(str(pipeline)) == pipeline
    assert str(parse(str(pipeline))) == str(pipeline)


@given(st.text())
def test_any_text_parses_or_fails_with_a_typed_error(text):
    try:
        parse(text)
    except (PipelineSyntaxError, UnknownNameError, OptionError) as error:
        assert str(error)


def test_defaults_are_left_out():
    assert pass_text(Options()) == "all-options"
    assert pass_text(Options(count=4, flag=True)) == "all-options{flag=true,count=4}"


@pytest.mark.parametrize("value", ["true", "none", "1", "1.5", "nan", "", " a", "a,b", 'a"b', "a=b", "[a]", "1_000"])
def test_text_that_looks_like_something_else_is_quoted(value):
    instance = Options(text=value)
    escaped = value.replace('"', '\\"')
    assert pass_text(instance) == f'all-options{{text="{escaped}"}}'
    assert parse(pass_text(instance)).passes == (instance,)


def test_spaces_and_empty_forms():
    assert parse("").passes == ()
    assert parse("  ").passes == ()
    assert parse("all-options{}").passes == (Options(),)
    spaced = parse(" all-options { count = 4 , sizes = [ 1 , 2 ] , names = [ ] } , all-options ")
    assert spaced.passes == (Options(count=4, sizes=(1, 2), names=()), Options())


def test_an_integer_serves_as_float_but_not_the_other_way_round():
    (instance,) = parse("all-options{ratio=2}").passes
    assert instance.ratio == 2.0
    assert type(instance.ratio) is float
    assert parse("all-options{ratio=-inf}").passes[0].ratio == -math.inf
    with pytest.raises(OptionError, match=r"option 'count' of all-options must be int, not 2.0"):
        parse("all-options{count=2.0}")
    with pytest.raises(OptionError, match=r"option 'ratio' of all-options must be float, not nan"):
        parse("all-options{ratio=nan}")


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        (",all-options", 1, "expected a pass name but found ','"),
        ("all-options,", 13, "expected a pass name but found the end of the text"),
        ("all-options,  ,", 15, "expected a pass name but found ','"),
        ("all-options all-options", 13, "expected ',' but found 'all-options'"),
        ("all-options{", 13, "expected an option name but found the end of the text"),
        ("all-options{count", 18, "expected '=' but found the end of the text"),
        ("all-options{count=", 19, "expected a value but found the end of the text"),
        ("all-options{count=}", 19, "expected a value but found '}'"),
        ("all-options{count=1", 20, "expected ',' but found the end of the text"),
        ("all-options{count=1,}", 21, "expected an option name but found '}'"),
        ("all-options{count=1}x", 21, "expected ',' but found 'x'"),
        ("all-options{=1}", 13, "expected an option name but found '='"),
        ("all-options{sizes=[1 2]}", 22, "expected ',' but found '2'"),
        ("all-options{sizes=[1", 21, "expected ',' but found the end of the text"),
        ('all-options{text="abc}', 18, "expected a value but found '\"'"),
        ("all-options}", 12, "expected ',' but found '}'"),
        ("all-options{count=1,count=2}", 26, "option 'count' of all-options is given twice"),
    ],
)
def test_syntax_errors_point_at_the_column(text, column, message):
    with pytest.raises(PipelineSyntaxError) as caught:
        parse(text)
    first, shown, mark = str(caught.value).split("\n")
    assert message in first
    assert first.endswith(f"column {column}")
    assert shown == f"  {text}"
    assert mark == " " * (column + 1) + "^"


def test_unknown_names_carry_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown pass 'fold-batchnorm'; did you mean 'fold-batch-norm'\? known: .*canon"):
        parse("fold-batchnorm")
    with pytest.raises(UnknownNameError, match=r"unknown option of all-options 'cuont'; did you mean 'count'\?"):
        parse("all-options{cuont=1}")
    with pytest.raises(UnknownNameError, match=r"unknown option of remove-no-ops 'x'; known: \(none\)"):
        parse("remove-no-ops{x=1}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("flag=1", "'flag' of all-options must be bool, not 1"),
        ("count=true", "'count' of all-options must be int, not true"),
        ("ratio=x", "'ratio' of all-options must be float, not x"),
        ("text=1", "'text' of all-options must be str, not 1"),
        ("mode=msee", "'mode' of all-options must be mse | min-max, not msee"),
        ("limit=x", "'limit' of all-options must be int | none, not x"),
        ("sizes=1", "'sizes' of all-options must be list of int, not 1"),
        ("sizes=[a]", "'sizes' of all-options must be int, not a"),
    ],
)
def test_wrong_values_name_option_and_type(option, message):
    with pytest.raises(OptionError) as caught:
        parse(f"all-options{{{option}}}")
    assert str(caught.value) == f"option {message}"


def test_build_does_not_change_its_options():
    options = {"ratio": 2, "sizes": [1]}
    assert build(find("all-options"), "all-options", options) == Options(ratio=2.0, sizes=(1,))
    assert options == {"ratio": 2, "sizes": [1]}


def test_type_text_of_every_kind():
    assert type_text(int | None) == "int | none"
    assert type_text(Literal["a", "b"]) == "a | b"
    assert type_text(tuple[float, ...]) == "list of float"


def test_two_passes_of_one_name_are_an_error_that_names_both():
    @dataclass(frozen=True)
    class Other(Options):
        name = "all-options"

    with pytest.raises(PassError, match=r"pass 'all-options' is defined twice: .*Options and .*Other"):
        register(Other)
    assert register(Options) is Options


def test_every_registered_pass_prints_and_parses_back():
    for name, cls in registry().items():
        assert parse(name).passes == (cls(),)
        assert cls.__doc__, f"{name} has no docstring"
