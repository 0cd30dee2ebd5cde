"""Boxes of a picture on their way to the model: padding, suppression, limit, canvas (spec 2.4, box preparation)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foveate.errors import InputError
from foveate.ops.boxes import batched_nms

CLOSE = 50
"""A training text within so many tokens of the maximum leaves room for few boxes."""
DUMMY = (0.0, 0.0, 0.0, 0.0)
"""The box of a picture without boxes: the model always receives at least one object token."""


@dataclass(frozen=True, slots=True)
class PreparedBoxes:
    """Boxes on the canvas.

    Attributes:
        boxes: (K, 4) float32 xyxy in canvas pixels, whole numbers; K >= 1.
        labels: K labels, or none where `boxes` is the one dummy.
        sources: K indices of the boxes as given, or none for the dummy.
    """

    boxes: np.ndarray
    labels: tuple[str, ...]
    sources: tuple[int, ...]


def square_offset(width: int, height: int) -> tuple[int, int]:
    """Where a picture's upper left corner lies on the square that it is padded to: (x, y) in pixels."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2


def prepare_boxes(
    boxes: Sequence[Sequence[float]] | np.ndarray,
    labels: Sequence[str],
    scores: Sequence[float],
    width: int,
    height: int,
    *,
    canvas: int,
    pad_to_square: bool = True,
    iou: float = 0.2,
    limit: int = 100,
    mode: str = "per_category",
    hard_cap: bool = False,
    crowded: bool = False,
) -> PreparedBoxes:
    """Spec 2.4, steps 1 to 6, in their order.

    Args:
        boxes: (K, 4) xyxy in pixels of the picture; they may reach beyond it.
        labels, scores: of each box.
        width, height: of the picture.
        canvas: side of the square that the model sees.
        iou: of two boxes with one label that overlap by a larger IoU, the one of higher score stays.
        limit: boxes beyond which `mode` leaves some out. "per_category": the 20 best of every label (5 for a limit
            below 50), which may still be more than the limit; "per_image": as many as the limit.
        hard_cap: leave out what the mode lets pass beyond the limit: the last in order.
        crowded: the text leaves little room: 1 box a label, or 20 a picture, whatever their number.

    Raises:
        InputError: not as many labels and scores as boxes, or numbers that are not finite.
    """
    given = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if not len(given) == len(labels) == len(scores):
        raise InputError(
            f"{len(given)} boxes come with {len(labels)} labels and {len(scores)} scores; each box needs one of both."
        )
    ratings = np.asarray(scores, dtype=np.float64)
    if not (np.isfinite(given).all() and np.isfinite(ratings).all()):
        raise InputError("boxes and their scores must be finite numbers; leave out those that are not.")
    shifted, names = given, list(labels)
    if pad_to_square:
        x, y = square_offset(width, height)
        shifted = given + np.array([x, y, x, y], dtype=np.float64)
        width = height = max(width, height)

    order = _suppress(shifted, labels, ratings, iou)
    order = _limit(order, labels, limit, mode, crowded)
    if hard_cap:
        order = order[:limit]

    # A Python float: for 84 sides from 32 to 2048, int(side * factor) is one pixel short of the canvas, and the crop
    # then shifts every box by one.
    factor = canvas / min(width, height)
    scaled = np.rint(shifted[order] * factor).astype(np.int64)
    start = np.array([(int(width * factor) - canvas) // 2, (int(height * factor) - canvas) // 2])
    lower = np.maximum(scaled[:, :2] - start, 0)
    upper = np.minimum(scaled[:, 2:] - start, canvas)
    inside = np.logical_and((upper >= 0).all(axis=1), (lower <= canvas).all(axis=1))
    kept = [source for source, stays in zip(order, inside.tolist(), strict=True) if stays]
    if not kept:
        return PreparedBoxes(np.array([DUMMY], dtype=np.float32), (), ())
    placed = np.concatenate([lower, upper], axis=1)[inside].astype(np.float32)
    return PreparedBoxes(placed, tuple(names[source] for source in kept), tuple(kept))


def _suppress(boxes: np.ndarray, labels: Sequence[str], scores: np.ndarray, iou: float) -> list[int]:
    """Indices of the boxes that stay, by descending score; only boxes with one label suppress each other."""
    classes: dict[str, int] = {}
    numbers = [classes.setdefault(label, len(classes)) for label in labels]
    return batched_nms(
        torch.from_numpy(boxes), torch.from_numpy(scores), torch.tensor(numbers, dtype=torch.int64), iou
    ).tolist()


def _limit(order: list[int], labels: Sequence[Hashable], limit: int, mode: str, crowded: bool) -> list[int]:
    if len(order) <= limit and not crowded:
        return order
    if mode == "per_image":
        return order[: 20 if crowded else limit]
    quota = 1 if crowded else (5 if limit < 50 else 20)
    groups: dict[Hashable, list[int]] = {}
    for index in order:
        groups.setdefault(labels[index], []).append(index)
    return [index for group in groups.values() for index in group[:quota]]
