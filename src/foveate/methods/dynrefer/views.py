"""Nested views of a region: crops b(t) = b_r + t (b_I - b_r) and the choice of t (paper 3.1, spec 2.1, 4.2, 4.3).

t = 0 is the region itself, t = 1 the whole image. Boxes are xyxy pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.phash import dct_block, hamming, perceptual_hash, to_grey

from .configuration import CANDIDATE_VIEWS, SELECTIONS, check_view_names, check_view_policy

# Images that are hashed together are padded to one size; so many pixels of float64 are 32 MB.
_PADDED_PIXELS = 2**22
_IMAGES_TOGETHER = 16


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
    image: Image.Image,
    boxes: np.ndarray,
    coefficients: np.ndarray,
    image_size: int,
    *,
    exact: bool = True,
    threads: int = 1,
) -> ViewBatch:
    """Crop every view of every region once: equal crops (t = 1 of all regions, say) are shared.

    Args:
        image: RGB.
        boxes: (R, 4) xyxy floats.
        coefficients: (R, n) or (n,), t of each view, the first 0.
        threads: so many crop and resize side by side; PIL resizes without Python's lock.
    """
    width, height = image.size
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    t = np.broadcast_to(np.asarray(coefficients, dtype=np.float64), (len(boxes), np.shape(coefficients)[-1]))
    views = pixel_boxes(interpolate_boxes(boxes, t, width, height), width, height)
    distinct, index = np.unique(views.reshape(-1, 4), axis=0, return_inverse=True)
    return ViewBatch(
        crops=_crop_views(image, distinct, image_size, threads),
        crop_boxes=distinct,
        view_index=index.reshape(views.shape[:2]),
        region_boxes=boxes_in_views(pixel_boxes(boxes, width, height), views, image_size, exact=exact),
        coefficients=t,
    )


def _crop_views(image: Image.Image, boxes: np.ndarray, image_size: int, threads: int) -> np.ndarray:
    """`crop_view` of each box: (U, s, s, 3) uint8."""
    crops = np.empty((len(boxes), image_size, image_size, 3), np.uint8)

    def cut(start: int, step: int) -> None:
        for row in range(start, len(boxes), step):
            crops[row] = crop_view(image, boxes[row], image_size)

    if threads == 1 or len(boxes) < 4 * threads:
        cut(0, 1)
    else:
        # Threads of this call alone: those of a pool that is kept would be missing in a forked process.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(cut, range(threads), [threads] * threads))
    return crops


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


@dataclass(frozen=True)
class ViewSearch:
    """What a search chose for the regions of one image, and by what.

    Attributes:
        coefficients: (R, 1 + count), t = 0 first, in the order of the search.
        distances: (R, 10) d_j = hamming(h(0), h(t_j)) / t_j of every candidate.
    """

    coefficients: np.ndarray
    distances: np.ndarray


def search_coefficients(
    image: Image.Image | np.ndarray, boxes: np.ndarray, count: int, *, selection: str = "official"
) -> np.ndarray:
    """`search_views` of one image: its (R, 1 + count) coefficients."""
    return search_views([image], [boxes], count, selection=selection)[0].coefficients


def search_views(
    images: Sequence[Image.Image | np.ndarray], boxes: Sequence[np.ndarray], count: int, *, selection: str = "official"
) -> list[ViewSearch]:
    """The image prior: t's whose crops look most unlike the region, by perceptual hash (paper 3.4, spec 4.2).

    "official": the `count` largest d_j = hamming(h(0), h(t_j)) / t_j, first on ties, a chosen d set to 0.
    "pairwise": d_j = sum of distances to all views chosen so far / t_j, each t once (the paper's text).
    "median": as "official" with bits set above the median of the coefficients without DC.

    Args:
        images: RGB, of any sizes. Many together get the same answers as one by one.
        boxes: (R, 4) xyxy of each image.
        count: n - 1, number of context views.

    Raises:
        InputError: there is no such selection.
    """
    distances = hash_distances(images, boxes, (0.0, *CANDIDATE_VIEWS), selection=selection)
    together = torch.cat([torch.zeros(0, 11, 11), *distances]).double()  # (all regions, 11, 11)
    t = torch.tensor(CANDIDATE_VIEWS, dtype=torch.float64)
    first = scores = together[:, 0, 1:] / t
    rows = torch.arange(len(together))
    taken = torch.zeros(len(together), len(CANDIDATE_VIEWS), dtype=torch.bool)
    coefficients = torch.zeros(len(together), 1 + count, dtype=torch.float64)
    for place in range(1, 1 + count):
        best = _first_maximum(scores.masked_fill(taken, -1.0) if selection == "pairwise" else scores)
        coefficients[:, place] = t[best]
        taken[rows, best] = True
        if selection == "pairwise":
            scores = scores + together[rows, best + 1, 1:] / t
        else:
            scores = scores.clone()
            scores[rows, best] = 0
    counts = [len(own) for own in boxes]
    return [
        ViewSearch(chosen.numpy(), own.numpy())
        for chosen, own in zip(coefficients.split(counts), first.split(counts), strict=True)
    ]


def hash_distances(
    images: Sequence[Image.Image | np.ndarray],
    boxes: Sequence[np.ndarray],
    coefficients: Sequence[float],
    *,
    selection: str = "official",
) -> list[Tensor]:
    """Bits in which the perceptual hashes of a region's crops differ, of all pairs of T coefficients (spec 4.2).

    Args:
        images: RGB, of any sizes.
        boxes: (R, 4) xyxy of each image.
        coefficients: (T,) values of t.
        selection: "median" has a hash of its own.

    Returns:
        (R, T, T) int64 for each image.

    Raises:
        InputError: there is no such selection.
    """
    if selection not in SELECTIONS:
        raise InputError(f"unknown view selection {selection!r}; use one of {', '.join(SELECTIONS)}")
    t, many = np.array(coefficients, dtype=np.float64), len(coefficients)
    greys = [to_grey(torch.from_numpy(np.array(image))) for image in map(_as_rgb, images)]
    crops = []
    for grey, own in zip(greys, boxes, strict=True):
        height, width = grey.shape
        own = np.asarray(own, dtype=np.float32).reshape(-1, 4)
        crops.append(pixel_boxes(interpolate_boxes(own, t, width, height), width, height).reshape(-1, 4))
    distances = [torch.zeros(0, many, many, dtype=torch.long)] * len(greys)
    for members in _hashed_together([grey.shape for grey in greys], [len(own) for own in crops]):
        size = [max(greys[k].shape[axis] for k in members) for axis in range(2)]
        padded = torch.zeros(len(members), *size, dtype=torch.uint8)
        filled = np.zeros((len(members), max(len(crops[k]) for k in members), 4), np.int64)
        filled[..., 2:] = 1  # what pads the shorter lists is a box too
        for row, k in enumerate(members):
            padded[row, : greys[k].shape[0], : greys[k].shape[1]] = greys[k]
            filled[row, : len(crops[k])] = crops[k]
        bits = (_median_hash if selection == "median" else perceptual_hash)(padded, torch.from_numpy(filled))
        for row, k in enumerate(members):
            own = bits[row, : len(crops[k])].reshape(-1, many, bits.shape[-1])
            distances[k] = hamming(own[:, :, None], own[:, None, :])
    return distances


def _as_rgb(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    return image.convert("RGB") if isinstance(image, Image.Image) else image


def _hashed_together(sizes: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[list[int]]:
    """Images of like size with about as many boxes: padding at most doubles the pixels, and the boxes."""
    group: list[int] = []
    for k in sorted((k for k, count in enumerate(counts) if count), key=lambda k: (-counts[k], *sizes[k])):
        members = [*group, k]
        height, width = (max(sizes[j][axis] for j in members) for axis in range(2))
        pixels = len(members) * height * width
        fits = len(members) <= _IMAGES_TOGETHER and pixels <= _PADDED_PIXELS
        fits = fits and pixels <= 2 * sum(sizes[j][0] * sizes[j][1] for j in members)
        fits = fits and len(members) * counts[members[0]] <= 2 * sum(counts[j] for j in members)
        if group and not fits:
            yield group
            members = [k]
        group = members
    if group:
        yield group


def _median_hash(grey: Tensor, boxes: Tensor) -> Tensor:
    """Hash bits against the median of the coefficients without the constant one -> (..., 64) bool."""
    # In a flat crop all but the constant one are rounding errors; their signs would be a hash of nothing.
    coefficients = dct_block(grey, boxes).flatten(-2).round(decimals=6)
    return coefficients > coefficients[..., 1:].median(dim=-1, keepdim=True).values


def _first_maximum(scores: Tensor) -> Tensor:
    """argmax over the last dimension, the first on ties (torch.argmax promises no order)."""
    return (scores == scores.amax(dim=1, keepdim=True)).to(torch.int8).argmax(dim=1)


def resolve_policy(
    views: Any, task: str, num_views: int, policy: Mapping[str, str | Sequence[float]]
) -> np.ndarray | str:
    """What a caller's `views` means for one task: an array of t's (n,), or the name of a search.

    Args:
        views: None or "task" (the model's own policy); "auto" or "official", "pairwise", "median" (a search); a list of
            t's with or without the leading 0; or a mapping of tasks to these, in which a missing task has the model's.
        policy: the model's own; a task that it does not name searches.

    Raises:
        InputError: a t outside [0, 1], a wrong number of them, an unknown name or task.
    """
    try:
        if isinstance(views, Mapping):
            check_view_policy(dict.fromkeys(views, "auto"))  # the tasks; their views are checked below
            views = views.get(task)
        if views is None or (isinstance(views, str) and views == "task"):
            views = policy.get(task, "official")
        if isinstance(views, str):
            check_view_names(views)
            return "official" if views == "auto" else views
    except ValueError as error:
        raise InputError(str(error)) from None
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
