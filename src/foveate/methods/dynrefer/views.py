"""Nested views of a region: crops b(t) = b_r + t (b_I - b_r) and the choice of t (paper 3.1, spec 2.1, 4.2, 4.3).

t = 0 is the region itself, t = 1 the whole image. Boxes are xyxy pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.phash import dct_block, hamming, perceptual_hash, to_grey

from .configuration import CANDIDATE_VIEWS

SELECTIONS = ("official", "pairwise", "median")


def interpolate_boxes(boxes: np.ndarray, coefficients: np.ndarray, width: int, height: int) -> np.ndarray:
    """b(t) for each region and coefficient, in float32.

    Computed in float32 because the crop is truncated to whole pixels: in float64 other pixels come out (spec 2.1).

    Args:
        boxes: (R, 4) xyxy.
        coefficients: (R, n) or (n,) values of t.
    Returns:
        (R, n, 4) float32.
    """
    region = np.asarray(boxes, dtype=np.float32)[:, None]
    image = np.array([0, 0, width, height], dtype=np.float32)
    t = np.broadcast_to(np.asarray(coefficients, dtype=np.float32), (len(region), np.shape(coefficients)[-1]))[
        ..., None
    ]
    return region + t * (image - region)


def pixel_boxes(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Clip to the image and truncate to whole pixels; a box that comes out empty is widened to one pixel.

    The official code crashes on an empty crop; one pixel is the least that can be looked at (spec 2.1, inferred).

    Args:
        boxes: (..., 4) xyxy floats.
    Returns:
        (..., 4) int64, each at least 1 x 1.
    """
    limits = np.array([width, height, width, height], dtype=np.float32)
    pixels = np.clip(np.asarray(boxes, dtype=np.float32), 0, limits).astype(np.int64)
    for low, size in ((0, width), (1, height)):
        start, stop = pixels[..., low], pixels[..., low + 2]
        empty = stop <= start
        start[empty] = np.minimum(start[empty], size - 1)
        stop[empty] = start[empty] + 1
    return pixels


def boxes_in_views(region: np.ndarray, views: np.ndarray, image_size: int, *, exact: bool = True) -> np.ndarray:
    """The region in pixels of each resized view (spec 2.1).

    Args:
        region: (R, 4) int64 region, clipped and truncated.
        views: (R, n, 4) int64 crops.
        exact: truncate as the official code does (223 instead of 224 for some crop widths); False keeps floats.
    Returns:
        (R, n, 4) float32 xyxy in pixels of the view.
    """
    offset = views[..., [0, 1, 0, 1]]
    size = np.stack([views[..., 2] - views[..., 0], views[..., 3] - views[..., 1]], axis=-1)
    ratio = (np.float32(image_size) / size.astype(np.float32))[..., [0, 1, 0, 1]]
    scaled = (region[:, None] - offset).astype(np.float32) * ratio
    return np.trunc(scaled) if exact else scaled


