"""Plans read back to what was written and refuse unknown keys."""

import json

import pytest
from graphwright.ir.errors import OptionError, UnknownNameError
from graphwright.tools.plan import Plan


def test_round_trip(tmp_path):
    plan = Plan("canonicalize", "x86:avx2", "m", {"max_drop": 0.01}, 3)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert Plan.read(path) == plan


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"pipeline": "a", "targte": "x86"}', UnknownNameError, "did you mean 'target'"),
        ('{"pipeline": "a"}', OptionError, "needs the text fields target"),
        ("[1]", OptionError, "must be a JSON object"),
        ("{", OptionError, "is not JSON"),
    ],
)
def test_bad_plans(tmp_path, text, error, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        Plan.read(path)


def test_a_missing_plan(tmp_path):
    with pytest.raises(OptionError, match="cannot read plan"):
        Plan.read(tmp_path / "none.json")
