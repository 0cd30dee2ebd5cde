"""The annotation file of DynRefer and ControlCap: regions of images with what a detector or a model said of them.

`{"dataset": {...}, "images": [{id, file_name, height, width}], "annotations": [{id, image_id, caption, bbox,
segmentation, extra_info}]}` (DynRefer spec section 3). Unlike in COCO's files, which it looks like, `bbox` is xyxy, and
`segmentation`, where it is there, says the box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.data.boxes import Box, is_empty, xyxy_to_xywh
from foveate.data.coco import annotation_box, top_level_list
from foveate.data.dataset import RegionRecord
from foveate.data.records import BadRecord, RecordLog, get, get_id, get_number, name_of, read_json
from foveate.errors import InputError


def read_scored_boxes(
    path: Path, sizes: Mapping[int, tuple[int, int]], log: RecordLog
) -> dict[int, list[RegionRecord]]:
    """Boxes of a detector, such as GRiT's `test_grit.json`, with their `extra_info.grit_result.score`.

    Args:
        sizes: (width, height) of the images that are wanted, by image id; boxes of others are counted in `log.dropped`.

    Returns:
        By image id the boxes of the file in its order; an image of which it has none is left out.

    Raises:
        InputError: the file is missing, damaged, or has no box of the wanted images; or a record is broken and
            `log.skip_bad` is off.
    """
    found: dict[int, list[RegionRecord]] = {}
    for annotation in top_level_list(path, read_json(path, dict), "annotations"):
        try:
            image_id = get_id(annotation, "image_id")
            if image_id not in sizes:
                log.dropped["box of another image"] += 1
                continue
            box = annotation_box({"bbox": list(xyxy_to_xywh(_box(annotation)))}, *sizes[image_id])
            if is_empty(box):
                log.dropped["empty box"] += 1
                continue
            score = get_number(get(get(annotation, "extra_info"), "grit_result"), "score")
            found.setdefault(image_id, []).append(RegionRecord(get_id(annotation, "id"), box, score=score))
        except BadRecord as error:
            log.bad(path, f"annotation {name_of(annotation, 'id')}", error)
    if not found:
        raise InputError(f"{path} has no box of the images to evaluate; is it the file of another dataset or split?")
    return found


def annotation_record(
    record_id: int, image_id: int, box: Box, caption: str | None, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """An entry of "annotations" of such a file."""
    x1, y1, x2, y2 = box
    return {
        "id": record_id,
        "image_id": image_id,
        "caption": caption,
        "bbox": [x1, y1, x2, y2],
        "segmentation": [[x1, y1, x1, y2, x2, y2, x2, y1]],
        "extra_info": dict(extra_info),
    }


def _box(annotation: Any) -> Box:
    polygons = annotation.get("segmentation")
    if polygons:
        if not isinstance(polygons, list) or not all(isinstance(polygon, list) for polygon in polygons):
            raise BadRecord('"segmentation" is not a list of polygons', polygons)
        points = [value for polygon in polygons for value in polygon]
        if len(points) < 4 or len(points) % 2 or not _numbers(points):
            raise BadRecord("a polygon is not a list of x, y pairs", polygons)
        return (min(points[0::2]), min(points[1::2]), max(points[0::2]), max(points[1::2]))
    box = get(annotation, "bbox")
    if not isinstance(box, list) or len(box) != 4 or not _numbers(box):
        raise BadRecord('"bbox" is not a list of four finite numbers x1, y1, x2, y2', box)
    return (box[0], box[1], box[2], box[3])


def _numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
