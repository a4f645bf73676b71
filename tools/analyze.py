"""Scores of every layer in every weight format, by one scorer or all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..ir.data import Calibration
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.pipeline import Pipeline
from ..search.planner import Request, Surroundings, prepare, score
from ..search.sensitivity import parse_scorers
from ..search.sensitivity.base import Scorer, Scores, registry
from ..search.store import Store
from .bit_search import BitSearch
from .progress import silent


def chosen_scorers(text: str, with_samples: bool, with_labels: bool) -> list[Scorer]:
    """Scorers by name, or for `all` every one that the data at hand allows."""
    if text != "all":
        found = parse_scorers(text)
        if not found:
            raise OptionError(f"name at least one scorer, or all; known: {', '.join(registry())}")
        return found
    return [
        cls() for cls in registry().values() if (with_samples or not cls.needs_samples) and (with_labels or not cls.needs_labels)
    ]


def analyze(
    program: Program,
    pipeline: Pipeline,
    scorers: Sequence[Scorer],
    options: BitSearch,
    calibration: Iterable[Any] | None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = silent,
) -> list[Scores]:
    """The score table of each scorer, on the program as the passes before `quantize` leave it; kept in `options.cache`.

    Raises:
        DataError: a scorer whose labels are missing, before anything runs.
    """
    for scorer in scorers:
        scorer.require_labels(options.labels)
    samples = None if calibration is None else Calibration.for_program(program, calibration)
    around = Surroundings(samples, options.labels, Store(options.cache), seed, progress)
    split, ready = prepare(program, pipeline, around)
    return [score(ready, split, Request(options.formats, scorer), around)[1] for scorer in scorers]
