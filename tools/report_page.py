"""The HTML page of a report: tables and plots in one file that loads nothing from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from ..backends.base import KernelRow
from ..passes.manager import CertificateRow
from .report import Measurement, Report, number_text, size_text
from .report_search import section
from .report_style import FLOAT, OURS, PEER, plot, styled

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2126;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem;width:100%}
th,td{padding:.3rem .6rem;border-bottom:1px solid #dfe3e8;text-align:left}
th{background:#f4f6f8}td:nth-child(n+2){font-variant-numeric:tabular-nums}
td:not(:first-child):not(:last-child){white-space:nowrap}td:first-child,td:last-child{overflow-wrap:anywhere}
td:first-child{min-width:7rem}td:last-child{min-width:18rem}
code{font-size:.9em;overflow-wrap:anywhere}
details{margin:.5rem 0 1.5rem}summary{cursor:pointer}
"""
#: A pass is named with its options up to so many characters: a plan's formats fill pages, and stand above in the pipeline.
_PASS_TEXT = 60
#: Entries shown of what a pass counted for each layer; the report's JSON has them all.
_ENTRIES = 6
_KINDS = {"designed": OURS, "generic": PEER, "island": "#d55e00"}


def page(report: Report) -> str:
    """The whole page; plotly.js (4.8 MB) is inside, once."""
    results = [
        [r.system, number_text(r.score, ".4f"), size_text(r.size_bytes), number_text(r.latency_ms, ".3f ms")] for r in report.rows
    ]
    passes = [
        [_shorter(r.text, r.name), r.effect, "yes" if r.modified else "no", f"{r.max_abs:.3g}", number_text(r.sqnr_db, ".1f dB"),
         f"{r.nodes_before} to {r.nodes_after}", f"{size_text(r.bytes_before)} to {size_text(r.bytes_after)}",
         f"{r.seconds:.1f} s", "; ".join(f"{name.replace('_', ' ')}: {_brief(value)}" for name, value in r.stats.items())]
        for r in report.certificate
    ]  # fmt: skip
    kernels = [[k.name, k.kind, f"{k.macs / 1e6:.2f} M", size_text(k.bytes), ", ".join(k.nodes)] for k in report.kernels]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(report.name)}: graphwright report</title>
