"""Dense-captioning mAP and recognition of ground-truth boxes, as DynRefer reports them (spec section 5).

Dense-captioning evaluation has three steps, because METEOR is an outside program: `match_dense_captions` pairs
detections with merged ground truth, the caller scores `candidates` against `references` with METEOR, and
`dense_caption_map` turns the scores into mAP. The protocol is from Johnson et al., "DenseCap", CVPR 2016.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import InputError
from foveate.metrics._checks import boxes_array, float_array, int_array, labels_in, string_sequence
from foveate.metrics.classification import top_k_accuracy

MERGE_IOU = 0.7
IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
METEOR_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)


@dataclass(frozen=True, slots=True)
class DenseCaptionImage:
    """Detections and ground truth of one image.

    Attributes:
        boxes: `(N, 4)` xyxy pixels of the detections.
        scores: `(N,)` confidences.
        captions: N captions of the detections.
        target_boxes: `(M, 4)` xyxy pixels of the ground truth, not merged.
        target_captions: M captions of the ground truth.
    """

    boxes: Any
    scores: Any
    captions: Sequence[str]
    target_boxes: Any
    target_captions: Sequence[str]


@dataclass(frozen=True, slots=True)
class DenseCaptionRecords:
    """What `match_dense_captions` found; one record per detection, image by image, by descending score within an image.

    Attributes:
        scores: `(R,)` float32.
        overlaps: `(R,)` float64 IoU with the best merged ground-truth box.
        matched: `(R,)` bool: the IoU is positive and no higher-scoring detection of the image has that box.
        candidates: R captions.
        references: R tuples of captions of the best ground-truth box, empty where the IoU is 0.
        image_indices: `(R,)` position of the image in the input.
        positives: merged ground-truth boxes of the images with at least one detection.
        skipped_positives: merged ground-truth boxes of the images without any.
    """

    scores: np.ndarray
    overlaps: np.ndarray
    matched: np.ndarray
    candidates: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    image_indices: np.ndarray
    positives: int
    skipped_positives: int


@dataclass(frozen=True, slots=True)
class DenseCaptionResult:
    """Fractions, 0 to 1.

    Attributes:
        map: mean of `average_precisions`.
        det_map: mean of `det_average_precisions`, localisation only.
        average_precisions: AP by (IoU threshold, METEOR threshold), 5 x 6.
        det_average_precisions: AP by IoU threshold with any caption accepted.
        positives: ground-truth count that recall is relative to.
    """

    map: float
    det_map: float
    average_precisions: dict[tuple[float, float], float]
    det_average_precisions: dict[float, float]
    positives: int


def merge_ground_truth(boxes: Any, captions: Sequence[str]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Merge ground-truth boxes that describe the same region.

    Repeatedly take the box with most neighbours (IoU >= 0.7, itself included; first on ties), replace it and them by
    their mean box with all their captions as references, and go on with the rest.

    Args:
        boxes: `(M, 4)` xyxy pixels.
        captions: M captions.

    Returns:
        `(G, 4)` float64 merged boxes in order of merging, and their G tuples of captions in input order.

    Raises:
        InputError: a box is malformed or there is not one caption for each.
    """
    boxes = _as_float32(boxes_array(boxes, "target_boxes"))
    captions = _captions(captions, "target_captions", len(boxes))
    neighbours = _box_iou(boxes, boxes) >= MERGE_IOU
    # A box of no area overlaps nothing, not even itself; it still is one thing to find.
    np.fill_diagonal(neighbours, True)
    counts = neighbours.sum(axis=0)
    groups: list[np.ndarray] = []
    while len(counts) and counts.max() > 1:
        group = np.flatnonzero(neighbours[counts.argmax()])
        groups.append(group)
        counts -= neighbours[group].sum(axis=0)
        neighbours[group] = False
        neighbours[:, group] = False
        counts[group] = 0
    groups.extend(np.flatnonzero(counts)[:, None])
    merged = np.zeros((len(groups), 4))
    for index, group in enumerate(groups):
        merged[index] = boxes[group].mean(axis=0)
    return merged, [tuple(captions[member] for member in group) for group in groups]


