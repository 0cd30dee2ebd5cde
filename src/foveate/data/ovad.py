"""Reader of OVAD, the benchmark of open-vocabulary attribute detection: its annotation file and COCO's photographs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from foveate.data.boxes import is_empty
from foveate.data.coco import annotation_box, annotation_image, read_categories, read_images, top_level_list
from foveate.data.dataset import ImageRecord, RegionRecord, SampleDataset
from foveate.data.records import BadRecord, RecordLog, get_id, get_list, get_text, name_of, read_json
from foveate.errors import InputError


class OVAD(SampleDataset):
    """OVAD (Bravo et al., CVPR 2023): a region an annotated box, its attributes by their full names ("color:red").

    An annotation's `att_vec` says of every attribute whether it holds (1), does not (0) or is unknown (-1); those that
    hold are a region's `attributes`, those that do not its `negative_attributes`.

    Args:
        root: folder with `ovadSPLIT.json` and COCO's image folder `val2017/`.
        split: the part of the file's name after "ovad": "2000".
        skip_bad: count broken records in `skipped` instead of raising.

    Attributes:
        attributes: the entries of the file's "attributes", in the order of `att_vec`: "name"
            ("type:synonym/synonym"), "parent_type", "freq_set" ("head", "medium" or "tail"), "is_has_att" ("is" or
            "has").

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `skip_bad` is off.
    """

    format = "ovad"
    attributes: tuple[Mapping[str, str], ...] = ()

    def _read(self, log: RecordLog) -> Iterator[ImageRecord]:
        path = self.root / f"ovad{self.split}.json"
        if not path.is_file():
            known = sorted(found.stem.removeprefix("ovad") for found in self.root.glob("ovad*.json"))
            hint = f"the splits there are {', '.join(known)}." if known else "docs/datasets.md lists the files."
            raise InputError(f"{path} does not exist; {hint}")
        content = read_json(path, dict)
        images = read_images(path, content, log)
        categories = read_categories(path, content, log)
        try:
            listed = get_list(content, "attributes")
            self.attributes = tuple(_attribute(index, record) for index, record in enumerate(listed))
        except BadRecord as error:
            # Without the list no annotation can be read, so it is never skipped.
            raise InputError(f"{path}: attributes: {error}; get the file again.") from error
        names = [attribute["name"] for attribute in self.attributes]
        regions: dict[int, list[RegionRecord]] = {image_id: [] for image_id in images}
        for annotation in top_level_list(path, content, "annotations"):
            try:
                image_id, _, width, height = annotation_image(annotation, images)
                box = annotation_box(annotation, width, height)
                if is_empty(box):
                    log.dropped["empty box"] += 1
                    continue
                labels = get_list(annotation, "att_vec")
                if len(labels) != len(names) or not all(type(label) is int and -1 <= label <= 1 for label in labels):
                    raise BadRecord(f'"att_vec" is not a list of {len(names)} numbers -1, 0 or 1', labels)
                category = categories.get(get_id(annotation, "category_id")) if "category_id" in annotation else None
                regions[image_id].append(
                    RegionRecord(
                        region_id=get_id(annotation, "id"),
                        box=box,
                        category=category,
                        attributes=tuple(name for name, label in zip(names, labels, strict=True) if label == 1),
                        negative_attributes=tuple(
                            name for name, label in zip(names, labels, strict=True) if label == 0
                        ),
                    )
                )
            except BadRecord as error:
                log.bad(path, f"annotation {name_of(annotation, 'id')}", error)
        for image_id, (name, width, height) in images.items():
            yield ImageRecord(image_id, f"val2017/{name}", width, height, tuple(regions[image_id]))


def _attribute(index: int, record: Any) -> dict[str, str]:
    """An entry of "attributes"; its place in the list is its place in `att_vec`."""
    if get_id(record, "id") != index:
        raise BadRecord(f"the entry at place {index} has another id", record["id"])
    attribute = {key: get_text(record, key) for key in ("name", "parent_type", "freq_set", "is_has_att")}
    for key, allowed in (("freq_set", ("head", "medium", "tail")), ("is_has_att", ("is", "has"))):
        if attribute[key] not in allowed:
            raise BadRecord(f'"{key}" is none of {", ".join(allowed)}', attribute[key])
    return attribute
