"""Segmentations of all three COCO kinds, and damaged ones, which the decoder in C must never see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foveate.data.masks import check_segmentation, segmentation_to_rle
from foveate.data.records import BadRecord
from foveate.vision.images import decode_rle, encode_rle

masks = hnp.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(masks)
def test_compressed_round_trip(mask: np.ndarray) -> None:
    height, width = mask.shape
    rle = check_segmentation(encode_rle(mask), width, height)
    np.testing.assert_array_equal(decode_rle(segmentation_to_rle(rle, width, height)), mask)


@given(masks)
def test_uncompressed_run_lengths(mask: np.ndarray) -> None:
    height, width = mask.shape
    column_major = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(column_major, prepend=0))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    rle = segmentation_to_rle(
        check_segmentation({"size": [height, width], "counts": counts}, width, height), width, height
    )
    np.testing.assert_array_equal(decode_rle(rle), mask)
    assert isinstance(rle["counts"], str)


def test_polygon() -> None:
    polygons = [[2, 3, 7, 3, 7, 9, 2, 9], [10, 0, 12, 0, 12, 2, 10, 2]]
    expected = np.zeros((12, 14), bool)
    expected[3:9, 2:7] = expected[0:2, 10:12] = True
    mask = decode_rle(segmentation_to_rle(check_segmentation(polygons, 14, 12), 14, 12))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("absent", [None, []])
def test_absent(absent: Any) -> None:
    assert check_segmentation(absent, 4, 4) is None


@pytest.mark.parametrize(
    "segmentation",
    [
        "polygon",
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[0, 0, 1e9, 0, 0, 3]],
        [[0, 0, float("nan"), 0, 0, 3]],
        [[0, 0, "3", 0, 0, 3]],
        {"counts": [16]},
        {"size": [4, 5], "counts": [16]},
        {"size": [4, 4], "counts": [17]},
        {"size": [4, 4], "counts": [20, -4]},
        {"size": [4, 4], "counts": "0" * 9},
        {"size": [4, 4], "counts": "o"},
        {"size": [4, 4], "counts": "\x00\xff"},
        {"size": [4, 4], "counts": None},
    ],
)
def test_damaged(segmentation: Any) -> None:
    with pytest.raises(BadRecord):
        check_segmentation(segmentation, 4, 4)
