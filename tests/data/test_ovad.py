"""The OVAD reader on a miniature of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.data import open_dataset
from foveate.data.ovad import OVAD
from foveate.errors import InputError


def content() -> dict[str, Any]:
    attribute = {"parent_type": "color", "freq_set": "head", "is_has_att": "is", "type": "color"}
    box = {"image_id": 139, "category_id": 3, "area": 4.0, "iscrowd": 0}
    return {
        "images": [
            {"id": 139, "file_name": "000000000139.jpg", "width": 64, "height": 48},
            {"id": 285, "file_name": "000000000285.jpg", "width": 64, "height": 48},
        ],
        "annotations": [
            box | {"id": 5, "bbox": [1, 2, 10, 20], "att_vec": [1, 0, -1]},
            box | {"id": 6, "bbox": [0, 0, 64, 48], "att_vec": [-1, -1, -1]},
            box | {"id": 7, "bbox": [3, 3, 0, 8], "att_vec": [1, 1, 1]},
        ],
        "categories": [{"id": 3, "name": "car"}],
        "attributes": [
            attribute | {"id": k, "name": f"color:{name}"} for k, name in enumerate(("red", "blue", "grey"))
        ],
    }


def write(folder: Path, what: Any) -> Path:
    (folder / "ovad2000.json").write_text(json.dumps(what))
    return folder


def test_boxes_and_labels(tmp_path: Path) -> None:
    dataset = open_dataset("ovad", write(tmp_path, content()), "2000")
    assert isinstance(dataset, OVAD)
    assert [entry["name"] for entry in dataset.attributes] == ["color:red", "color:blue", "color:grey"]
    first, empty = dataset
    assert (first.image_id, first.path) == (139, tmp_path / "val2017" / "000000000139.jpg")
    assert (first.regions[0].region_id, first.regions[0].box, first.regions[0].category) == (5, (1, 2, 11, 22), "car")
    # -1 is neither: it must not become a negative.
    assert (first.regions[0].attributes, first.regions[0].negative_attributes) == (("color:red",), ("color:blue",))
    assert (first.regions[1].attributes, first.regions[1].negative_attributes) == ((), ())
    assert empty.regions == ()
    assert dataset.dropped == {"empty box": 1}


@pytest.mark.parametrize(
    ("place", "key", "value", "named"),
    [
        ("annotations", "att_vec", [1, 0], r"annotation 5: \"att_vec\" is not a list of 3 numbers -1, 0 or 1"),
        ("annotations", "att_vec", [1, 0, 2], "annotation 5.*att_vec"),
        ("annotations", "image_id", 1, "annotation 5.*id of no image"),
        ("annotations", "bbox", [1, 2, 100, 20], "annotation 5.*leaves the image of 64x48"),
    ],
)
def test_broken_annotations(tmp_path: Path, place: str, key: str, value: Any, named: str) -> None:
    broken = content()
    broken[place][0][key] = value
    with pytest.raises(InputError, match=rf"ovad2000\.json: {named}"):
        open_dataset("ovad", write(tmp_path, broken), "2000")
    dataset = open_dataset("ovad", tmp_path, "2000", skip_bad=True)
    assert dataset.skipped.total() == 1
    assert [region.region_id for region in dataset[0].regions] == [6]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("freq_set", "rare", "head, medium, tail"), ("id", 4, "place 0"), ("is_has_att", None, "not a string")],
)
def test_a_broken_attribute_list_is_never_skipped(tmp_path: Path, key: str, value: Any, named: str) -> None:
    broken = content()
    broken["attributes"][0][key] = value
    with pytest.raises(InputError, match=rf"ovad2000\.json: attributes: .*{named}"):
        open_dataset("ovad", write(tmp_path, broken), "2000", skip_bad=True)


def test_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ovad1200\.json does not exist; the splits there are 2000"):
        open_dataset("ovad", write(tmp_path, content()), "1200")
