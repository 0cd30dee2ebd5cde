"""Reader of Visual Genome: region descriptions with what the objects, attributes and relationships files know of them.

Reads the key names of version 1.0 ("id", "object_names", ...) and of 1.2 and later ("image_id", "names", ...).
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.boxes import Box, clamp_visual_genome_box, is_empty, pairwise_iou, xywh_to_xyxy
from foveate.data.dataset import ImageRecord, RegionRecord, SampleDataset
from foveate.data.records import (
    BadRecord,
    RecordLog,
    get,
    get_id,
    get_list,
    get_number,
    get_size,
    get_text,
    get_words,
    iterate_json_list,
    name_of,
    read_json,
)
from foveate.data.text import clean_caption, clean_phrase
from foveate.errors import InputError

MAX_PHRASE_WORDS = 15
SAME_BOX_IOU = 0.9
# `object_id` of a relation whose object is in the image but has no region description, so is no region.
NO_REGION = -1

# Object of an image in plain values: box, name, attributes, negative attributes.
_Object = tuple[Box, str | None, tuple[str, ...], tuple[str, ...]]


class VisualGenome(SampleDataset):
    """Visual Genome, real or exported: a region a region description.

    Phrases and boxes are prepared as DynRefer's training was (spec section 3, "VG preparation" and "caption cleaning
    at load"): signs replaced, lower case, no punctuation; phrases of more than 15 words dropped, empty ones in the
    split "train", too; boxes clamped; empty boxes dropped (in every split: no region can be cut out of them). `dropped`
    counts all of these.

    A region description gets category, attributes, negative attributes and relations of an object: the one that its
    optional key `object_id` names, else the object with the equal box, else the one with the highest IoU if that is at
    least 0.9, else none. Descriptions that name the same object are one region with several captions, the first one's
    id and its tags. A relation to an object without a region has `object_id` -1 and keeps the object's name.

    Args:
        root: folder with `image_data.json`, `region_descriptions.json`, `densecap_splits.json`, the images in
            `VG_100K/` and `VG_100K_2/`, and, optionally, `objects.json`, `attributes.json`, `relationships.json`,
            `question_answers.json` and `dataset.json`, whose key `max_phrase_words` replaces the 15.
        split: "train", "val" or "test" of `densecap_splits.json`.
        skip_bad: count broken records in `skipped` instead of raising.
        exclude_coco_ids: COCO ids of images to leave out, for example those of an evaluation set.
        only_coco: keep only images that have a COCO id, the part of Visual Genome that is called VG-COCO.

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `skip_bad` is off.
    """

    format = "visual-genome"

    def __init__(
        self,
        root: Path | str,
        split: str,
        *,
        skip_bad: bool = False,
        exclude_coco_ids: Collection[int] = (),
        only_coco: bool = False,
    ):
        self._excluded = frozenset(exclude_coco_ids)
        self._only_coco = only_coco
        super().__init__(root, split, skip_bad=skip_bad)

    def _read(self, log: RecordLog) -> Iterator[ImageRecord]:
        images = self._images(log)
        objects = self._objects(images, log)
        relations = self._relations(images, log)
        questions = self._questions(images, log)
        regions = self._regions(images, objects, relations, log)
        for image_id, (path, width, height) in images.items():
            found = marshal.loads(regions[image_id]) if image_id in regions else ()
            asked = marshal.loads(questions[image_id]) if image_id in questions else ()
            yield ImageRecord(
                image_id, path, width, height, tuple(RegionRecord(*region) for region in found), questions=asked
            )

    def _images(self, log: RecordLog) -> dict[int, tuple[str, int, int]]:
        """Image id -> (path, width, height) of the split, in the split's order."""
        splits_path, images_path = self.root / "densecap_splits.json", self.root / "image_data.json"
        splits = read_json(splits_path, dict)
        if self.split not in splits:
            raise InputError(f"{splits_path} has no split {self.split!r}; take one of {', '.join(splits)}.")
        known: dict[int, tuple[str, int, int]] = {}
        broken: set[int] = set()
        excluded: dict[int, str] = {}
        for image in iterate_json_list(images_path):
            image_id: int | None = None
            try:
                image_id = get_id(image, "image_id", "id")
                if image_id in known:
                    raise BadRecord("the image id occurs twice", image_id)
                coco_id = image.get("coco_id")
                if self._only_coco and coco_id is None:
                    excluded[image_id] = "no COCO id"
                    continue
                if isinstance(coco_id, int) and coco_id in self._excluded:
                    excluded[image_id] = "excluded COCO id"
                    continue
                known[image_id] = (_image_path(image, image_id), *get_size(image))
            except BadRecord as error:
                log.bad(images_path, f"image {name_of(image, 'image_id', 'id')}", error)
                if image_id is not None:
                    broken.add(image_id)
        chosen: dict[int, tuple[str, int, int]] = {}
        try:
            ids = get_list(splits, self.split)
        except BadRecord as error:
            raise InputError(f"{splits_path}: {error}.") from error
        for image_id in ids:
            if type(image_id) is not int:
                log.bad(splits_path, f"split {self.split}", BadRecord("an id is not a whole number", image_id))
            elif image_id in known:
                chosen[image_id] = known[image_id]
            elif image_id in excluded:
                log.dropped[excluded[image_id]] += 1
            elif image_id not in broken:
                log.bad(splits_path, f"split {self.split}", BadRecord("an id is not in image_data.json", image_id))
        return chosen

    def _objects(self, images: Collection[int], log: RecordLog) -> dict[int, bytes]:
        """Image id -> marshalled {object id: _Object} of objects.json and attributes.json together."""
        merged: dict[int, bytes] = {}
        for file, key in (("objects.json", "objects"), ("attributes.json", "attributes")):
            path = self.root / file
            for image_id, records in _by_image(path, key, images, log):
                objects: dict[int, _Object] = marshal.loads(merged[image_id]) if image_id in merged else {}
                for record in records:
                    try:
                        _merge_object(objects, record)
                    except BadRecord as error:
                        log.bad(path, f"image {image_id}, object {name_of(record, 'object_id', 'id')}", error)
                merged[image_id] = marshal.dumps(objects)
        return merged

    def _relations(self, images: Collection[int], log: RecordLog) -> dict[int, bytes]:
        """Image id -> marshalled {subject's object id: [(predicate, object's id, object's name)]}."""

        def relation(record: Any) -> tuple[int, tuple[str, int, str]]:
            subject, target = get(record, "subject"), get(record, "object")
            predicate = " ".join(get_text(record, "predicate").lower().split())
            target_id = get_id(target, "object_id", "id")
            return (get_id(subject, "object_id", "id"), (predicate, target_id, _name(target) or ""))

        return self._collect("relationships.json", "relationships", ("relationship_id", "id"), images, log, relation)

    def _questions(self, images: Collection[int], log: RecordLog) -> dict[int, bytes]:
        """Image id -> marshalled ((question, answer, kind), ...)."""

        def question(record: Any) -> tuple[None, tuple[str, str, str]]:
            text = get_text(record, "question").strip()
            kind = get_text(record, "kind") if "kind" in record else question_kind(text)
            return (None, (text, get_text(record, "answer").strip(), kind))

        found = self._collect("question_answers.json", "qas", ("qa_id",), images, log, question)
        return {image_id: marshal.dumps(tuple(marshal.loads(packed)[None])) for image_id, packed in found.items()}

    def _collect(
        self,
        file: str,
        key: str,
        id_keys: tuple[str, ...],
        images: Collection[int],
        log: RecordLog,
        convert: Callable[[Any], tuple[Any, Any]],
    ) -> dict[int, bytes]:
        collected: dict[int, bytes] = {}
        path = self.root / file
        for image_id, records in _by_image(path, key, images, log):
            groups: dict[Any, list[Any]] = {}
            for record in records:
                try:
                    group, value = convert(record)
                    groups.setdefault(group, []).append(value)
                except BadRecord as error:
                    log.bad(path, f"image {image_id}, {key} {name_of(record, *id_keys)}", error)
            if groups:
                collected[image_id] = marshal.dumps(groups)
        return collected

    def _regions(
        self,
        images: dict[int, tuple[str, int, int]],
        objects: dict[int, bytes],
        relations: dict[int, bytes],
        log: RecordLog,
    ) -> dict[int, bytes]:
        """Image id -> marshalled region records."""
        path = self.root / "region_descriptions.json"
        max_words = self._max_phrase_words()
        regions: dict[int, bytes] = {}
        for image_id, records in _by_image(path, "regions", images, log, required=True):
            _, width, height = images[image_id]
            known: dict[int, _Object] = marshal.loads(objects[image_id]) if image_id in objects else {}
            described: list[tuple[int, Box, Box, str, int | None, tuple[str, ...]]] = []
            for record in records:
                try:
                    raw = xywh_to_xyxy(*(get_number(record, side) for side in ("x", "y", "width", "height")))
                    region_id = get_id(record, "region_id", "id")
                    caption = clean_caption(clean_phrase(get_text(record, "phrase")))
                    object_id = get_id(record, "object_id") if "object_id" in record else None
                    if object_id is not None and known and object_id not in known:
                        raise BadRecord('"object_id" is the id of no object of the image', object_id)
                    box = clamp_visual_genome_box(raw, width, height)
                    if is_empty(box):
                        log.dropped["empty box"] += 1
                    elif not caption and self.split == "train":
                        log.dropped["empty phrase"] += 1
                    elif caption.count(" ") >= max_words:
                        log.dropped[f"phrase of more than {max_words} words"] += 1
                    else:
                        described.append((region_id, raw, box, caption, object_id, get_words(record, "tags")))
                except BadRecord as error:
                    log.bad(path, f"image {image_id}, region {name_of(record, 'region_id', 'id')}", error)
            related = marshal.loads(relations[image_id]) if image_id in relations else {}
            regions[image_id] = marshal.dumps(_link(described, known, related))
        return regions

    def _max_phrase_words(self) -> int:
        path = self.root / "dataset.json"
        if not path.exists():
            return MAX_PHRASE_WORDS
        content = read_json(path, dict)
        limit = content.get("max_phrase_words", MAX_PHRASE_WORDS)
        if type(limit) is not int or limit < 1:
            raise InputError(f'{path}: "max_phrase_words" is {limit!r}; it must be a positive whole number.')
        return limit


