"""Bisection over the Pareto front to an accuracy target, by real evaluations.

Additive scores order plans; what a plan really scores is measured. "Augmenting Hessians with Inter-Layer Dependencies" (Schaefer
et al., 2023) searches its list of plans so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...ir.content import content_key
from ..problem import InfeasibleError, Solution
from ..store import Store


@dataclass(frozen=True)
class Evaluation:
    """A plan and what it really scores."""

    solution: Solution
    score: float


@dataclass(frozen=True)
class Found:
    """The smallest plan that meets the target, and every evaluation made, in order."""

    solution: Solution
    score: float
    evaluations: tuple[Evaluation, ...]


def solve(
    front: Sequence[Solution],
    metric: str,
    evaluate: Callable[[tuple[int, ...]], float],
    target: float,
    *,
    store: Store | None = None,
    key: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Found:
    """The plan of least `metric` on the front whose score is at least `target`; log2 of the front's length evaluations.

    Scores are taken to rise along the front. Where noise breaks that, the answer still meets the target as measured, and the
    nearest smaller plan of the front does not.

    Args:
        front: as `pareto.front` gives it.
        evaluate: chosen -> score, higher is better; one that is not a number meets no target.
        store: keeps the scores found under `key`, so that a run that was killed goes on where it was.
        key: names all that a score depends on besides the plan: program, calibration and evaluation data, quantizer.

    Raises:
        InfeasibleError: no plan evaluated meets the target; its `smallest` holds the score of the last plan.
        ValueError: the front is empty.
    """
    if not front:
        raise ValueError("the front holds no plan")
    plans = sorted(front, key=lambda plan: plan.totals[metric])
    kept, made = store or Store(), []

    def score(index: int) -> float:
        chosen = plans[index].chosen
        value = float(kept.remember("evaluation", content_key(key, chosen), lambda: float(evaluate(chosen))))
        made.append(Evaluation(plans[index], value))
        progress(len(made), len(plans).bit_length() + 1, f"{metric} {plans[index].totals[metric]:.6g}: score {value:.6g}")
        return value

    best, reached = len(plans) - 1, score(len(plans) - 1)
    if not reached >= target:
        value = plans[-1].totals[metric]
        raise InfeasibleError(
            f"score: target {target:.10g}, but the plan of the front's largest {metric} ({value:.10g}) reaches {reached:.10g}; "
            "lower the target, raise the limits, or offer larger choices",
            {"score": reached},
        )
    low = -1
    while best - low > 1:
        middle = (low + best) // 2
        value = score(middle)
        if value >= target:
            best, reached = middle, value
        else:
            low = middle
    return Found(plans[best], reached, tuple(made))
