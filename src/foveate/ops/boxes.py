"""Boxes: formats, areas, overlap, clipping, suppression and the check of boxes that come from outside.

Boxes are xyxy absolute pixels, x right, y down, half-open, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from foveate.errors import InputError

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]

# What a box may overhang its image and still count as inside: arithmetic of other tools leaves such residues.
_TOLERANCE = 0.01
# Boxes that suppress one another in one step of NMS; bounds its memory to this many boxes times those kept.
_NMS_BLOCK = 1024


def as_box_tensor(boxes: Tensor) -> Tensor:
    """`boxes` as a real floating tensor (..., 4): integers become float32, floats keep their dtype."""
    if not isinstance(boxes, Tensor) or boxes.shape[-1:] != (4,) or boxes.is_complex() or boxes.dtype == torch.bool:
        shown = f"{tuple(boxes.shape)} {boxes.dtype}" if isinstance(boxes, Tensor) else type(boxes).__name__
        raise InputError(f"boxes must be a tensor of real numbers of shape (..., 4), got {shown}.")
    return boxes if boxes.is_floating_point() else boxes.to(torch.float32)


def validate_boxes(boxes: Any, image_size: tuple[int, int] | None = None) -> Tensor:
    """Check boxes that a caller, a file or a detector gave, and return them as a tensor. Nothing is repaired.

    Args:
        boxes: R boxes xyxy in pixels: nested sequences, an array or a tensor (R, 4). An empty sequence is R = 0.
        image_size: (height, width) in pixels; if given, boxes must lie inside, up to 0.01 pixels.

    Returns:
        (R, 4) float32, or float64 for a float64 tensor.

    Raises:
        InputError: another shape, something that is not a number, NaN or infinity, x2 <= x1, y2 <= y1, or a box that
            leaves the image. The message names the first wrong box.
    """
    if isinstance(boxes, Tensor):
        values = boxes
    elif isinstance(boxes, (np.ndarray, Sequence)) and not isinstance(boxes, (str, bytes)):
        try:
            array = np.asarray(boxes)
            # NumPy takes True for 1 where it stands among numbers.
            for index, value in enumerate([] if isinstance(boxes, np.ndarray) else np.asarray(boxes, object).flat):
                if isinstance(value, (bool, np.bool_)):
                    raise ValueError(f"box {index // 4} holds {value}, which is not a number")
            if array.dtype == object or array.dtype.kind not in "iuf":
                raise ValueError(f"a value of type {array.dtype}")
            values = torch.as_tensor(array.astype(np.float64)).to(torch.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"boxes must be R rows of four numbers [x1, y1, x2, y2]: {error}.") from error
    else:
        raise InputError(f"boxes must be R rows of four numbers [x1, y1, x2, y2], got a {type(boxes).__name__}.")
    if values.ndim == 1 and values.numel() == 0:
        values = values.reshape(0, 4)
    if values.ndim != 2 or values.shape[1] != 4:
        raise InputError(f"boxes must have the shape (R, 4), rows of [x1, y1, x2, y2], got {tuple(values.shape)}.")
    values = as_box_tensor(values)
    if values.dtype != torch.float64:
        values = values.to(torch.float32)

    def fail_at(wrong: Tensor, reason: str) -> None:
        if wrong.any():
            row = int(wrong.nonzero()[0])
            shown = [round(v, 4) for v in values[row].tolist()]
            raise InputError(f"box {row} is {shown}: {reason}.")

    fail_at(~values.isfinite().all(-1), "its coordinates must be finite numbers")
    x1, y1, x2, y2 = values.unbind(-1)
    fail_at((x2 <= x1) | (y2 <= y1), "[x1, y1, x2, y2] needs x2 > x1 and y2 > y1")
    if image_size is not None:
        height, width = image_size
        outside = (x1 < -_TOLERANCE) | (y1 < -_TOLERANCE) | (x2 > width + _TOLERANCE) | (y2 > height + _TOLERANCE)
        fail_at(outside, f"it leaves the image, {width} wide and {height} high; clip it first if that is meant")
    return values


def box_convert(boxes: Tensor, source: BoxFormat, target: BoxFormat) -> Tensor:
    """Convert (..., 4) boxes between xyxy, xywh (top-left corner) and cxcywh (centre).

    Raises:
        InputError: a wrong shape or an unknown format.
    """
    boxes = as_box_tensor(boxes)
    for name in (source, target):
        if name not in ("xyxy", "xywh", "cxcywh"):
            raise InputError(f"unknown box format {name!r}: use 'xyxy', 'xywh' or 'cxcywh'.")
    if source == target:
        return boxes
    first, second = boxes[..., :2], boxes[..., 2:]
    if source == "xyxy":
        low, size = first, second - first
    else:
        low, size = (first, second) if source == "xywh" else (first - second / 2, second)
    if target == "xyxy":
        return torch.cat((low, low + size), -1)
    return torch.cat((low if target == "xywh" else low + size / 2, size), -1)


def box_area(boxes: Tensor) -> Tensor:
    """Area in square pixels of xyxy boxes: (..., 4) -> (...); an inside-out box has none."""
    boxes = _at_least_float32(as_box_tensor(boxes))
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) limited to the image of `image_size` (height, width); one outside becomes empty, on the border."""
    boxes = as_box_tensor(boxes)
    height, width = image_size
    if height < 0 or width < 0:
        raise InputError(f"image_size must be (height, width) in pixels, got {image_size}.")
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), -1)