def crop_view(image: Image.Image, box: Sequence[int], image_size: int) -> np.ndarray:
    """Crop and resize (antialiased bicubic, aspect ratio not kept) -> (s, s, 3) uint8."""
    crop = image.crop(tuple(int(v) for v in box))  # pyright: ignore[reportArgumentType]
    return np.asarray(crop.resize((image_size, image_size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class ViewBatch:
    """The distinct views of the regions of one image.

    Attributes:
        crops: (U, s, s, 3) uint8 distinct resized crops.
        crop_boxes: (U, 4) int64 pixels of the image.
        view_index: (R, n) row of `crops` that each view of each region is.
        region_boxes: (R, n, 4) float32, the region in pixels of the resized view.
        coefficients: (R, n) the t of each view.
    """

    crops: np.ndarray
    crop_boxes: np.ndarray
    view_index: np.ndarray
    region_boxes: np.ndarray
    coefficients: np.ndarray


def build_views(
    image: Image.Image, boxes: np.ndarray, coefficients: np.ndarray, image_size: int, *, exact: bool = True
) -> ViewBatch:
    """Crop every view of every region once: equal crops (t = 1 of all regions, say) are shared.

    Args:
        image: RGB.
        boxes: (R, 4) xyxy floats.
        coefficients: (R, n) or (n,), t of each view, the first 0.
    """
    width, height = image.size
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    t = np.broadcast_to(np.asarray(coefficients, dtype=np.float64), (len(boxes), np.shape(coefficients)[-1]))
    views = pixel_boxes(interpolate_boxes(boxes, t, width, height), width, height)
    distinct, index = np.unique(views.reshape(-1, 4), axis=0, return_inverse=True)
    crops = [crop_view(image, box, image_size) for box in distinct]
    return ViewBatch(
        crops=np.stack(crops) if crops else np.zeros((0, image_size, image_size, 3), np.uint8),
        crop_boxes=distinct,
        view_index=index.reshape(views.shape[:2]),
        region_boxes=boxes_in_views(pixel_boxes(boxes, width, height), views, image_size, exact=exact),
        coefficients=t,
    )


def region_from_polygons(polygons: Sequence[Sequence[float]]) -> np.ndarray:
    """Bounding box of all polygon points; a side of at most one pixel is widened to one (spec 2.1)."""
    points = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons])
    low, high = points.min(axis=0), points.max(axis=0)
    for axis in range(2):
        if high[axis] - low[axis] <= 1:
            if high[axis] > 0:
                low[axis] = high[axis] - 1
            else:
                high[axis] = low[axis] + 1
    return np.concatenate([low, high])


def region_from_mask(mask: np.ndarray) -> np.ndarray:
    """First and last non-zero column and row, the last inclusive as in the official code (spec 2.1).

    Raises:
        InputError: the mask is empty or not two-dimensional.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise InputError(f"a mask must be H x W, not of shape {mask.shape}; give one mask per region")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise InputError(
            "the mask has no pixel set, so there is no region to describe; give a mask with a region in it"
        )
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float64)


def sample_coefficients(count: int, generator: np.random.Generator) -> np.ndarray:
    """Training: 0, then `count` distinct candidates in random order, for each region anew (paper 3.1, spec 2.1)."""
    chosen = generator.choice(len(CANDIDATE_VIEWS), size=count, replace=False)
    return np.array([0.0, *(CANDIDATE_VIEWS[k] for k in chosen)])


def search_coefficients(
    image: Image.Image | np.ndarray, boxes: np.ndarray, count: int, *, selection: str = "official"
) -> np.ndarray:
    """The image prior: t's whose crops look most unlike the region, by perceptual hash (paper 3.4, spec 4.2).

    "official": the `count` largest d_j = hamming(h(0), h(t_j)) / t_j, first on ties, a chosen d set to 0.
    "pairwise": d_j = sum of distances to all views chosen so far / t_j, each t once (the paper's text).
    "median": as "official" with bits set above the median of the coefficients without DC.

    Args:
        image: RGB.
        boxes: (R, 4) xyxy.
        count: n - 1, number of context views.
    Returns:
        (R, 1 + count) with t = 0 first, in the order of the search.
    """
    if selection not in SELECTIONS:
        raise InputError(f"unknown view selection {selection!r}; use one of {', '.join(SELECTIONS)}")
    pixels = torch.from_numpy(np.array(image.convert("RGB") if isinstance(image, Image.Image) else image))
    height, width = pixels.shape[:2]
    t = np.array([0.0, *CANDIDATE_VIEWS])
    regions = len(boxes)
    if not regions:
        return np.zeros((0, 1 + count))
    candidates = pixel_boxes(interpolate_boxes(boxes, t, width, height), width, height)
    grey, crops = to_grey(pixels), torch.from_numpy(candidates).reshape(-1, 4)
    bits = _median_hash(grey, crops) if selection == "median" else perceptual_hash(grey, crops)
    bits = bits.reshape(regions, len(t), -1)
    distances = hamming(bits[:, :, None], bits[:, None, :]).double()  # (R, 11, 11)
    scores = distances[:, 0, 1:] / torch.tensor(CANDIDATE_VIEWS, dtype=torch.float64)
    chosen: list[Tensor] = []
    rows = torch.arange(regions)
    taken = torch.zeros(regions, len(CANDIDATE_VIEWS), dtype=torch.bool)
    for _ in range(count):
        best = _first_maximum(scores.masked_fill(taken, -1.0) if selection == "pairwise" else scores)
        chosen.append(best)
        taken[rows, best] = True
        if selection == "pairwise":
            scores = scores + distances[rows, best + 1, 1:] / torch.tensor(CANDIDATE_VIEWS, dtype=torch.float64)
        else:
            scores = scores.clone()
            scores[rows, best] = 0
    picked = t[1:][torch.stack(chosen, dim=1).numpy()] if chosen else np.zeros((regions, 0))
    return np.concatenate([np.zeros((regions, 1)), picked], axis=1)


def _median_hash(grey: Tensor, boxes: Tensor) -> Tensor:
    """Hash bits against the median of the coefficients without the constant one -> (B, 64) bool."""
    coefficients = dct_block(grey, boxes).flatten(-2)
    return coefficients > coefficients[..., 1:].median(dim=-1, keepdim=True).values


def _first_maximum(scores: Tensor) -> Tensor:
    """argmax over the last dimension, the first on ties (torch.argmax promises no order)."""
    return (scores == scores.amax(dim=1, keepdim=True)).to(torch.int8).argmax(dim=1)


def resolve_policy(views: Any, task: str, num_views: int, policy: Mapping[str, Sequence[float]]) -> np.ndarray | str:
    """What a caller's `views` means for one task: an array of t's (n,), or the name of a search.

    Args:
        views: None or "task" (the model's own policy), "auto" (the search), a name in `SELECTIONS`, or a list of t's
            with or without the leading 0.
    Raises:
        InputError: a t outside [0, 1], a wrong number of them, an unknown name.
    """
    if views is None or (isinstance(views, str) and views == "task"):
        views = policy.get(task)
        if views is None:
            return "official"
    if isinstance(views, str):
        name = "official" if views == "auto" else views
        if name not in SELECTIONS:
            raise InputError(
                f"unknown views {views!r}; use 'task', 'auto', {', '.join(map(repr, SELECTIONS))} or a list of t's"
            )
        return name
    try:
        t = np.asarray(views, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: a tensor without plain values
        raise InputError(f"views must be a list of numbers between 0 and 1, not {views!r}") from error
    if len(t) == num_views - 1:
        t = np.concatenate([[0.0], t])
    if len(t) != num_views:
        raise InputError(
            f"this model looks at {num_views} views, so give {num_views - 1} t's for the context views, not {len(t)}"
        )
    if not np.isfinite(t).all() or t.min() < 0 or t.max() > 1 or t[0] != 0:
        raise InputError(f"views must be t's between 0 (the region) and 1 (the image), the first 0, not {views!r}")
    return t
