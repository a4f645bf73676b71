"""The search's part of the page: every layer, format and plan is shown, and values a log axis cannot show are marked."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from graphwright.search.sensitivity.base import Scores
from graphwright.search.solvers import pareto
from graphwright.search.solvers.bisection import Evaluation
from graphwright.tools.bench.solvers import network
from graphwright.tools.report import Measurement, Report, SearchEvidence
from graphwright.tools.report_page import page
from graphwright.tools.report_search import bits_figure, front_figure, scores_figure
from plotly.offline import get_plotlyjs

PROBLEM = replace(network(0, items=9), choices=((*(f"int{b}" for b in (8, 7, 6, 5, 4, 3, 2)), "int2g64"),) * 9)
BYTES = replace(PROBLEM, limits=PROBLEM.limits[:1])
FRONT = tuple(pareto.front(BYTES, "weight_bytes", points=6))
CHOSEN = FRONT[len(FRONT) // 2]
SCORES = Scores(
    "<sqnr>", PROBLEM.items[:3], ("int8", "int4"), np.array([[1e-3, 0.2], [-1e-4, 0.1], [2e-3, 0.4]]),
    np.array([[1e-4, 0.1], [1e-3, 0.2], [5e-3, 0.0]]), 16,
)  # fmt: skip


def test_each_layer_has_one_bar_of_its_bits_in_the_colour_of_its_format():
    figure = bits_figure({"a": "int8", "b": "fp4e2m1g32", "c": "int4", "d": "int8"})
    assert [(bar.name, bar.x, bar.y) for bar in figure.data] == [
        ("int8 (2)", ("a", "d"), (8, 8)), ("fp4e2m1g32 (1)", ("b",), (4,)), ("int4 (1)", ("c",), (4,)),
    ]  # fmt: skip
    assert len({bar.marker.color for bar in figure.data}) == 3
    assert figure.layout.xaxis.categoryarray == ("a", "b", "c", "d"), "graph order, not the order of formats"


def test_scores_show_their_intervals_and_mark_what_a_log_axis_cannot():
    eight, four = scores_figure(SCORES).data
    assert eight.marker.symbol == ("circle", "circle-open", "circle") and min(eight.y) > 0
    assert eight.text[1] == "-0.0001 ± 0.001"
    low, high = np.array(eight.y) - eight.error_y.arrayminus, np.array(eight.y) + eight.error_y.array
    assert (low > 0).all() and high == pytest.approx([1.1e-3, 1e-3, 7e-3], rel=0.2)
    # The second interval reaches below zero and ends at the foot, 1e-3; the third has no width.
    assert four.error_y.arrayminus == pytest.approx([0.1, 0.099, 0.0]) and four.error_y.array[2] == 0.0


def test_the_front_shows_each_plan_what_it_holds_and_the_one_taken():
    evaluations = [Evaluation(FRONT[0], 0.7), Evaluation(FRONT[-1], 0.9), Evaluation(CHOSEN, 0.8)]
    loss, score, ring, ring_score = front_figure(BYTES, FRONT, "weight_bytes", evaluations, CHOSEN).data
    assert list(loss.y) == [plan.loss for plan in FRONT]
    assert loss.text[0] == "9 int2g64" and all(sum(map(int, re.findall(r"(\d+) u?int", text))) == 9 for text in loss.text)
    assert list(score.y) == [0.7, 0.8, 0.9], "by size"
    assert ring.y == (CHOSEN.loss,) and ring_score.y == (0.8,)
    assert len(front_figure(BYTES, FRONT, "weight_bytes").data) == 1


def test_the_page_holds_the_search_and_escapes_its_names():
    search = SearchEvidence(BYTES.names(CHOSEN.chosen), BYTES, "weight_bytes", FRONT, CHOSEN, scores=(SCORES,))
    report = Report("net", "cpu", "", (), (), (Measurement("float", 0.9, 10, None),), 1.0, search=search)
    text = page(report).replace(get_plotlyjs(), "")
    assert text.count("Plotly.newPlot") == 4 and not re.findall(r"<(?:link|img|iframe)|@import", text)
    assert "2 of 3 layers have a 95% interval wider than their score" in text and "<sqnr>" not in text
    kept = json.loads(json.dumps(report.to_json()))["search"]
    assert kept["chosen"]["chosen"] == search.allocation and len(kept["front"]) == len(FRONT)
