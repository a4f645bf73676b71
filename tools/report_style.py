"""What the plots of the page have in common."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.io import to_html

#: Distinguishable in print and by colour-blind readers (Okabe and Ito, 2008).
FLOAT, OURS, PEER = "#999999", "#0072b2", "#e69f00"
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b5a900", "#000000", "#999999")
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#1c2126"}


def styled(figure: go.Figure, height: int, legend: bool = False, top: int = 40) -> go.Figure:
    margin = {"l": 10, "r": 30, "t": top, "b": 10}
    figure.update_layout(template="plotly_white", font=_FONT, height=height, showlegend=legend, margin=margin, bargap=0.25)
    figure.update_layout(title_font_size=16)
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def plot(name: str, figure: go.Figure) -> str:
    """The figure as a division of the page, without plotly.js."""
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return to_html(figure, config=config, include_plotlyjs=False, full_html=False, div_id=f"plot-{name}")
