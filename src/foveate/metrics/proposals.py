"""Region proposals against the objects that are there: recall, precision and average precision.

Matching and AP are COCOeval's for one category (Lin et al. 2014): by descending score, a proposal takes the free object
that it overlaps most; AP is the mean of the highest precision at 101 recalls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import InputError
from foveate.metrics._checks import boxes_array, float_array, labels_in
from foveate.metrics.detection import _box_iou


@dataclass(frozen=True, slots=True)
class ProposalImage:
    """Proposals and objects of one image.

    Attributes:
        boxes: `(N, 4)` xyxy pixels of the proposals.
        scores: `(N,)` confidences.
        target_boxes: `(M, 4)` xyxy pixels of the objects.
        counted: `(M,)` 1 = an object that must be found; 0 = one that may be: a proposal that takes it is neither right
            nor wrong.
    """

    boxes: Any
    scores: Any
    target_boxes: Any
    counted: Any


@dataclass(frozen=True, slots=True)
class ProposalResult:
    """Fractions, 0 to 1, over the objects of all images.

    Attributes:
        recall: share of the counted objects that were found.
        precision: share of right proposals among the right and the wrong ones; NaN if there is no proposal.
        average_precision: area under the curve of precision over recall.
        objects: how many objects are counted.
        matched: per image, the object that each proposal took, -1 for none, in the order of the proposals.
    """

    recall: float
    precision: float
    average_precision: float
    objects: int
    matched: tuple[np.ndarray, ...]


def evaluate_proposals(images: Sequence[ProposalImage], iou_threshold: float = 0.5) -> ProposalResult:
    """Recall, precision and AP of all proposals given: apply the score threshold first.

    Args:
        images: proposals and objects of each image.
        iou_threshold: in (0, 1]; a proposal takes an object if they overlap by at least this IoU.

    Raises:
        InputError: a box, score or flag is malformed (the sentence names the image), the threshold is out of range, or
            no object is counted.
    """
    if not 0 < iou_threshold <= 1:
        raise InputError(f"iou_threshold must be above 0 and at most 1, got {iou_threshold}.")
    matched: list[np.ndarray] = []
    right: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    objects = 0
    for index, image in enumerate(images):
        try:
            boxes, targets = boxes_array(image.boxes, "boxes"), boxes_array(image.target_boxes, "target_boxes")
            confidence = float_array(image.scores, "scores", (len(boxes),))
            counted = labels_in(image.counted, "counted", (len(targets),), (0, 1)) == 1
        except InputError as error:
            raise InputError(f"images[{index}]: {error}") from None
        order = np.argsort(-confidence, kind="stable")
        took = np.full(len(boxes), -1)
        took[order] = _match(_box_iou(boxes[order], targets), counted, iou_threshold)
        judged = order[(took[order] < 0) | counted[took[order]]] if len(targets) else order
        matched.append(took)
        right.append(took[judged] >= 0)
        scores.append(confidence[judged])
        objects += int(counted.sum())
    if objects == 0:
        raise InputError("No object is counted, so recall is undefined; give images with objects.")
    confidence = np.concatenate(scores)
    hits = np.concatenate(right)[np.argsort(-confidence, kind="stable")]
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    best_from_here = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    start = np.searchsorted(found / objects, np.linspace(0, 1, 101), side="left")
    return ProposalResult(
        recall=float(hits.sum() / objects),
        precision=float(hits.mean()) if len(hits) else float("nan"),
        average_precision=float(best_from_here[start].mean()),
        objects=objects,
        matched=tuple(matched),
    )


def _match(iou: np.ndarray, counted: np.ndarray, threshold: float) -> np.ndarray:
    """`(N, M)` IoU of proposals by descending score -> the object that each takes, or -1."""
    took = np.full(len(iou), -1)
    free = np.ones(len(counted), dtype=bool)
    for row, overlaps in enumerate(iou):
        # An object that must be found comes before one that may be, as in COCOeval.
        for candidates in (free & counted, free & ~counted):
            eligible = np.where(candidates, overlaps, -1.0)
            if eligible.size and eligible.max() >= threshold:
                took[row] = eligible.argmax()
                free[took[row]] = False
                break
    return took