def question_kind(question: str) -> str:
    """The kind of a question without one: "colour", "count", else its first word ("what", "where", "who", ...)."""
    words = question.lower().split()
    if words[:2] in (["what", "color"], ["what", "colour"]):
        return "colour"
    if words[:2] == ["how", "many"]:
        return "count"
    return words[0] if words else "what"


def _by_image(
    path: Path, key: str, images: Collection[int], log: RecordLog, *, required: bool = False
) -> Iterator[tuple[int, list[Any]]]:
    """(image id, its records) of the wanted images of a file; an optional file that is not there has none."""
    if not required and not path.exists():
        return
    seen: set[int] = set()
    for image in iterate_json_list(path):
        try:
            image_id = get_id(image, "image_id", "id")
            if image_id not in images:
                continue
            if image_id in seen:
                raise BadRecord("the image id occurs twice", image_id)
            seen.add(image_id)
            records = get_list(image, key)
        except BadRecord as error:
            log.bad(path, f"image {name_of(image, 'image_id', 'id')}", error)
            continue
        yield image_id, records


def _image_path(image: Any, image_id: int) -> str:
    """VG_100K/ID.jpg or VG_100K_2/ID.jpg: the last two parts of the record's URL say which folder and file."""
    if "url" not in image:
        return f"VG_100K/{image_id}.jpg"
    parts = get_text(image, "url").split("/")[-2:]
    if len(parts) != 2 or parts[0] not in ("VG_100K", "VG_100K_2") or not parts[1].startswith(f"{image_id}."):
        raise BadRecord('"url" does not end in VG_100K/ID.jpg or VG_100K_2/ID.jpg', image["url"])
    return "/".join(parts)