def box_iou(a: Tensor, b: Tensor, *, elementwise: bool = False) -> Tensor:
    """Intersection over union of xyxy boxes, 0 where both are empty.

    Args:
        a: (..., N, 4).
        b: (..., M, 4), or broadcastable to `a` if `elementwise`.
        elementwise: compare a[i] with b[i] instead of every pair.

    Returns:
        (..., N, M), or (..., N) if `elementwise`, in [0, 1].

    Raises:
        InputError: wrong shapes.
    """
    return _ratio(*_overlap(*_paired(a, b, elementwise)))


def box_giou(a: Tensor, b: Tensor, *, elementwise: bool = False) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019, algorithm 1), in [-1, 1]; arguments as in `box_iou`."""
    a, b = _paired(a, b, elementwise)
    intersection, union = _overlap(a, b)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    hull_width = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
    hull = hull_width * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression within each class, exact.

    By descending score (equal scores: lower index first), a box is kept unless its IoU with a kept box of its class is
    *above* `iou_threshold`.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        classes: (N,) class of each box; all zeros for class-agnostic suppression.
        iou_threshold: in [0, 1].

    Returns:
        int64 indices of the kept boxes, by descending score.

    Raises:
        InputError: wrong shapes, a NaN score, or a threshold outside [0, 1].
    """
    boxes = as_box_tensor(boxes)
    if boxes.ndim != 2 or scores.shape != boxes.shape[:1] or classes.shape != boxes.shape[:1]:
        raise InputError(
            f"batched_nms needs boxes (N, 4), scores (N,) and classes (N,), got {tuple(boxes.shape)}, "
            f"{tuple(scores.shape)} and {tuple(classes.shape)}."
        )
    if not 0.0 <= iou_threshold <= 1.0:
        raise InputError(f"iou_threshold must be in [0, 1], got {iou_threshold}.")
    if scores.isnan().any() or not boxes.isfinite().all():
        raise InputError("batched_nms needs finite boxes and scores that are not NaN.")
    kept = torch.empty(0, dtype=torch.int64, device=boxes.device)
    for block in scores.argsort(descending=True, stable=True).split(_NMS_BLOCK):
        beaten = _suppresses(boxes, classes, kept, block, iou_threshold).any(0)
        block = block[~beaten]
        beats = _suppresses(boxes, classes, block, block, iou_threshold).triu(1)
        # Greedy choice is the fixed point of "kept unless a kept, better box beats it". Iterating from "all kept"
        # settles box after box in score order, and in practice after as many steps as the longest chain of overlaps.
        alive = torch.ones_like(block, dtype=torch.bool)
        while True:
            again = ~(beats & alive[:, None]).any(0)
            if torch.equal(again, alive):
                break
            alive = again
        kept = torch.cat((kept, block[alive]))
    return kept


def _suppresses(boxes: Tensor, classes: Tensor, better: Tensor, worse: Tensor, iou_threshold: float) -> Tensor:
    overlap = box_iou(boxes[better], boxes[worse]) > iou_threshold
    return overlap & (classes[better][:, None] == classes[worse])


def _at_least_float32(boxes: Tensor) -> Tensor:
    """Areas overflow float16 from 256 x 256 pixels on."""
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))


def _paired(a: Tensor, b: Tensor, elementwise: bool) -> tuple[Tensor, Tensor]:
    """The two sides as views that broadcast against each other."""
    a, b = _at_least_float32(as_box_tensor(a)), _at_least_float32(as_box_tensor(b))
    if not elementwise:
        if a.ndim < 2 or b.ndim < 2:
            raise InputError(
                f"pairwise overlap needs boxes (..., N, 4) and (..., M, 4), got {tuple(a.shape)}, {tuple(b.shape)}."
            )
        a, b = a[..., :, None, :], b[..., None, :, :]
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError as error:
        raise InputError(f"boxes of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.") from error
    return a, b


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of broadcasting boxes; sides stay apart, so that few tensors have all pairs."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    intersection = width * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    return intersection, box_area(a) + box_area(b) - intersection


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 for 0 / 0, with finite gradients."""
    empty = whole <= 0
    return torch.where(empty, 0.0, part / torch.where(empty, 1.0, whole))
