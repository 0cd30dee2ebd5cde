"""Box conversion, clamp and overlap in plain numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.data.boxes import clamp_visual_genome_box, is_empty, pairwise_iou, xywh_to_xyxy, xyxy_to_xywh

whole = st.integers(-(2**20), 2**20)
sides = st.integers(0, 2**20)


@given(whole, whole, sides, sides)
def test_conversion_round_trip(x: int, y: int, width: int, height: int) -> None:
    box = xywh_to_xyxy(x, y, width, height)
    assert box == (x, y, x + width, y + height)
    assert xyxy_to_xywh(box) == (x, y, width, height)
    assert is_empty(box) == (width == 0 or height == 0)


@pytest.mark.parametrize(
    ("box", "clamped"),
    [
        ((0, 0, 10, 10), (1, 1, 10, 10)),  # the first row and column go, as in the original preparation
        ((-5, 3, 200, 90), (1, 3, 100, 80)),
        ((99.5, 79.5, 120, 100), (99, 79, 100, 80)),
        ((150, 10, 180, 20), (99, 10, 100, 20)),
        ((-9, 10, -2, 20), (1, 10, -2, 20)),  # comes out empty
    ],
)
def test_visual_genome_clamp(box: tuple, clamped: tuple) -> None:
    assert clamp_visual_genome_box(box, 100, 80) == clamped


@given(whole, whole, sides, sides)
def test_clamped_box_is_inside_or_empty(x: int, y: int, width: int, height: int) -> None:
    box = clamp_visual_genome_box(xywh_to_xyxy(x, y, width, height), 640, 480)
    assert is_empty(box) or (1 <= box[0] < box[2] <= 640 and 1 <= box[1] < box[3] <= 480)


def test_pairwise_iou_by_hand() -> None:
    first = np.array([[0, 0, 10, 10], [0, 0, 0, 0]])
    second = np.array([[5, 0, 15, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    np.testing.assert_allclose(pairwise_iou(first, second), [[50 / 150, 1, 0], [0, 0, 0]])
