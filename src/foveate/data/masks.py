"""COCO segmentations at the border: polygons, uncompressed and compressed run lengths -> compressed run lengths."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as coco_mask

from foveate.data.records import BadRecord
from foveate.errors import InputError
from foveate.vision.images import run_lengths

# Polygons of real files overhang their image by rounding only; rasterising far-away points would take memory for them.
_OVERHANG = 1.0


def segmentation_to_rle(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """A checked COCO segmentation (list of polygons, or run lengths) -> compressed RLE with `str` counts."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)  # type: ignore[arg-type]
    else:
        return segmentation
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}  # type: ignore[index,call-overload]


def check_segmentation(segmentation: Any, width: int, height: int) -> Any:
    """A COCO "segmentation" that `segmentation_to_rle` can take, or None for an absent or empty one.

    Raises:
        BadRecord: neither polygons of at least three points inside the image nor run lengths that fill the image.
    """
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise BadRecord("a polygon is not a list of x, y pairs of at least three points", polygon)
            _check_coordinates(polygon[0::2], width)
            _check_coordinates(polygon[1::2], height)
        return segmentation
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise BadRecord('"segmentation" is neither polygons nor run lengths', segmentation)
    if segmentation.get("size") != [height, width]:
        raise BadRecord("the size of the run lengths is not the image's [height, width]", segmentation.get("size"))
    counts = segmentation["counts"]
    try:
        runs = run_lengths(counts) if isinstance(counts, str) else counts
    except InputError as error:
        raise BadRecord("the compressed run lengths are damaged", counts) from error
    if (
        not isinstance(runs, list)
        or not all(type(run) is int and run >= 0 for run in runs)
        or sum(runs) != width * height
    ):
        raise BadRecord("the run lengths do not fill the image", counts)
    return {"size": [height, width], "counts": counts}


def _check_coordinates(values: list[Any], limit: int) -> None:
    try:
        inside = all(-_OVERHANG <= value <= limit + _OVERHANG for value in values)  # False for NaN
    except TypeError as error:
        raise BadRecord("a polygon has a coordinate that is not a number", values) from error
    if not inside:
        raise BadRecord("a polygon leaves the image", values)
