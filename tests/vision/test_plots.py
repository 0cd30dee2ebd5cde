"""Line charts: where the ink is, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.errors import InputError
from foveate.vision.plots import PALETTE, _span, _tick_names, _ticks, line_chart


def ink(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(N, 2) x and y of the pixels of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    return np.stack([columns, rows], axis=1)


def plot_ink(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """The same, without the legend of a chart without title that has one row of labels."""
    found = ink(picture, colour)
    return found[found[:, 1] > 45]


def test_picture_has_the_asked_size_and_a_white_ground() -> None:
    picture = line_chart({"a": ([0, 1], [0, 1])})
    assert picture.size == (800, 500)
    assert picture.mode == "RGB"
    assert line_chart({"a": ([0, 1], [0, 1])}, size=(400, 300)).size == (400, 300)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_rising_line_rises_and_spans_the_plot() -> None:
    found = plot_ink(line_chart({"a": ([0, 1, 2], [0, 5, 10])}), PALETTE[0])
    left, right = found[found[:, 0].argmin()], found[found[:, 0].argmax()]
    assert left[1] > right[1], "pixels count downwards: a rising line ends higher up"
    assert right[0] - left[0] > 700
    assert left[1] - right[1] > 380
    middle = found[np.abs(found[:, 0] - (left[0] + right[0]) / 2) < 3]
    assert middle[:, 1].mean() == pytest.approx((left[1] + right[1]) / 2, abs=3)


def test_points_stand_where_their_numbers_say() -> None:
    """Second series at a quarter and three quarters of both axes."""
    picture = line_chart({"frame": ([0, 4], [0, 4]), "b": ([1, 3], [3, 1])})
    frame, b = plot_ink(picture, PALETTE[0]), plot_ink(picture, PALETTE[1])
    width, height = np.ptp(frame[:, 0]), np.ptp(frame[:, 1])
    assert (b[:, 0].min() - frame[:, 0].min()) / width == pytest.approx(0.25, abs=0.015)
    assert (b[:, 0].max() - frame[:, 0].min()) / width == pytest.approx(0.75, abs=0.015)
    assert (b[:, 1].min() - frame[:, 1].min()) / height == pytest.approx(0.25, abs=0.015)
    assert (b[:, 1].max() - frame[:, 1].min()) / height == pytest.approx(0.75, abs=0.015)


def test_names_take_the_place_of_numbers_and_dots_stand_alone() -> None:
    picture = line_chart({"a": ([0, 2], [0.5, 1.0])}, x_names=["small", "medium", "large"])
    found = plot_ink(picture, PALETTE[0])
    left, right = found[found[:, 0] < 400], found[found[:, 0] > 400]
    assert len(left) + len(right) == len(found) > 0
    assert np.ptp(left[:, 0]) < 14 > np.ptp(right[:, 0]), "no line joins them"
    assert right[:, 0].mean() - left[:, 0].mean() == pytest.approx(2 / 3 * 740, abs=15)
    with pytest.raises(InputError, match="x must be 0 to 1"):
        line_chart({"a": ([0, 2], [0.5, 1.0])}, x_names=["small", "large"])


def test_baseline_is_level_dashed_and_takes_part_in_the_range() -> None:
    picture = line_chart({"a": ([0, 1], [0.2, 0.4])}, baselines={"chance": 0.9})
    line, dashes = plot_ink(picture, PALETTE[0]), plot_ink(picture, PALETTE[1])
    assert np.ptp(dashes[:, 1]) <= 2
    assert dashes[:, 1].max() < line[:, 1].min(), "0.9 is above 0.4"
    columns = np.unique(dashes[:, 0])
    gaps = np.diff(columns)
    assert 0.4 < len(columns) / np.ptp(columns) < 0.75
    assert (gaps > 3).sum() > 40


def test_texts_leave_ink_and_cost_room_only_when_given() -> None:
    series = {"a": ([0.0, 1.0], [0.0, 1.0])}
    plain, labelled = line_chart(series), line_chart(series, title="Title", x_label="across", y_label="up")
    without, with_texts = plot_ink(plain, PALETTE[0]), plot_ink(labelled, PALETTE[0])
    assert with_texts[:, 0].min() - without[:, 0].min() == 24
    assert without[:, 1].max() - with_texts[:, 1].max() == 22
    dark = np.asarray(labelled).max(axis=-1) < 128
    assert dark[8:34, 60:120].sum() > 30
    assert dark[480:495, 380:480].sum() > 30
    assert dark[150:350, 8:28].sum() > 15


def test_long_legend_breaks_into_rows() -> None:
    names = [f"a rather long name of series number {k}" for k in range(6)]
    picture = line_chart({name: ([0, 1], [k, k + 1]) for k, name in enumerate(names)}, size=(700, 400))
    # An entry's swatch is the first ink of its colour from the top; three rows of two entries.
    rows = {int(ink(picture, PALETTE[k])[:, 1].min()) // 20 for k in range(6)}
    assert len(rows) == 3


def test_chart_is_deterministic() -> None:
    arguments = {"a": ([0.1, 0.2, 0.7], [0.3, 0.1, 0.9])}
    assert line_chart(arguments).tobytes() == line_chart(arguments).tobytes()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.1, 1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0, 100, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (-3, 7, [-3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]),
        (0.1, 0.30000000000000004, [0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24, 0.26, 0.28, 0.3]),
    ],
)
def test_ticks_by_hand(low: float, high: float, ticks: list[float]) -> None:
    assert _ticks(low, high, 10) == pytest.approx(ticks)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(1e-1, 1e6), st.integers(5, 12))
def test_ticks_cover_the_range_in_few_even_steps(low: float, length: float, most: int) -> None:
    ticks = _ticks(low, low + length, most)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= most + 1
    assert np.diff(ticks) == pytest.approx(step, rel=1e-6, abs=1e-9)
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= low + length - 1e-6 * step
    assert ticks[0] > low - step
    assert ticks[-1] < low + length + step
    assert len(set(_tick_names(ticks))) == len(ticks)


def test_tick_names_have_equal_decimals_and_no_negative_zero() -> None:
    assert _tick_names([-0.25, -0.0, 0.25]) == ["-0.25", "0.00", "0.25"]
    assert _tick_names([0, 20, 40]) == ["0", "20", "40"]


def test_y_axis_starts_at_zero_only_where_that_wastes_no_half() -> None:
    assert _span([0.4, 0.9], from_zero=True) == (0.0, 0.9)
    assert _span([0.8, 0.9], from_zero=True) == (0.8, 0.9)
    assert _span([-0.4, 0.9], from_zero=True) == (-0.4, 0.9)
    assert _span([3.0, 3.0]) == (1.5, 4.5)


@pytest.mark.parametrize(
    ("series", "baselines", "size", "sentence"),
    [
        ({}, {}, (800, 500), "at least one series"),
        ({"a": ([], [])}, {}, (800, 500), "'a' has 0 x and 0 y"),
        ({"a": ([1], [1, 2])}, {}, (800, 500), "'a' has 1 x and 2 y"),
        ({"a": ([1], [math.nan])}, {}, (800, 500), "'a' has a value that is not finite"),
        ({"a": (["one"], [1])}, {}, (800, 500), "'a' holds something that is not a number"),
        ({"a": ([1], [1])}, {"b": math.inf}, (800, 500), "'b' has a value that is not finite"),
        ({"a": ([1], [1])}, {"a": 1}, (800, 500), "'a' names both"),
        ({str(k): ([1], [1]) for k in range(len(PALETTE))}, {"b": 1}, (800, 500), "at most 10 lines, got 11"),
        ({"a": ([1], [1])}, {}, (100, 100), "at least 320 x 240 pixels, not 100 x 100"),
        ({"series " * 4 + str(k): ([1], [1]) for k in range(10)}, {}, (320, 240), "no room"),
    ],
)
def test_bad_input_is_a_clear_sentence(series: dict, baselines: dict, size: tuple[int, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        line_chart(series, baselines=baselines, size=size)
