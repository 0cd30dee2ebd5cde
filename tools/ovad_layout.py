"""Writes a dataset in the layout of COCO, whose annotations say attributes, in the layout of OVAD.

    python tools/ovad_layout.py DATA/coco val DATA/ovad
    foveate evaluate recipes/dynrefer/ovad.yaml evaluation.protocol.root=DATA/ovad --model dynrefer-world

so that the attribute protocol runs on what `foveate world scenes --format coco` writes. The split is OVAD's, 2000.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.data import open_dataset
from foveate.data.boxes import xyxy_to_xywh
from foveate.errors import FoveateError, InputError
from foveate.files import atomic_folder
from foveate.world.vocabulary import raw_vocabulary


def convert(root: Path, split: str, out: Path) -> Path:
    """Writes `out`/ovad2000.json and the images in `out`/val2017/.

    Attributes are named "family:word"; by the number of regions that have them they are head, medium and tail, a third
    each.

    Raises:
        InputError: the dataset is broken or says no attributes, or `out` is not empty.
    """
    dataset = open_dataset("coco", root, split)
    counts = Counter(word for sample in dataset for region in sample.regions for word in region.attributes)
    if not counts:
        raise InputError(f"the annotations of {root} say no attributes; write them by `foveate world scenes`.")
    family: dict[str, str] = {}
    for name, values in raw_vocabulary()["families"].items():
        for word in values["values"]:
            family.setdefault(word, name)
    words = [word for word, _ in counts.most_common()]
    attributes = [
        {
            "id": k,
            "name": f"{family.get(word, 'other')}:{word}",
            "type": family.get(word, "other"),
            "parent_type": family.get(word, "other"),
            "freq_set": ("head", "medium", "tail")[3 * k // len(words)],
            "is_has_att": "is",
        }
        for k, word in enumerate(words)
    ]
    categories = dict.fromkeys(region.category for sample in dataset for region in sample.regions)
    category_ids = {name: number for number, name in enumerate(categories, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with atomic_folder(out) as folder:
        (folder / "val2017").mkdir()
        for sample in dataset:
            copied = folder / "val2017" / sample.path.name
            try:
                os.link(sample.path, copied)
            except OSError:  # another disk
                shutil.copyfile(sample.path, copied)
            images.append(
                {"id": sample.image_id, "file_name": copied.name, "width": sample.width, "height": sample.height}
            )
            for region in sample.regions:
                labels = [
                    int(w in region.attributes) - int(w not in {*region.attributes, *region.negative_attributes})
                    for w in words
                ]
                annotations.append(
                    {
                        "id": region.region_id,
                        "image_id": sample.image_id,
                        "category_id": category_ids[region.category],
                        "bbox": list(xyxy_to_xywh(region.box)),
                        "att_vec": labels,
                    }
                )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
            "attributes": attributes,
        }
        (folder / "ovad2000.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", type=Path, help="dataset in the layout of COCO")
    parser.add_argument("split", help="its split, such as val")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    given = parser.parse_args(arguments)
    try:
        print(convert(given.root, given.split, given.out))
    except FoveateError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
