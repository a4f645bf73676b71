"""The report's page: every number has its mark, nothing is loaded from elsewhere, and odd values do not break it."""

import re
from dataclasses import replace

import pytest
from graphwright.backends.base import KernelRow
from graphwright.passes.manager import CertificateRow
from graphwright.tools.report import Measurement, Report
from graphwright.tools.report_page import certificate_figure, kernel_figure, page, result_figure
from plotly.offline import get_plotlyjs


def row(index, name, effect, relative, after):
    return CertificateRow(index, name, name, effect, True, "canonical", 0.1, 10, 8, 4000, after, 3, relative, relative, None)


CERTIFICATE = (
    row(1, "canonicalize", "exact", 0.0, 4000),
    row(2, "quantize", "lossy", 1e-2, 4200),
    row(3, "lower-integer", "bounded(0.25)", float("inf"), 1100),
)
KERNELS = (
    KernelRow("conv", ("convolution_1", "rescale_1"), "designed", 3_000_000, 1000),
    KernelRow("conv", ("convolution_2", "rescale_2"), "designed", 1_000_000, 1000),
    KernelRow("softmax", ("softmax",), "island", 0, 2000),
)
ROWS = (Measurement("float", 0.9, 4_000_000, None), Measurement("integer", 0.89, 1_100_000, 0.5))


@pytest.fixture(scope="module")
def text():
    report = Report("<net>", "cpu", "canonicalize", CERTIFICATE, KERNELS, ROWS, 1.0, ("a note",))
    return page(report).replace(get_plotlyjs(), "")


def test_the_page_loads_nothing_from_elsewhere(text):
    assert not re.findall(r"<(?:link|img|iframe)|@import|\\b(?:src|href)\\s*=", text)
    assert text.count("Plotly.newPlot") == 3


def test_names_are_escaped(text):
    assert "<net>" not in text and "&lt;net&gt;" in text


def test_a_report_without_passes_and_kernels_still_has_a_page():
    empty = page(Report("net", "cpu", "", (), (), ROWS, 1.0))
    assert empty.replace(get_plotlyjs(), "").count("Plotly.newPlot") == 1


def test_results_have_one_bar_a_system_and_none_where_nothing_was_measured():
    figure = result_figure(ROWS)
    assert [bar.text for bar in figure.data] == [("0.9000", "0.8900"), ("4.00", "1.10"), ("not measured", "0.500")]
    assert len(result_figure([Measurement("float", None, 10, None)]).data) == 1, "a column without any value is left out"


def test_the_certificate_names_passes_that_changed_nothing_or_everything():
    change, size = certificate_figure(CERTIFICATE).data
    assert change.text == ("none", "1.0e-02", "undefined") and min(change.y) > 0
    assert list(size.y) == [0.004, 0.004, 0.0042, 0.0011]


def test_statistics_are_rounded_and_long_ones_cut_at_an_entry():
    stats = {"layers": 8, "largest_relative": 0.123456789, "islands": [], "sqnr": {f"layer{i}": 40 + i / 7 for i in range(8)}}
    shown = page(Report("net", "cpu", "", (replace(CERTIFICATE[0], stats=stats),), (), ROWS, 1.0)).replace(get_plotlyjs(), "")
    assert "layers: 8; largest relative: 0.1235; islands: none; sqnr: (layer0 40, layer1 40.14," in shown
    assert "layer5 40.71, ... 8 in all)" in shown and "layer6" not in shown


def test_kernel_shares_add_up_and_the_largest_come_first():
    *kinds, largest = kernel_figure(KERNELS).data
    assert [bar.name for bar in kinds] == ["designed", "island"]
    assert [sum(shares) for shares in zip(*(bar.x for bar in kinds), strict=True)] == pytest.approx([100, 100, 100])
    assert largest.y == ("convolution_1", "convolution_2") and largest.x == (3.0, 1.0)


def test_a_limit_reached_exactly_is_met():
    """0.92 - 0.9 is a little more than 0.02 in floating point."""
    assert 0.92 - 0.9 > 0.02
    report = Report("net", "cpu", "", (), (), (Measurement("float", 0.92, 10, None), Measurement("integer", 0.9, 5, None)), 1.0)
    assert not report.unmet({"max_drop": 0.02}) and report.unmet({"max_drop": 0.0199})
