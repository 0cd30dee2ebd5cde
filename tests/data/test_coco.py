"""The COCO reader on a miniature with the key names of the real files, and on broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.data import open_dataset
from foveate.data.coco import COCO, annotation_box
from foveate.errors import InputError
from foveate.vision.images import decode_rle


def instances() -> dict[str, Any]:
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"url": "http://x", "id": 1, "name": "x"}],
        "images": [
            {
                "license": 4,
                "file_name": "000000397133.jpg",
                "coco_url": "http://x",
                "height": 40,
                "width": 60,
                "id": 397133,
            },
            {
                "license": 1,
                "file_name": "000000037777.jpg",
                "coco_url": "http://x",
                "height": 10,
                "width": 20,
                "id": 37777,
            },
        ],
        "annotations": [
            {
                "segmentation": [[5.0, 6.0, 25.0, 6.0, 25.0, 16.0, 5.0, 16.0]],
                "area": 200.0,
                "iscrowd": 0,
                "image_id": 397133,
                "bbox": [5.0, 6.0, 20.0, 10.0],
                "category_id": 44,
                "id": 82445,
            },
            {
                "segmentation": {"counts": [10, 10, 180], "size": [10, 20]},
                "area": 10,
                "iscrowd": 1,
                "image_id": 37777,
                "bbox": [1, 0, 1, 10.02],
                "category_id": 1,
                "id": 900100,
            },
            {"image_id": 37777, "bbox": [3, 3, 0, 5], "category_id": 1, "id": 2, "segmentation": [], "iscrowd": 0},
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "kitchen", "id": 44, "name": "bottle"},
        ],
    }


def write(folder: Path, content: Any, captions: Any = None) -> Path:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    if captions is not None:
        (folder / "annotations/captions_val2017.json").write_text(json.dumps(captions))
    return folder


def test_real_layout(tmp_path: Path) -> None:
    captions = {
        "images": instances()["images"],
        "annotations": [
            {"image_id": 37777, "id": 38, "caption": "A kitchen with two Windows."},
            {"image_id": 37777, "id": 39, "caption": "A stove. "},
        ],
    }
    dataset = open_dataset("coco", write(tmp_path, instances(), captions), "val2017")
    first, second = dataset
    assert (first.image_id, first.width, first.height) == (397133, 60, 40)
    assert first.path == tmp_path / "val2017/000000397133.jpg"
    assert first.captions == ()
    (bottle,) = first.regions
    assert (bottle.region_id, bottle.box, bottle.category) == (82445, (5, 6, 25, 16), "bottle")
    assert (bottle.captions, bottle.attributes, bottle.negative_attributes, bottle.tags) == ((), (), (), ())
    expected = np.zeros((40, 60), bool)
    expected[6:16, 5:25] = True
    assert bottle.mask is not None
    np.testing.assert_array_equal(decode_rle(bottle.mask), expected)
    assert second.captions == ("A kitchen with two Windows.", "A stove.")
    (crowd,) = second.regions
    assert crowd.box == (1, 0, 2, 10)  # the overhang of 0.02 is COCO's rounding
    assert crowd.mask is not None
    assert decode_rle(crowd.mask).sum() == 10
    assert decode_rle(crowd.mask)[:, 1].all()
    assert dataset.dropped == {"empty box": 1}


def test_optional_keys(tmp_path: Path) -> None:
    content = instances()
    content["annotations"][0] |= {
        "attributes": ["Red"],
        "negative_attributes": ["blue", "green"],
        "tags": ["bottle", "red"],
    }
    (region,) = open_dataset("coco", write(tmp_path, content), "val2017")[0].regions
    assert (region.attributes, region.negative_attributes, region.tags) == (
        ("red",),
        ("blue", "green"),
        ("bottle", "red"),
    )


@pytest.mark.parametrize(
    ("place", "key", "value", "named"),
    [
        ("annotations", "bbox", KeyError, ["annotation 82445", '"bbox"']),
        ("annotations", "bbox", [1, 2, float("nan"), 4], ["annotation 82445", "nan"]),
        ("annotations", "bbox", [1, 2, 3], ["annotation 82445", "[1, 2, 3]"]),
        ("annotations", "bbox", "1 2 3 4", ["annotation 82445", "1 2 3 4"]),
        ("annotations", "bbox", [50, 2, 30, 4], ["annotation 82445", "60x40", "[50, 2, 30, 4]"]),
        ("annotations", "bbox", [-7, 2, 30, 4], ["annotation 82445", "-7"]),
        ("annotations", "bbox", [1e300, 2, 1e308, 4], ["annotation 82445"]),
        ("annotations", "image_id", 5, ["annotation 82445", "5"]),
        ("annotations", "category_id", 2, ["annotation 82445", "2"]),
        ("annotations", "category_id", [2], ["annotation 82445", "[2]"]),
        ("annotations", "segmentation", [[1, 2]], ["annotation 82445", "[1, 2]"]),
        ("annotations", "attributes", "red", ["annotation 82445", "red"]),
        ("images", "file_name", "../../etc/passwd", ["image 397133", "passwd"]),
        ("images", "file_name", "", ["image 397133"]),
        ("images", "height", "40", ["image 397133", "'40'"]),
        ("images", "id", 37777, ["image 37777", "twice"]),
        ("categories", "name", None, ["category 1", "None"]),
    ],
)
def test_broken_records(tmp_path: Path, place: str, key: str, value: Any, named: list[str]) -> None:
    content = instances()
    if value is KeyError:
        del content[place][0][key]
    else:
        content[place][0][key] = value
    write(tmp_path, content)
    with pytest.raises(InputError) as raised:
        open_dataset("coco", tmp_path, "val2017")
    assert all(word in str(raised.value) for word in ["instances_val2017.json", *named]), raised.value
    dataset = open_dataset("coco", tmp_path, "val2017", skip_bad=True)
    assert dataset.skipped.total() >= 1
    assert 82445 not in [region.region_id for sample in dataset for region in sample.regions] or place == "categories"


def test_broken_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances_val2017\.json does not exist; docs"):
        open_dataset("coco", tmp_path, "val2017")
    write(tmp_path, instances())
    with pytest.raises(InputError, match="the splits there are val2017"):
        open_dataset("coco", tmp_path, "val")
    write(tmp_path, [])
    with pytest.raises(InputError, match="holds a list where an object"):
        open_dataset("coco", tmp_path, "val2017")
    write(tmp_path, {"images": []})
    with pytest.raises(InputError, match="categories"):
        open_dataset("coco", tmp_path, "val2017")
    write(tmp_path, instances(), {"annotations": [{"image_id": 37777, "id": 4, "caption": None}]})
    with pytest.raises(InputError, match=r"captions_val2017\.json: annotation 4"):
        open_dataset("coco", tmp_path, "val2017")


def test_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'visual-genome'"):
        open_dataset("visual_genom", tmp_path, "train")
    with pytest.raises(InputError, match="take one of visual-genome, refcocog, coco"):
        open_dataset("xyz", tmp_path, "train")


def test_random_access(tmp_path: Path) -> None:
    dataset = open_dataset("coco", write(tmp_path, instances()), "val2017")
    assert dataset[-1] == dataset[1] == list(dataset)[1] == dataset[0:2][1]
    with pytest.raises(IndexError):
        dataset[2]


sides = st.floats(0, 50)


@given(sides, sides, sides, sides)
def test_xywh_is_converted_once(x: float, y: float, width: float, height: float) -> None:
    assert annotation_box({"bbox": [x, y, width, height]}, 100, 100) == (x, y, x + width, y + height)


def test_crowds_and_all_categories(tmp_path: Path) -> None:
    content = instances()
    content["categories"].append({"supercategory": "animal", "id": 90, "name": "dog"})
    dataset = open_dataset("coco", write(tmp_path, content), "val2017")
    assert [[region.crowd for region in sample.regions] for sample in dataset] == [[False], [True]]
    assert isinstance(dataset, COCO)
    assert dataset.categories == ("person", "bottle", "dog")
    content["annotations"][0]["iscrowd"] = 2
    with pytest.raises(InputError, match=r'annotation 82445: "iscrowd" is neither 0 nor 1 \(2\)'):
        open_dataset("coco", write(tmp_path, content), "val2017")
