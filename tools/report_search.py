"""The part of the page that shows a search: bits of every layer, scores by layer and choice, and the Pareto front."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..passes.quantize.formats import parse_format
from ..search.problem import Problem, Solution
from ..search.sensitivity.base import Scores
from ..search.solvers.bisection import Evaluation
from .report import SearchEvidence
from .report_style import OURS, PEER, SERIES, plot, styled

#: Above so many layers names no longer fit side by side.
MOST_NAMES = 40


def section(search: SearchEvidence) -> str:
    """Heading, figures and what to know when reading them, as HTML."""
    parts = ["<h2>Search: which layer gets which format</h2>", plot("bits", bits_figure(search.allocation))]
    parts.append(plot("front", front_figure(search.problem, search.front, search.metric, search.evaluations, search.chosen)))
    for number, scores in enumerate(search.scores):
        parts.append(plot(f"scores-{number}", scores_figure(scores)))
        if wide := scores.uncertain():
            names = html.escape(", ".join(wide[:8]) + (", ..." if len(wide) > 8 else ""))
            parts.append(
                f"<p>{len(wide)} of {len(scores.layers)} layers have a 95% interval wider than their score ({names}): "
                f"{scores.count} calibration samples are too few to rank them.</p>"
            )
    return "\n".join(parts)


def bits_figure(allocation: Mapping[str, str]) -> go.Figure:
    """One bar a layer, as high as its weights have bits, coloured by format. allocation: origin -> format, in graph order."""
    figure = go.Figure()
    bits = {name: parse_format(name).bits for name in allocation.values()}
    for index, name in enumerate(sorted(bits, key=lambda name: (-bits[name], name))):
        layers = [layer for layer, chosen in allocation.items() if chosen == name]
        bar = go.Bar(
            x=layers, y=[bits[name]] * len(layers), name=f"{name} ({len(layers)})", marker_color=_colour(index),
            hovertemplate="%{x}: " + name + "<extra></extra>",
        )  # fmt: skip
        figure.add_trace(bar)
    figure.update_layout(title_text="bits of each layer's weights", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    figure.update_yaxes(title_text="bits", tickvals=sorted({0, *bits.values()}), range=[0, max(bits.values(), default=8) * 1.05])
    _layer_axis(figure, list(allocation))
    return styled(figure, height=400, legend=True, top=90)


def scores_figure(scores: Scores) -> go.Figure:
    """Expected loss of each layer in each format with its 95% interval, log scale; a hollow mark at the foot is zero or less."""
    figure = go.Figure()
    known = scores.loss[scores.loss > 0]
    floor = 10 ** math.floor(math.log10(known.min())) if known.size else 1e-6
    for index, choice in enumerate(scores.choices):
        loss, half = scores.loss[:, index], scores.half_width[:, index]
        shown = np.maximum(loss, floor)
        # The lower end of an interval that reaches zero or less ends at the foot: a log axis has no zero.
        below = np.clip(half - (shown - loss), 0.0, shown - floor)
        above = np.clip(loss + half - shown, 0.0, None)
        texts = [f"{v:.3g} ± {h:.2g}" for v, h in zip(loss, half, strict=True)]
        marks = go.Scatter(
            x=list(scores.layers), y=shown, name=choice, mode="markers", text=texts, offsetgroup=choice,
            marker={"color": _colour(index), "size": 7, "symbol": ["circle" if v > 0 else "circle-open" for v in loss]},
            error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 2},
            hovertemplate="%{x}, " + choice + ": %{text}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(marks)
    title = f"{scores.scorer}: expected loss of each layer by format, {scores.count} samples, 95% intervals"
    figure.update_layout(title_text=title, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    # Side by side within a layer: intervals of one layer's formats would hide each other.
    figure.update_layout(scattermode="group", scattergap=0.35)
    top = float((scores.loss + scores.half_width).max(initial=floor))
    ends = [math.log10(floor) - 0.25, math.log10(max(top, floor)) + 0.15]
    figure.update_yaxes(type="log", dtick=1, exponentformat="power", range=ends)
    _layer_axis(figure, list(scores.layers))
    return styled(figure, height=480, legend=True, top=90)


def front_figure(
    problem: Problem,
    front: Sequence[Solution],
    metric: str,
    evaluations: Sequence[Evaluation] = (),
    chosen: Solution | None = None,
) -> go.Figure:
    """Loss of the plans of the front against `metric`, and beside it the score of those that were really evaluated.

    Each mark names how many layers have which format; the plan taken is ringed.
    """
    titles = [f"{len(front)} plans none of which is beaten: loss by {metric}"]
    titles += [f"evaluated: score by {metric}"] if evaluations else []
    figure = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=0.09)
    values = [plan.totals[metric] for plan in (*front, *(e.solution for e in evaluations), *([chosen] if chosen else []))]
    unit, scale = _unit(metric, max(values, default=1.0))

    def marks(plans: Sequence[Solution], heights: Sequence[float], name: str, **style: object) -> go.Scatter:
        texts = [_mix(problem, plan) for plan in plans]
        hover = "%{x:.4g} " + unit + ", " + name + " %{y:.5g}<br>%{text}<extra></extra>"
        return go.Scatter(x=[plan.totals[metric] / scale for plan in plans], y=heights, text=texts, hovertemplate=hover, **style)

    line = {"mode": "lines+markers", "line": {"color": OURS, "width": 1, "shape": "hv"}, "marker": {"size": 5, "color": OURS}}
    figure.add_trace(marks(front, [plan.loss for plan in front], "loss", **line), 1, 1)
    if evaluations:
        scores = [e.score for e in evaluations]
        # Hundredths are what plans differ by: one score alone would get an axis from far below to far above it.
        pad = max(0.15 * (max(scores) - min(scores)), 0.005)
        figure.update_yaxes(range=[min(scores) - pad, max(scores) + pad], row=1, col=2)
        dots = {"mode": "markers", "marker": {"size": 9, "color": PEER}}
        measured = sorted(evaluations, key=lambda e: e.solution.totals[metric])
        figure.add_trace(marks([e.solution for e in measured], [e.score for e in measured], "score", **dots), 1, 2)
    ring = {"mode": "markers", "marker": {"size": 15, "symbol": "circle-open", "color": "#d55e00", "line": {"width": 2.5}}}
    if chosen:
        figure.add_trace(marks([chosen], [chosen.loss], "loss", **ring), 1, 1)
        taken = [e.score for e in evaluations if e.solution.chosen == chosen.chosen]
        if taken:
            figure.add_trace(marks([chosen], taken[:1], "score", **ring), 1, 2)
    losses = [plan.loss for plan in front]
    if losses and min(losses) > 0 and max(losses) > 30 * min(losses):
        figure.update_yaxes(type="log", dtick=1, exponentformat="power", row=1, col=1)
    figure.update_xaxes(title_text=unit)
    return styled(figure, height=420)


def _mix(problem: Problem, plan: Solution) -> str:
    counts = Counter(problem.names(plan.chosen).values())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _unit(metric: str, largest: float) -> tuple[str, float]:
    """Axis text and what values are divided by."""
    if not metric.endswith("_bytes"):
        return metric, 1.0
    return ("MB", 1e6) if largest >= 1e5 else ("kB", 1e3)


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _layer_axis(figure: go.Figure, layers: list[str]) -> None:
    many = len(layers) > MOST_NAMES
    figure.update_xaxes(
        categoryorder="array", categoryarray=layers, range=[-0.6, len(layers) - 0.4], tickangle=-60, tickfont_size=10,
        showticklabels=not many, title_text=f"{len(layers)} layers in graph order" if many else "",
    )  # fmt: skip