def match_dense_captions(images: Sequence[DenseCaptionImage]) -> DenseCaptionRecords:
    """Pair every detection with the merged ground-truth box of highest IoU; there is no second choice.

    Like the reference evaluation, coordinates and scores are rounded to float32; `torch.sort` sorts, and its order
    of equal scores is not specified. IoU is then computed in float64.

    Raises:
        InputError: a box, score or caption is malformed (the sentence names the image), or there are no images.
    """
    if not len(images):
        raise InputError("There are no images to evaluate; give at least one.")
    scores: list[np.ndarray] = []
    overlaps: list[np.ndarray] = []
    matched: list[np.ndarray] = []
    counts: list[int] = []
    candidates: list[str] = []
    references: list[tuple[str, ...]] = []
    positives = skipped = 0
    for index, image in enumerate(images):
        try:
            boxes = _as_float32(boxes_array(image.boxes, "boxes"))
            confidence = float_array(image.scores, "scores", (len(boxes),)).astype(np.float32)
            captions = _captions(image.captions, "captions", len(boxes))
            merged, merged_captions = merge_ground_truth(image.target_boxes, image.target_captions)
        except InputError as error:
            raise InputError(f"images[{index}]: {error}") from None
        counts.append(len(boxes))
        if not len(boxes):
            skipped += len(merged)
            continue
        positives += len(merged)
        order = _descending(confidence)
        iou = _box_iou(boxes[order], merged)
        if len(merged):
            best = iou.argmax(axis=1)
            overlap = np.take_along_axis(iou, best[:, None], axis=1)[:, 0]
        else:
            best = np.zeros(len(boxes), dtype=np.int64)
            overlap = np.zeros(len(boxes))
        first = np.zeros(len(boxes), dtype=bool)
        touching = np.flatnonzero(overlap > 0)
        first[touching[np.unique(best[touching], return_index=True)[1]]] = True
        scores.append(confidence[order])
        overlaps.append(overlap)
        matched.append(first)
        candidates.extend(captions[i] for i in order)
        references.extend(merged_captions[target] if hit else () for target, hit in zip(best, overlap > 0, strict=True))
    return DenseCaptionRecords(
        scores=np.concatenate([*scores, np.zeros(0, np.float32)]),
        overlaps=np.concatenate([*overlaps, np.zeros(0)]),
        matched=np.concatenate([*matched, np.zeros(0, bool)]),
        candidates=tuple(candidates),
        references=tuple(references),
        image_indices=np.repeat(np.arange(len(images)), counts),
        positives=positives,
        skipped_positives=skipped,
    )


def dense_caption_map(records: DenseCaptionRecords, meteors: Any, *, strict_npos: bool = False) -> DenseCaptionResult:
    """mAP over IoU thresholds .3 to .7 and METEOR thresholds 0 to .25.

    A record is a true positive iff it is `matched`, its IoU >= the threshold and its METEOR > the threshold (strictly).
    AP is the mean, over recall 0, .01, ..., .99, of the highest precision at that recall or beyond (0 if unreached).

    Args:
        records: of `match_dense_captions`.
        meteors: `(R,)` METEOR, 0 to 1, of each record's candidate against its references (any value where none).
        strict_npos: count ground truth of images without any detection too. The published protocol leaves it out.

    Raises:
        InputError: `meteors` does not fit the records or is outside [0, 1], or no ground truth is counted.
    """
    meteors = float_array(meteors, "meteors", (len(records.scores),))
    outside = (meteors < 0) | (meteors > 1)
    if outside.any():
        raise InputError(f"meteors holds {meteors[outside][0]}; METEOR is given as a fraction in [0, 1].")
    positives = records.positives + (records.skipped_positives if strict_npos else 0)
    if positives == 0:
        raise InputError("No ground-truth box is counted, so recall is undefined; give images with ground truth.")
    order = _descending(records.scores)
    overlaps, meteors = records.overlaps[order], meteors[order]
    matched = records.matched[order]
    det: dict[float, float] = {}
    joint: dict[tuple[float, float], float] = {}
    for iou_threshold in IOU_THRESHOLDS:
        located = matched & (overlaps >= iou_threshold)
        det[iou_threshold] = _interpolated_ap(located, positives)
        for meteor_threshold in METEOR_THRESHOLDS:
            joint[iou_threshold, meteor_threshold] = _interpolated_ap(located & (meteors > meteor_threshold), positives)
    return DenseCaptionResult(
        map=float(np.mean(list(joint.values()))),
        det_map=float(np.mean(list(det.values()))),
        average_precisions=joint,
        det_average_precisions=det,
        positives=positives,
    )


@dataclass(frozen=True, slots=True)
class RecognitionResult:
    """Fractions, 0 to 1: top-1 `accuracy` over all annotations, COCO `map` (IoU .50:.95), `map50` and `map75`."""

    accuracy: float
    map: float
    map50: float
    map75: float


