"""Reader of RefCOCOg in the JSON forms in use: MDETR's `finetune_refcocog_*.json` and GLaMM's captions file.

The original release is a Python pickle (`refs(umd).p`). Unpickling a file runs whatever code is in it, so foveate never
does; the JSON files hold the same expressions and boxes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from foveate.data.boxes import Box, is_empty
from foveate.data.coco import (
    annotation_box,
    annotation_image,
    read_categories,
    read_images,
    region_record,
    top_level_list,
)
from foveate.data.dataset import ImageRecord, RegionRecord, SampleDataset
from foveate.data.records import BadRecord, RecordLog, get_id, get_text, name_of, read_json
from foveate.data.text import clean_caption
from foveate.errors import InputError

# The photographs are COCO's; their names say which folder of COCO they come from.
_COCO_NAME = re.compile(r"COCO_([a-z]+\d{4})_\d+\.\w+")


class RefCOCOg(SampleDataset):
    """Referring expressions as region captions, one image sample a photograph.

    Both files have one "image" entry an expression (or a region), so a photograph occurs several times. Entries of the
    splits "train", "val" and "test" that have the same box in a photograph become one region with several captions,
    whose id is that of its first annotation. In "val_captions", GLaMM's evaluation file, an entry stays one region and
    its id is the *entry's image id*: the evaluation protocol has exactly one hypothesis for each of them (DynRefer spec
    section 5).

    Captions are cleaned (`foveate.data.text.clean_caption`), but for those of "val_captions": references are scored as
    they were written, repeats included, for cleaning is the metric's tokenizer's work. Masks, attributes and tags are
    there if the file has them.

    Args:
        root: folder with `finetune_refcocog_SPLIT.json` and COCO's image folder `train2014/`.
        split: "train", "val", "test" (MDETR's files) or "val_captions" (GLaMM's `finetune_refcocog_val_captions.json`).
        skip_bad: count broken records in `skipped` instead of raising.

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `skip_bad` is off.
    """

    format = "refcocog"
    splits: Mapping[str, str] = {
        split: f"finetune_refcocog_{split}.json" for split in ("train", "val", "test", "val_captions")
    }
    # Splits that keep their entries apart, as the captioning protocols count them.
    entries: Collection[str] = ("val_captions",)

    def _read(self, log: RecordLog) -> Iterator[ImageRecord]:
        if self.split not in self.splits:
            raise InputError(f"{self.format} has no split {self.split!r}; take one of {', '.join(self.splits)}.")
        path = self.root / self.splits[self.split]
        content = read_json(path, dict)
        images = read_images(path, content, log)
        entries = {
            entry["id"]: entry
            for entry in content["images"]
            if isinstance(entry, dict) and type(entry.get("id")) is int and entry["id"] in images
        }
        categories = read_categories(path, content, log) if "categories" in content else {}
        # Photograph -> key of the region -> region.
        photographs: dict[str, dict[Any, RegionRecord]] = {name: {} for name, _, _ in images.values()}
        for annotation in top_level_list(path, content, "annotations"):
            try:
                image_id, name, width, height = annotation_image(annotation, images)
                box = annotation_box(annotation, width, height)
                if is_empty(box):
                    log.dropped["empty box"] += 1
                    continue
                described = annotation if "caption" in annotation else entries[image_id]
                caption = get_text(described, "caption")
                caption = " ".join(caption.split()) if self.split in self.entries else clean_caption(caption)
                if not caption and self.split == "train":
                    log.dropped["empty caption"] += 1
                    continue
                self._add(photographs[name], annotation, image_id, box, caption, categories, (width, height))
            except BadRecord as error:
                log.bad(path, f"annotation {name_of(annotation, 'id')}", error)
        sizes = {name: (image_id, width, height) for image_id, (name, width, height) in reversed(images.items())}
        for name, regions in photographs.items():
            entry_id, width, height = sizes[name]
            original = entries[entry_id].get("original_id")
            image_id = original if type(original) is int else entry_id
            yield ImageRecord(image_id, self._image_path(name), width, height, tuple(regions.values()))

    def _add(
        self,
        regions: dict[Any, RegionRecord],
        annotation: Any,
        image_id: int,
        box: Box,
        caption: str,
        categories: dict[int, str],
        size: tuple[int, int],
    ) -> None:
        if self.split in self.entries:
            key: Any = image_id
            region_id = image_id
            if key in regions and regions[key].box != box:
                raise BadRecord("an image entry of the captions file has two boxes", list(box))
        else:
            region_id = get_id(annotation, "id")
            key = box
        if key in regions:
            region = regions[key]
            if self.split in self.entries or caption not in region.captions:
                regions[key] = region._replace(captions=(*region.captions, caption))
            return
        category = categories.get(get_id(annotation, "category_id")) if "category_id" in annotation else None
        # MDETR's files give every annotation the one category "object", which says nothing.
        category = None if category == "object" else category
        regions[key] = region_record(annotation, region_id, box, category, *size)._replace(captions=(caption,))

    def _image_path(self, name: str) -> str:
        """Where a photograph is, from the dataset's root."""
        match = _COCO_NAME.fullmatch(name)
        return f"{match.group(1) if match else 'images'}/{name}"


class VisualGenomeCaptions(RefCOCOg):
    """GLaMM's captions file of Visual Genome, `test_caption.json`: 5,000 regions, one an image.

    It has the layout of GLaMM's file of RefCOCOg and is read by the same rules (`RefCOCOg`, "val_captions").

    Args:
        root: folder with `test_caption.json` and the images in `VG_100K/` and `VG_100K_2/`.
        split: "test".
        skip_bad: count broken records in `skipped` instead of raising.

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `skip_bad` is off.
    """

    format = "vg-captions"
    splits: Mapping[str, str] = {"test": "test_caption.json"}
    entries: Collection[str] = ("test",)

    def _image_path(self, name: str) -> str:
        # The file does not say which of the two folders an image is in.
        second = f"VG_100K_2/{name}"
        return second if (self.root / second).is_file() else f"VG_100K/{name}"
