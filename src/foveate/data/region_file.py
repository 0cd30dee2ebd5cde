"""The annotation file of DynRefer and ControlCap: regions of images with what a detector or a model said of them.

`{"dataset": {...}, "images": [{id, file_name, height, width}], "annotations": [{id, image_id, caption, bbox,
segmentation, extra_info}]}` (DynRefer spec section 3). Unlike in COCO's files, which it looks like, `bbox` is xyxy, and
`segmentation`, where it is there, says the box.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from foveate.data.boxes import Box, is_empty, xyxy_to_xywh
from foveate.data.coco import annotation_box, annotation_image, read_images, top_level_list
from foveate.data.dataset import ImageRecord, RegionRecord, SampleDataset
from foveate.data.records import BadRecord, RecordLog, get, get_id, get_list, get_number, get_text, name_of, read_json
from foveate.data.text import clean_caption
from foveate.errors import InputError


class RegionFile(SampleDataset):
    """Training data as ControlCap prepares it for itself and DynRefer: one file of regions with parsed captions.

    A region has one caption, and as `tag_places` the union of `extra_info.parser_result.tag_set1` and `tag_set2` where
    the file has them: places in the tag list that its captions were parsed with (DynRefer spec section 3).

    Args:
        root: folder with `SPLIT.json` and the images in `images/`.
        split: name of the file without its ending.
        skip_bad: count broken records in `skipped` instead of raising.

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `skip_bad` is off.
    """

    format = "controlcap"

    def _read(self, log: RecordLog) -> Iterator[ImageRecord]:
        path = self.root / f"{self.split}.json"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in self.root.glob("*.json")))
            raise InputError(f"{path} does not exist; {f'the splits there are {known}' if known else 'put it there'}.")
        content = read_json(path, dict)
        images = read_images(path, content, log)
        regions: dict[int, list[RegionRecord]] = {image_id: [] for image_id in images}
        for annotation in top_level_list(path, content, "annotations"):
            try:
                image_id, _, width, height = annotation_image(annotation, images)
                box = annotation_box({"bbox": list(xyxy_to_xywh(_box(annotation)))}, width, height)
                caption = clean_caption(get_text(annotation, "caption"))
                if is_empty(box) or not caption:
                    log.dropped["empty box" if is_empty(box) else "empty caption"] += 1
                    continue
                places = _tag_places(annotation)
                regions[image_id].append(RegionRecord(get_id(annotation, "id"), box, (caption,), tag_places=places))
            except BadRecord as error:
                log.bad(path, f"annotation {name_of(annotation, 'id')}", error)
        for image_id, (name, width, height) in images.items():
            yield ImageRecord(image_id, f"images/{name}", width, height, tuple(regions[image_id]))


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


def _tag_places(annotation: Any) -> tuple[int, ...] | None:
    extra = annotation.get("extra_info")
    if not isinstance(extra, dict) or "parser_result" not in extra:
        return None
    parsed = extra["parser_result"]
    places = [*get_list(parsed, "tag_set1"), *get_list(parsed, "tag_set2")]
    if not all(type(place) is int and place >= 0 for place in places):
        raise BadRecord('"tag_set1" and "tag_set2" are not lists of places in the tag list', places)
    return tuple(sorted(set(places)))


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