def _name(record: Any) -> str | None:
    """Name of an object: a list of names in objects and attributes, one name or a list in relationships."""
    if "name" in record:
        return " ".join(get_text(record, "name").lower().split()) or None
    names = get_words(record, "names", "object_names")
    return names[0] if names else None


def _merge_object(objects: dict[int, _Object], record: Any) -> None:
    x, y = get_number(record, "x"), get_number(record, "y")
    box = xywh_to_xyxy(x, y, get_number(record, "w", "width"), get_number(record, "h", "height"))
    if "object_id" in record or "id" in record:
        object_id = get_id(record, "object_id", "id")
    else:
        same = (known for known, (other, *_) in objects.items() if other == box)
        object_id = next(same, -1 - len(objects))
    _, name, attributes, negatives = objects.get(object_id, (box, None, (), ()))
    attributes = tuple(dict.fromkeys((*attributes, *get_words(record, "attributes"))))
    negatives = tuple(dict.fromkeys((*negatives, *get_words(record, "negative_attributes"))))
    both = set(attributes) & set(negatives)
    if both:
        raise BadRecord("an attribute is both in attributes and negative_attributes", sorted(both))
    objects[object_id] = (box, name or _name(record), attributes, negatives)


def _link(
    described: list[tuple[int, Box, Box, str, int | None, tuple[str, ...]]],
    objects: dict[int, _Object],
    relations: dict[int, list[tuple[str, int, str]]],
) -> list[tuple[Any, ...]]:
    """Region records from descriptions (id, raw box, clamped box, caption, object id, tags) and the image's objects."""
    linked = _linked_objects([entry[1] for entry in described], objects)
    merged: dict[Any, RegionRecord] = {}
    region_of: dict[int, int] = {}
    object_of: dict[Any, int] = {}
    for (region_id, _, box, caption, named, tags), found in zip(described, linked, strict=True):
        # Only descriptions that name their object are merged: two people's phrases about one real box stay two regions.
        key = ("object", named) if named is not None else ("region", len(merged))
        if key in merged:
            captions = merged[key].captions
            merged[key] = merged[key]._replace(captions=captions if caption in captions else (*captions, caption))
            continue
        object_id = found if named is None else named
        region = RegionRecord(region_id, box, (caption,), tags=tags)
        if object_id is not None:
            if object_id in objects:
                _, name, attributes, negatives = objects[object_id]
                region = region._replace(category=name, attributes=attributes, negative_attributes=negatives)
            region_of.setdefault(object_id, region_id)
            object_of[key] = object_id
        merged[key] = region
    for key, object_id in object_of.items():
        if object_id in relations:
            found_relations = relations[object_id]
            merged[key] = merged[key]._replace(
                relations=tuple(
                    (what, region_of.get(target, NO_REGION), name) for what, target, name in found_relations
                )
            )
    return [tuple(region) for region in merged.values()]


def _linked_objects(boxes: list[Box], objects: dict[int, _Object]) -> list[int | None]:
    """For each box the object of the equal box, else that of the highest IoU from 0.9 on, else None."""
    if not boxes or not objects:
        return [None] * len(boxes)
    ids = list(objects)
    iou = pairwise_iou(np.array(boxes), np.array([objects[object_id][0] for object_id in ids]))
    best = iou.argmax(axis=1)
    return [
        ids[column] if value >= SAME_BOX_IOU else None
        for column, value in zip(best.tolist(), iou.max(axis=1).tolist(), strict=True)
    ]