<style>{_STYLE}</style><script>{get_plotlyjs()}</script>
<h1>{html.escape(report.name)} for {html.escape(report.target)}</h1>
<p>Pipeline <code>{html.escape(report.pipeline)}</code>, {report.seconds:.1f} s in all.</p>
{plot("result", result_figure(report.rows))}
{_table(["", "score", "size", "latency"], results)}<ul>{notes}</ul>
{section(report.search) if report.search else ""}
<h2>Certificate: what each pass did, and the evidence</h2>
{plot("certificate", certificate_figure(report.certificate)) if report.certificate else ""}
<p>Blue: exact up to float re-association; grey: within a declared bound; orange: lossy.</p>
{_table(["pass", "effect", "changed", "max |diff|", "SQNR", "nodes", "parameters", "time", "details"], passes)}
<h2>Kernels</h2>
{plot("kernels", kernel_figure(report.kernels)) if report.kernels else ""}
<details><summary>All {len(kernels)} kernels</summary>{_table(["kernel", "kind", "MACs", "bytes", "nodes"], kernels)}</details>
</html>
"""


def result_figure(rows: Sequence[Measurement]) -> go.Figure:
    """Score, size and latency side by side, one bar a system; a value that was not measured has no bar."""
    columns = [
        ("score", [r.score for r in rows], ".4f"),
        ("size (MB)", [r.size_bytes / 1e6 for r in rows], ".2f"),
        ("latency (ms)", [r.latency_ms for r in rows], ".3f"),
    ]
    columns = [c for c in columns if any(v is not None for v in c[1])]
    figure = make_subplots(1, len(columns), shared_yaxes=True, subplot_titles=[c[0] for c in columns], horizontal_spacing=0.05)
    names, colours = [r.system for r in rows], [_colour(r.system) for r in rows]
    for index, (_, values, form) in enumerate(columns, 1):
        texts = ["not measured" if v is None else f"{v:{form}}" for v in values]
        bar = go.Bar(
            x=[v or 0 for v in values], y=names, orientation="h", text=texts, marker_color=colours, cliponaxis=False,
            textposition="auto", hovertemplate="%{y}: %{text}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(bar, 1, index)
    figure.update_yaxes(autorange="reversed")
    return styled(figure, height=110 + 32 * len(rows))


def _colour(system: str) -> str:
    if "float" in system:
        return FLOAT
    return OURS if system.startswith("graphwright") or system in ("integer", "annotated", "canonical", "compressed") else PEER


def certificate_figure(rows: Sequence[CertificateRow]) -> go.Figure:
    """How far each pass moved the outputs (relative to the largest, log scale), and the parameter bytes it left."""
    figure = make_subplots(
        1, 2, subplot_titles=("change of the outputs, relative to the largest", "parameters after the pass (MB)")
    )
    names = [f"{r.index}. {r.name}" for r in rows]
    known = [r.relative if math.isfinite(r.relative) and r.relative > 0 else None for r in rows]
    texts = [f"{v:.1e}" if v else "none" if r.relative == 0 else "undefined" for v, r in zip(known, rows, strict=True)]
    floor = 10 ** (math.floor(math.log10(min([v for v in known if v], default=1e-7))) - 1)
    colours = [{"exact": OURS, "lossy": PEER}.get(r.effect, FLOAT) for r in rows]
    # A bar on a log axis needs a value above zero: passes that changed nothing get a stub at the axis.
    change = go.Bar(
        x=names, y=[v or floor * 1.05 for v in known], text=texts, marker_color=colours, customdata=[r.effect for r in rows],
        textposition="outside", cliponaxis=False, hovertemplate="%{x} (%{customdata}): %{text}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(change, 1, 1)
    sizes = [rows[0].bytes_before, *(r.bytes_after for r in rows)]
    # Below the line it came down from, a label would be crossed by it.
    places = ["top center", *("middle left" if b < 0.95 * a else "top center" for a, b in pairwise(sizes))]
    megabytes = go.Scatter(
        x=["captured", *names], y=[s / 1e6 for s in sizes], mode="lines+markers+text", line={"shape": "hv", "color": OURS},
        text=[f"{s / 1e6:.2f}" for s in sizes], textposition=places, cliponaxis=False,
        hovertemplate="%{x}: %{y:.3f} MB<extra></extra>",
    )  # fmt: skip
    figure.add_trace(megabytes, 1, 2)
    top = math.log10(max([v for v in known if v], default=1.0)) + 0.7
    figure.update_yaxes(type="log", exponentformat="power", range=[math.log10(floor), top], row=1, col=1)
    figure.update_yaxes(range=[0, 1.15e-6 * max(sizes)], row=1, col=2)
    return styled(figure, height=400)


def kernel_figure(kernels: Sequence[KernelRow]) -> go.Figure:
    """The share of each kind in number, multiply-accumulates and bytes moved, and the kernels with the most work."""
    titles = ("share by kind (%)", "most multiply-accumulates (millions)")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.25)
    measures = {"kernels": lambda k: 1, "MACs": lambda k: k.macs, "bytes moved": lambda k: k.bytes}
    totals = {name: sum(map(measure, kernels)) or 1 for name, measure in measures.items()}
    kinds = [kind for kind in _KINDS if any(k.kind == kind for k in kernels)]
    for kind in kinds:
        shares = [100 * sum(measure(k) for k in kernels if k.kind == kind) / totals[name] for name, measure in measures.items()]
        bar = go.Bar(
            x=shares, y=list(measures), orientation="h", name=kind, marker_color=_KINDS[kind],
            text=[f"{s:.0f}%" if s >= 4 else "" for s in shares], hovertemplate="%{y}: %{x:.1f}%<extra>" + kind + "</extra>",
        )  # fmt: skip
        figure.add_trace(bar, 1, 1)
    largest = sorted((k for k in kernels if k.macs), key=lambda k: -k.macs)[:12]
    work = go.Bar(
        x=[k.macs / 1e6 for k in largest], y=[k.nodes[0] for k in largest], orientation="h", showlegend=False,
        marker_color=[_KINDS[k.kind] for k in largest], customdata=[k.name for k in largest],
        hovertemplate="%{y} (%{customdata}): %{x:.2f} M<extra></extra>",
    )  # fmt: skip
    figure.add_trace(work, 1, 2)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(barmode="stack", legend={"orientation": "h", "y": -0.12})
    return styled(figure, height=420, legend=True)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _shorter(text: str, name: str) -> str:
    return text if len(text) <= _PASS_TEXT else f"{name}{{...}}"


def _brief(value: Any) -> str:
    """A statistic as text: numbers of four digits, the first entries of lists and tables."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, (dict, list, tuple)):
        return str(value)
    entries = [f"{k} {_brief(v)}" for k, v in value.items()] if isinstance(value, dict) else [_brief(v) for v in value]
    if not entries:
        return "none"
    more = f", ... {len(entries)} in all" if len(entries) > _ENTRIES else ""
    return f"({', '.join(entries[:_ENTRIES])}{more})"