def coco_recognition(boxes: Any, labels: Any, image_ids: Any, logits: Any, *, crowd: Any = None) -> RecognitionResult:
    """Classify ground-truth boxes, measured as in the COCO recognition tables of region-level models.

    Accuracy is top-1 over *all* annotations, crowds included, not averaged by class. mAP is COCOeval's with one
    detection per ground-truth box: its argmax class, scored by the raw logit.

    Args:
        boxes: `(N, 4)` xyxy pixels of the annotations.
        labels: `(N,)` class indices in [0, K).
        image_ids: `(N,)` whole numbers.
        logits: `(N, K)` raw class scores.
        crowd: `(N,)` 1 = crowd annotation, ignored by mAP as COCOeval does; None = no crowds.

    Raises:
        InputError: shapes disagree, N is 0, a label is outside [0, K), a number is not finite, or all boxes are crowds.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    logits = float_array(logits, "logits", (None, None))
    accuracy = top_k_accuracy(logits, labels)
    boxes = boxes_array(boxes, "boxes")
    count = len(logits)
    if len(boxes) != count:
        raise InputError(f"There are {len(boxes)} boxes for {count} rows of logits; give one for each.")
    labels = int_array(labels, "labels", (count,))
    image_ids = int_array(image_ids, "image_ids", (count,))
    is_crowd = np.zeros(count, dtype=np.int64) if crowd is None else labels_in(crowd, "crowd", (count,), (0, 1))
    if is_crowd.all():
        raise InputError("All annotations are crowds, so there is nothing that mAP could count; give single objects.")

    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    predicted = logits.argmax(axis=1)
    truth: list[dict[str, Any]] = []
    detections: Any = []
    for i in range(count):
        shared = {"image_id": int(image_ids[i]), "bbox": xywh[i].tolist(), "area": float(xywh[i, 2] * xywh[i, 3])}
        truth.append(shared | {"id": i + 1, "category_id": int(labels[i]), "iscrowd": int(is_crowd[i])})
        detections.append(shared | {"category_id": int(predicted[i]), "score": float(logits[i, predicted[i]])})
    dataset = COCO()
    content: Any = {
        "images": [{"id": int(i)} for i in np.unique(image_ids)],
        "annotations": truth,
        "categories": [{"id": k, "name": str(k)} for k in range(logits.shape[1])],
    }
    dataset.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints a log that belongs to a terminal session.
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats
    return RecognitionResult(accuracy, float(stats[0]), float(stats[1]), float(stats[2]))


def _interpolated_ap(true_positive: np.ndarray, positives: int) -> float:
    """AP of records in descending order of score; recall, precision and grid in float32 (spec section 5)."""
    import torch

    if not true_positive.any():
        return 0.0
    found = np.cumsum(true_positive).astype(np.float32)
    recall = found / np.float32(positives)
    precision = found / np.arange(1, len(found) + 1, dtype=np.float32)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    # torch, not numpy, makes the grid: their last bits differ, and decide whether a recall of 9/20 reaches 0.45.
    grid = torch.arange(0, 1, 0.01).numpy()
    # Recall never falls, so the records with recall >= t are a suffix.
    start = np.searchsorted(recall, grid, side="left")
    reached = start < len(recall)
    return float(best_from_here[start[reached]].astype(np.float64).sum() / len(grid))


def _descending(scores: np.ndarray) -> np.ndarray:
    """Indices that sort float32 scores as the reference does; on tied scores a stable sort would give another mAP."""
    import torch

    return torch.sort(torch.from_numpy(scores), descending=True).indices.numpy()


def _as_float32(boxes: np.ndarray) -> np.ndarray:
    """float64 boxes with coordinates rounded to float32, the precision the reference evaluation stores them in."""
    return boxes.astype(np.float32).astype(np.float64)


def _box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`(N, 4)` and `(M, 4)` xyxy -> `(N, M)` IoU; 0 where both boxes have no area.

    numpy, because the torch version in `foveate.ops` would pull torch into a pure metric.
    """
    left_top = np.maximum(boxes[:, None, :2], others[None, :, :2])
    right_bottom = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    size = (right_bottom - left_top).clip(min=0)
    intersection = size[..., 0] * size[..., 1]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    other_area = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    union = area[:, None] + other_area[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _captions(captions: Sequence[str], name: str, count: int) -> list[str]:
    captions = string_sequence(captions, name)
    if len(captions) != count:
        raise InputError(f"{name} has {len(captions)} entries for {count} boxes; give one for each.")
    return captions
