"""Box conversion at the border between dataset files and samples: plain numbers, no torch.

Inside foveate a box is xyxy in absolute pixels, float, half-open; tensors of boxes are `foveate.ops.boxes`' matter.
"""

from __future__ import annotations

import numpy as np

Box = tuple[float, float, float, float]


def xywh_to_xyxy(x: float, y: float, width: float, height: float) -> Box:
    """(x, y, width, height) as COCO and Visual Genome store it -> (x1, y1, x2, y2)."""
    return (float(x), float(y), float(x) + float(width), float(y) + float(height))


def xyxy_to_xywh(box: Box) -> Box:
    """(x1, y1, x2, y2) -> (x, y, width, height)."""
    return (box[0], box[1], box[2] - box[0], box[3] - box[1])


def is_empty(box: Box) -> bool:
    """Whether a box has no width or no height."""
    return box[2] <= box[0] or box[3] <= box[1]


def clamp_visual_genome_box(box: Box, width: int, height: int) -> Box:
    """Box clamp of Visual Genome's preparation (DynRefer spec section 3).

    x1 to [1, width - 1], y1 to [1, height - 1], x2 to at most width, y2 to at most height. The box can come out empty.
    """
    x1, y1, x2, y2 = box
    return (
        max(1.0, min(x1, width - 1.0)),
        max(1.0, min(y1, height - 1.0)),
        min(x2, float(width)),
        min(y2, float(height)),
    )


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of each of N boxes (N, 4) with each of M boxes (M, 4), xyxy -> (N, M) float64."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    size = np.minimum(first[:, None, 2:], second[None, :, 2:]) - np.maximum(first[:, None, :2], second[None, :, :2])
    overlap = np.clip(size, 0, None).prod(axis=2)
    areas_first = np.clip(first[:, 2:] - first[:, :2], 0, None).prod(axis=1)
    areas_second = np.clip(second[:, 2:] - second[:, :2], 0, None).prod(axis=1)
    union = areas_first[:, None] + areas_second[None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
