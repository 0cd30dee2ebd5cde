"""The RefCOCOg reader on miniatures of MDETR's and GLaMM's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.data import open_dataset
from foveate.errors import InputError

NAME = "COCO_train2014_000000380440.jpg"
OTHER = "COCO_train2014_000000419645.jpg"


def image(entry: int, name: str, original: int, caption: str) -> dict[str, Any]:
    return {
        "file_name": name,
        "height": 480,
        "width": 640,
        "id": entry,
        "original_id": original,
        "caption": caption,
        "dataset_name": "refcocog",
    }


def annotation(number: int, entry: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {
        "area": 9.0,
        "iscrowd": 0,
        "image_id": entry,
        "category_id": 1,
        "id": number,
        "bbox": bbox,
        "tokens_positive": [[0, 3]],
    } | more


def mdetr() -> dict[str, Any]:
    return {
        "info": [],
        "licenses": [],
        "images": [
            image(0, NAME, 380440, "The man in yellow coat."),
            image(1, OTHER, 419645, "a dog"),
            image(2, NAME, 380440, "Skier, in yellow"),
            image(3, NAME, 380440, "a red ski"),
        ],
        "annotations": [
            annotation(0, 0, [374.31, 65.06, 136.04, 201.94]),
            annotation(1, 1, [10, 20, 30, 40]),
            annotation(2, 2, [374.31, 65.06, 136.04, 201.94]),
            annotation(3, 3, [1, 2, 3, 4]),
        ],
        "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
    }


def write(folder: Path, split: str, content: Any) -> Path:
    (folder / f"finetune_refcocog_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_mdetr_layout(tmp_path: Path, split: str) -> None:
    dataset = open_dataset("refcocog", write(tmp_path, split, mdetr()), split)
    assert [(sample.image_id, sample.path) for sample in dataset] == [
        (380440, tmp_path / "train2014" / NAME),
        (419645, tmp_path / "train2014" / OTHER),
    ]
    skier, ski = dataset[0].regions
    assert skier.captions == ("the man in yellow coat", "skier, in yellow")
    assert skier.box == pytest.approx((374.31, 65.06, 510.35, 267.0))
    assert (skier.region_id, ski.region_id) == (0, 3)
    assert (ski.box, ski.captions, ski.category) == ((1, 2, 4, 6), ("a red ski",), None)


def test_glamm_layout_keeps_entries(tmp_path: Path) -> None:
    """The protocol groups by image id of the captions file: the same photograph and box twice is two hypotheses.

    References stay as they were written, repeats included.
    """
    content = mdetr()
    content["images"] = [
        {key: value for key, value in entry.items() if key != "caption"} for entry in content["images"]
    ]
    content["annotations"] = [
        annotation(10, 0, [1, 2, 3, 4], caption="A man."),
        annotation(11, 0, [1, 2, 3, 4], caption="someone"),
        annotation(14, 0, [1, 2, 3, 4], caption="A  man.\n"),
        annotation(12, 2, [1, 2, 3, 4], caption="A man."),
        annotation(13, 1, [1, 2, 3, 4], caption="a dog"),
    ]
    dataset = open_dataset("refcocog", write(tmp_path, "val_captions", content), "val_captions")
    assert [[(region.region_id, region.captions) for region in sample.regions] for sample in dataset] == [
        [(0, ("A man.", "someone", "A man.")), (2, ("A man.",))],
        [(1, ("a dog",))],
    ]
    content["annotations"][1]["bbox"] = [1, 2, 3, 5]
    with pytest.raises(InputError, match=r"val_captions\.json: annotation 11: .*two boxes"):
        open_dataset("refcocog", write(tmp_path, "val_captions", content), "val_captions")


def test_optional_keys(tmp_path: Path) -> None:
    content = mdetr()
    content["categories"].append({"id": 2, "name": "dog"})
    more = {"category_id": 2, "attributes": ["brown"], "negative_attributes": ["red"], "tags": ["dog"]}
    content["annotations"][1] |= more | {"segmentation": [[10, 20, 40, 20, 40, 60]]}
    (dog,) = open_dataset("refcocog", write(tmp_path, "val", content), "val")[1].regions
    assert (dog.category, dog.attributes, dog.negative_attributes, dog.tags) == ("dog", ("brown",), ("red",), ("dog",))
    assert dog.mask is not None
    assert dog.mask["size"] == [480, 640]


@pytest.mark.parametrize(
    ("place", "key", "value", "named"),
    [
        ("annotations", "bbox", [1, 2, float("nan"), 4], ["annotation 0", "nan"]),
        ("annotations", "image_id", 17, ["annotation 0", "17"]),
        ("annotations", "image_id", {}, ["annotation 0", "{}"]),
        ("annotations", "category_id", [], ["annotation 0", "[]"]),
        ("annotations", "caption", 4, ["annotation 0", "4"]),
        ("images", "caption", None, ["annotation 0", "None"]),
        ("images", "file_name", "/etc/passwd", ["image 0", "passwd"]),
        ("images", "id", [], ["image []"]),
    ],
)
def test_broken_records(tmp_path: Path, place: str, key: str, value: Any, named: list[str]) -> None:
    content = mdetr()
    content[place][0][key] = value
    write(tmp_path, "train", content)
    with pytest.raises(InputError) as raised:
        open_dataset("refcocog", tmp_path, "train")
    assert all(word in str(raised.value) for word in ["finetune_refcocog_train.json", *named]), raised.value
    dataset = open_dataset("refcocog", tmp_path, "train", skip_bad=True)
    assert dataset.skipped.total() >= 1
    captions = [caption for sample in dataset for region in sample.regions for caption in region.captions]
    assert sorted(captions) == ["a dog", "a red ski", "skier, in yellow"]


def test_splits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'testA'; take one of train, val, test, val_captions"):
        open_dataset("refcocog", tmp_path, "testA")
    with pytest.raises(InputError, match=r"finetune_refcocog_train\.json does not exist"):
        open_dataset("refcocog", tmp_path, "train")


def test_captions_of_visual_genome(tmp_path: Path) -> None:
    content = mdetr()
    content["images"] = [image(7, "7.jpg", 7, "x") | {"original_id": None}, image(9, "9.jpg", 9, "x")]
    content["annotations"] = [
        annotation(1, 7, [1, 2, 3, 4], caption="The Dog!"),
        annotation(2, 9, [10, 2, 30, 4], caption="a cat"),
    ]
    (tmp_path / "test_caption.json").write_text(json.dumps(content))
    (tmp_path / "VG_100K_2").mkdir()
    (tmp_path / "VG_100K_2" / "9.jpg").touch()
    dog, cat = open_dataset("vg-captions", tmp_path, "test")
    assert (dog.image_id, dog.path, dog.regions[0].region_id) == (7, tmp_path / "VG_100K/7.jpg", 7)
    assert dog.regions[0].captions == ("The Dog!",)
    assert (cat.path, cat.regions[0].box) == (tmp_path / "VG_100K_2/9.jpg", (10, 2, 40, 6))
    with pytest.raises(InputError, match="vg-captions has no split 'val'; take one of test"):
        open_dataset("vg-captions", tmp_path, "val")
