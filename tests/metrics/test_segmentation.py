"""Mean IoU and accuracies, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import InputError
from foveate.metrics.segmentation import IGNORE, SegmentationScore


def test_by_hand_over_two_images() -> None:
    score = SegmentationScore(4)
    score.add(np.array([[0, 0], [1, IGNORE]]), np.array([[0, 1], [1, 3]]))
    score.add(np.array([[1, 1]], np.uint8), np.array([[1, 0]], np.uint8))
    result = score.result()
    # class 0: 1 of the union of 3; class 1: 2 of 4; 2 never occurs; 3 is predicted on an ignored pixel only
    assert result.iou[:2].tolist() == pytest.approx([1 / 3, 1 / 2])
    assert np.isnan(result.iou[2:]).all()
    assert result.mean_iou == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result.mean_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.pixel_accuracy == pytest.approx(3 / 5)


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    score = SegmentationScore(3)
    score.add(np.zeros((2, 2), int), np.array([[0, 0], [0, 2]]))
    assert score.result().mean_iou == pytest.approx((3 / 4 + 0) / 2)
    assert score.result().mean_accuracy == pytest.approx(3 / 4)


def test_bad_input() -> None:
    score = SegmentationScore(2)
    with pytest.raises(InputError, match="no pixel was counted"):
        score.result()
    with pytest.raises(InputError, match="truth has the label 2, but there are 2 classes"):
        score.add(np.array([[2]]), np.array([[0]]))
    with pytest.raises(InputError, match="prediction has the label -1"):
        score.add(np.array([[0]]), np.array([[-1]]))
    with pytest.raises(InputError, match="integer maps of one shape"):
        score.add(np.array([[0]]), np.array([[0, 1]]))
    with pytest.raises(InputError, match="integer maps"):
        score.add(np.array([[0.0]]), np.array([[0]]))
    with pytest.raises(InputError, match="at most 255 classes"):
        SegmentationScore(256)
