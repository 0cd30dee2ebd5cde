"""Reader of COCO: annotations/instances_SPLIT.json, annotations/captions_SPLIT.json and the images in SPLIT/."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.data.boxes import Box, is_empty, xywh_to_xyxy
from foveate.data.dataset import ImageRecord, RegionRecord, SampleDataset
from foveate.data.masks import check_segmentation
from foveate.data.records import (
    BadRecord,
    RecordLog,
    file_name,
    get,
    get_id,
    get_list,
    get_size,
    get_text,
    get_words,
    get_xywh,
    name_of,
    read_json,
)
from foveate.errors import InputError

# COCO rounds box numbers to two decimals, and other tools count the last pixel twice: a box may overhang its image by
# this much and is cut back to it. A box that leaves the image further belongs to another image.
_OVERHANG = 1.0


class COCO(SampleDataset):
    """COCO detection and captions, real or exported: a region an annotation, crowd annotations included.

    Regions have box, category and mask; `attributes`, `negative_attributes` and `tags` where the annotation has these
    optional keys, which the real files lack. Image captions are as written, without surrounding white space.
    `categories` has the names of the whole file, in its order, whether they occur or not.

    Args:
        root: folder with `annotations/instances_SPLIT.json`, `SPLIT/` (images) and, optionally,
            `annotations/captions_SPLIT.json`.
        split: as in the file names: "train2017", "val2017", ...; "train", "val" in an exported dataset.
        skip_bad: count broken records in `skipped` instead of raising.

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `skip_bad` is off.
    """

    format = "coco"
    categories: tuple[str, ...] = ()

    def _read(self, log: RecordLog) -> Iterator[ImageRecord]:
        folder = self.root / "annotations"
        path = folder / f"instances_{self.split}.json"
        if not path.is_file():
            known = sorted(found.stem.removeprefix("instances_") for found in folder.glob("instances_*.json"))
            hint = f"the splits there are {', '.join(known)}." if known else "docs/datasets.md lists the files."
            raise InputError(f"{path} does not exist; {hint}")
        content = read_json(path, dict)
        images = read_images(path, content, log)
        categories = read_categories(path, content, log)
        self.categories = tuple(categories.values())
        regions: dict[int, list[RegionRecord]] = {image_id: [] for image_id in images}
        for annotation in top_level_list(path, content, "annotations"):
            try:
                image_id, _, width, height = annotation_image(annotation, images)
                category_id = get_id(annotation, "category_id")
                if category_id not in categories:
                    raise BadRecord('"category_id" is the id of no category', category_id)
                box = annotation_box(annotation, width, height)
                if is_empty(box):
                    log.dropped["empty box"] += 1
                    continue
                regions[image_id].append(
                    region_record(annotation, get_id(annotation, "id"), box, categories[category_id], width, height)
                )
            except BadRecord as error:
                log.bad(path, f"annotation {name_of(annotation, 'id')}", error)
        captions = self._captions(folder / f"captions_{self.split}.json", images, log)
        for image_id, (name, width, height) in images.items():
            yield ImageRecord(
                image_id, f"{self.split}/{name}", width, height, tuple(regions[image_id]), captions.get(image_id, ())
            )

    @staticmethod
    def _captions(path: Path, images: dict[int, Any], log: RecordLog) -> dict[int, tuple[str, ...]]:
        captions: dict[int, tuple[str, ...]] = {}
        if not path.exists():
            return captions
        for annotation in top_level_list(path, read_json(path, dict), "annotations"):
            try:
                image_id, *_ = annotation_image(annotation, images)
                captions[image_id] = (*captions.get(image_id, ()), get_text(annotation, "caption").strip())
            except BadRecord as error:
                log.bad(path, f"annotation {name_of(annotation, 'id')}", error)
        return captions


def top_level_list(path: Path, content: dict[str, Any], key: str) -> list[Any]:
    """`content[key]` of a COCO-style file, which must be a list."""
    try:
        return get_list(content, key)
    except BadRecord as error:
        raise InputError(f"{path}: the top level {error}; is it another kind of annotation file?") from error


def read_images(path: Path, content: dict[str, Any], log: RecordLog) -> dict[int, tuple[str, int, int]]:
    """Image id -> (file name, width, height) of a COCO-style file."""
    images: dict[int, tuple[str, int, int]] = {}
    for image in top_level_list(path, content, "images"):
        try:
            image_id = get_id(image, "id")
            if image_id in images:
                raise BadRecord("the image id occurs twice", image_id)
            images[image_id] = (file_name(image), *get_size(image))
        except BadRecord as error:
            log.bad(path, f"image {name_of(image, 'id')}", error)
    return images


def read_categories(path: Path, content: dict[str, Any], log: RecordLog) -> dict[int, str]:
    """Category id -> name of a COCO-style file."""
    categories: dict[int, str] = {}
    for category in top_level_list(path, content, "categories"):
        try:
            categories[get_id(category, "id")] = get_text(category, "name")
        except BadRecord as error:
            log.bad(path, f"category {name_of(category, 'id')}", error)
    return categories


def annotation_image(annotation: Any, images: dict[int, tuple[str, int, int]]) -> tuple[int, str, int, int]:
    """Id, file name, width and height of the image that an annotation belongs to.

    Raises:
        BadRecord: "image_id" is missing, no whole number, or the id of none of `images`.
    """
    image_id = get_id(annotation, "image_id")
    if image_id not in images:
        raise BadRecord('"image_id" is the id of no image', image_id)
    return image_id, *images[image_id]


def annotation_box(annotation: Any, width: int, height: int) -> Box:
    """The xyxy box of a COCO-style annotation, cut to its image if it overhangs by at most a pixel.

    Raises:
        BadRecord: "bbox" is missing, not four finite numbers, or leaves the image by more than a pixel.
    """
    xywh = get_xywh(annotation)
    x1, y1, x2, y2 = xywh_to_xyxy(*xywh)
    if min(x1, y1) < -_OVERHANG or x2 > width + _OVERHANG or y2 > height + _OVERHANG:
        raise BadRecord(f"the box leaves the image of {width}x{height} pixels", list(xywh))
    if not math.isfinite(x2 + y2):
        raise BadRecord('"bbox" is not finite numbers', list(xywh))
    return (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))


def region_record(
    annotation: Any, region_id: int, box: Box, category: str | None, width: int, height: int
) -> RegionRecord:
    """A region from a COCO-style annotation: its segmentation and the optional word lists, without captions."""
    return RegionRecord(
        region_id=region_id,
        box=box,
        category=category,
        attributes=get_words(annotation, "attributes"),
        negative_attributes=get_words(annotation, "negative_attributes"),
        tags=get_words(annotation, "tags"),
        segmentation=check_segmentation(
            get(annotation, "segmentation") if "segmentation" in annotation else None, width, height
        ),
        crowd=_is_crowd(annotation),
    )


def _is_crowd(annotation: Any) -> bool:
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise BadRecord('"iscrowd" is neither 0 nor 1', crowd)
    return bool(crowd)
