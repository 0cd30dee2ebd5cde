"""Recall, precision and AP of region proposals, by hand and against COCOeval."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any, cast

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from foveate.errors import InputError
from foveate.metrics.proposals import ProposalImage, evaluate_proposals

TARGETS = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]


def test_by_hand() -> None:
    # By score: finds object 1, finds nothing, a duplicate of object 1, finds object 0; object 2 is missed.
    boxes = [[0, 0, 10, 9], [20, 0, 30, 10], [60, 0, 70, 10], [20, 0, 30, 8]]
    result = evaluate_proposals([ProposalImage(boxes, [0.3, 0.9, 0.8, 0.7], TARGETS, [1, 1, 1])])
    assert result.recall == pytest.approx(2 / 3)
    assert result.precision == pytest.approx(2 / 4)
    assert result.matched[0].tolist() == [0, 1, -1, -1]
    # Precision 1 up to recall 1/3 (34 of 101 grid points), then 2/4 up to 2/3 (33 more), then nothing.
    assert result.average_precision == pytest.approx((34 * 1 + 33 * 0.5) / 101)


def test_threshold_is_inclusive() -> None:
    half = ProposalImage([[0, 0, 10, 5]], [1.0], TARGETS[:1], [1])
    assert evaluate_proposals([half], 0.5).recall == 1
    assert evaluate_proposals([half], 0.51).recall == 0


def test_objects_that_may_be_found_change_nothing() -> None:
    image = ProposalImage(TARGETS, [0.9, 0.8, 0.7], TARGETS, [1, 0, 1])
    result = evaluate_proposals([image])
    assert (result.recall, result.precision, result.objects) == (1, 1, 2)
    # An object that must be found goes first, even where another overlaps more.
    close = ProposalImage([[0, 0, 10, 10]], [1.0], [[0, 0, 10, 10], [0, 0, 10, 8]], [0, 1])
    assert evaluate_proposals([close]).matched[0].tolist() == [1]
    assert evaluate_proposals([close]).recall == 1


def test_empty_sides() -> None:
    result = evaluate_proposals([ProposalImage([], [], TARGETS, [1, 1, 1]), ProposalImage([], [], [], [])])
    assert (result.recall, result.average_precision) == (0, 0)
    assert math.isnan(result.precision)
    spurious = evaluate_proposals(
        [ProposalImage(TARGETS, [1, 1, 1], [], []), ProposalImage([], [], TARGETS, [1, 1, 1])]
    )
    assert (spurious.recall, spurious.precision) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_cocoeval(seed: int) -> None:
    draw = np.random.default_rng(seed)
    images, truth, detections = [], [], []
    for image_id in range(12):
        corners = draw.uniform(0, 80, (draw.integers(1, 6), 2))
        targets = np.concatenate([corners, corners + draw.uniform(20, 60, corners.shape)], axis=1)
        near = np.repeat(targets, 2, axis=0) + draw.uniform(-8, 8, (2 * len(targets), 4))
        boxes = near[draw.random(len(near)) < 0.8]
        scores = draw.random(len(boxes))
        images.append(ProposalImage(boxes, scores, targets, np.ones(len(targets), int)))
        for box in targets:
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            area = xywh[2] * xywh[3]
            shared = {"id": len(truth) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            truth.append(shared | {"bbox": xywh, "area": area})
        for box, score in zip(boxes, scores, strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            detections.append({"image_id": image_id, "category_id": 1, "bbox": xywh, "score": float(score)})
    dataset = COCO()
    content: Any = {"images": [{"id": k} for k in range(12)], "annotations": truth, "categories": [{"id": 1}]}
    dataset.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(cast(Any, detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    for threshold, row in ((0.5, 0), (0.7, 4)):
        result = evaluate_proposals(images, threshold)
        assert result.average_precision == pytest.approx(precision[row, :, 0, 0, -1].mean())
        assert result.recall == pytest.approx(recall[row, 0, 0, -1])


def test_bad_input() -> None:
    good = ProposalImage(TARGETS, [1, 1, 1], TARGETS, [1, 1, 1])
    with pytest.raises(InputError, match=r"images\[1\]: scores"):
        evaluate_proposals([good, ProposalImage(TARGETS, [1, math.nan, 1], TARGETS, [1, 1, 1])])
    with pytest.raises(InputError, match="counted"):
        evaluate_proposals([ProposalImage(TARGETS, [1, 1, 1], TARGETS, [1, 2, 1])])
    with pytest.raises(InputError, match="iou_threshold"):
        evaluate_proposals([good], 0)
    with pytest.raises(InputError, match="No object"):
        evaluate_proposals([ProposalImage(TARGETS, [1, 1, 1], [], [])])
    with pytest.raises(InputError, match="No object"):
        evaluate_proposals([])
