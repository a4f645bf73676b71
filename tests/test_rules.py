"""NAME=VALUE items: globs, the last match counts, and what matches nothing is named with its nearest."""

from __future__ import annotations

import pytest
from graphwright.ir.errors import OptionError, UnknownNameError
from graphwright.passes.rules import matching, values_by_name
from quantize_models import ConvNet, prepared, run

NAMES = ("stem", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "odd[0]")
OPTION, FORM = "'ranks' of factorize-svd", "LAYER=RANK, such as fc1=64"


def values(*items):
    return values_by_name(items, NAMES, OPTION, FORM, int)


def test_the_last_item_that_matches_counts_and_the_rest_is_left_out():
    assert values("blocks.*=4", "blocks.1.*=8") == {"blocks.0.fc1": 4, "blocks.0.fc2": 4, "blocks.1.fc1": 8}
    assert values("stem=1", "stem=2") == {"stem": 2} and values() == {}


def test_a_name_with_the_signs_of_a_glob_is_found_as_it_is():
    assert values("odd[0]=3") == {"odd[0]": 3}


@pytest.mark.parametrize("item", ["stem", "=4", "stem=", "stem=four", ""])
def test_items_of_another_form_say_how_to_write_one(item):
    with pytest.raises(OptionError, match=f"'{item}' in {OPTION} is no rule; write LAYER=RANK, such as fc1=64"):
        values(item)


def test_what_matches_nothing_is_named_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=f"name in {OPTION}: 'steem'; did you mean 'stem'"):
        values("steem=4")
    with pytest.raises(UnknownNameError, match="'tail.\\*'"):
        matching(["stem", "tail.*"], NAMES, OPTION)


def test_matching_keeps_the_order_of_the_names():
    assert matching(["blocks.*", "st?m"], NAMES, OPTION) == ["stem", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1"]


@pytest.mark.parametrize(
    ("name", "option", "value", "form"),
    [
        ("quantize", "weights", "int4", "LAYER=FORMAT"),
        ("factorize-svd", "ranks", "4", "LAYER=RANK"),
        ("sparsify-magnitude", "layers", "0.5", "LAYER=SPARSITY"),
        ("prune-channels", "keep", "4", "GROUP=COUNT"),
    ],
)
def test_every_pass_reads_its_items_in_this_way(name, option, value, form):
    program, context = prepared(ConvNet, (1, 3, 16, 16))
    where = f"'{option}' of {name}"
    with pytest.raises(OptionError, match=f"'stem' in {where} is no rule; write {form}, such as"):
        run(program, f"{name}{{{option}=[stem]}}", context)
    with pytest.raises(UnknownNameError, match=f"name in {where}: 'steem'; did you mean 'stem'"):
        run(program, f'{name}{{{option}=["steem={value}"]}}', context)
    run(program, f'{name}{{{option}=["st?m={value}"]}}', context)
