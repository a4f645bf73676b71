"""Means with 95% confidence intervals over groups of samples, and what to say when the groups are too few."""

from __future__ import annotations

import math

import numpy as np

from .base import Scores, Task

#: 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student(degrees: int) -> float:
    """97.5% quantile of Student's t (Fisher's expansion beyond the table: within 0.001)."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(values: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over groups and the half-width of its 95% confidence interval.

    values (groups, ...) are means over `sizes` samples each; groups are independent, and so are their random probes, so that
    their spread holds both. With one group the half-width is infinite: nothing is known about the spread.
    """
    weights = (sizes / sizes.sum()).reshape(-1, *[1] * (values.ndim - 1))
    mean = (weights * values).sum(0)
    groups = len(values)
    if groups < 2:
        return mean, np.full_like(mean, np.inf)
    # Var(sum of w_g x_g) = sum of w_g^2 Var(x_g), and Var(x_g) = sigma^2 / size_g: sigma^2 by weighted squares.
    variance = (weights * np.square(values - mean)).sum(0) / (groups - 1)
    return mean, student(groups - 1) * np.sqrt(variance)


def exact(scorer: str, task: Task, loss: np.ndarray, seconds: float) -> Scores:
    """Scores that depend on no samples."""
    return Scores(scorer, tuple(x.origin for x in task.layers), task.choices, loss, np.zeros_like(loss), 0, seconds)


def sampled(scorer: str, task: Task, values: np.ndarray, sizes: np.ndarray, seconds: float) -> Scores:
    """Scores from losses (groups, layers, choices), means over `sizes` samples each."""
    loss, half_width = mean_interval(values, sizes)
    return Scores(scorer, tuple(x.origin for x in task.layers), task.choices, loss, half_width, int(sizes.sum()), seconds)


def calibration_warning(scores: Scores) -> str | None:
    """What to tell the user where the calibration set is too small for these scores; None where it is large enough."""
    uncertain = scores.uncertain()
    if not uncertain:
        return None
    if scores.count == 1:
        return (
            f"{scores.scorer}: one calibration sample gives no confidence interval; scores may be off by any amount: add samples"
        )
    relative = scores.half_width / np.maximum(np.abs(scores.loss), 1e-300)
    row, column = np.unravel_index(int(relative.argmax()), scores.loss.shape)
    loss, width = scores.loss[row, column], scores.half_width[row, column]
    # The width falls with the square root of the number of samples.
    wanted = math.ceil(scores.count * (width / abs(loss)) ** 2) if loss else None
    more = f"about {wanted} would do" if wanted and wanted < 100 * scores.count else "add samples"
    return (
        f"{scores.scorer}: {scores.count} calibration samples are too few for {len(uncertain)} of {len(scores.layers)} layers; "
        f"worst is '{scores.layers[row]}' as {scores.choices[column]}: {loss:.3g} +- {width:.2g} (95% interval); {more}"
    )
