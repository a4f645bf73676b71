"""Criteria: how much each atom of a group of coupled channels is worth. One file each."""

from __future__ import annotations

from ....ir.errors import OptionError
from ...pipeline import parse_instances, pass_text
from .base import Criterion, find

__all__ = ["criterion_text", "parse_criterion"]

#: `name{option=value}` with the options that differ from their defaults.
criterion_text = pass_text


def parse_criterion(text: str) -> Criterion:
    """A criterion written like a pass: `thinet{samples=64}`. Raises as `passes.pipeline.parse` does, OptionError for several."""
    found = parse_instances(text, find, "a criterion name")
    if len(found) != 1:
        raise OptionError(f"channels are ranked by one criterion, not '{text}'")
    return found[0]
