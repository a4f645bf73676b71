"""Scorers: how much the model loses where one layer gets one choice. One file each."""

from __future__ import annotations

from ...passes.pipeline import parse_instances, pass_text
from .base import Scorer, find

__all__ = ["parse_scorers", "scorer_text"]

#: `name{option=value}` with the options that differ from their defaults.
scorer_text = pass_text


def parse_scorers(text: str) -> list[Scorer]:
    """Scorers written like passes: `sqnr,hessian-trace{probes=32}`. Raises as `passes.pipeline.parse` does."""
    return parse_instances(text, find, "a scorer name")
