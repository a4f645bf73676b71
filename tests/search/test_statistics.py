"""Confidence intervals, and the words for a calibration set that is too small."""

import numpy as np
import pytest
from graphwright.search.sensitivity.base import Scores
from graphwright.search.sensitivity.statistics import calibration_warning, mean_interval, student


def scores(loss, half_width, count=8) -> Scores:
    return Scores("some-scorer", ("a", "b"), ("int8", "int4"), np.array(loss), np.array(half_width), count)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (15, 2.131), (16, 2.120), (31, 2.040), (120, 1.980)])
def test_quantiles_of_students_t(degrees, quantile):
    assert student(degrees) == pytest.approx(quantile, abs=1e-3)


def test_intervals_hold_the_mean_as_often_as_they_say():
    random = np.random.default_rng(0)
    sizes = np.array([8, 8, 8, 7, 7])
    held = 0
    for _ in range(2000):
        groups = np.array([random.normal(3.0, 2.0, size).mean() for size in sizes])
        mean, width = mean_interval(groups, sizes)
        held += abs(mean - 3.0) <= width
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_mean_is_that_of_all_samples():
    mean, _ = mean_interval(np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([3, 1]))
    assert mean.tolist() == [1.75, 3.5]


def test_one_group_says_nothing_about_the_spread():
    _, width = mean_interval(np.array([[1.0]]), np.array([1]))
    assert np.isinf(width).all()


def test_a_warning_names_the_worst_layer_and_how_many_samples_would_do():
    warning = calibration_warning(scores([[1.0, 1.0], [1.0, 2.0]], [[0.1, 0.1], [0.2, 4.0]]))
    assert warning is not None
    assert "8 calibration samples are too few for 1 of 2 layers" in warning
    assert "'b' as int4: 2 +- 4" in warning and "about 32 would do" in warning


def test_one_sample_is_said_to_have_no_interval():
    warning = calibration_warning(scores([[1.0, 1.0], [1.0, 2.0]], np.full((2, 2), np.inf), count=1))
    assert warning is not None and "one calibration sample gives no confidence interval" in warning


def test_enough_samples_are_no_warning():
    assert calibration_warning(scores([[1.0, 1.0], [1.0, 2.0]], [[0.1, 0.1], [0.2, 0.4]])) is None
    assert calibration_warning(scores([[0.0, 1.0], [1.0, 2.0]], np.zeros((2, 2)))) is None


def test_scores_survive_json():
    before = scores([[1.0, 1.0], [1.0, 2.0]], [[0.1, np.inf], [0.2, 0.4]])
    assert Scores.from_json(before.to_json()).half_width.tolist() == before.half_width.tolist()
    assert before.to_json()["half_width"][0] == [0.1, None]
