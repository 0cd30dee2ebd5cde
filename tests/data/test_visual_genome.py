"""The Visual Genome reader on miniatures with the key names of the real releases 1.0 and 1.2."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from foveate.data import open_dataset
from foveate.data.samples import Question, Relation
from foveate.data.visual_genome import VisualGenome, question_kind
from foveate.errors import InputError

URL = "https://cs.stanford.edu/people/rak248/"


def files_of_1_2() -> dict[str, Any]:
    clock = {"synsets": ["clock.n.01"], "h": 339, "object_id": 1058498, "names": ["clock"], "w": 79, "x": 421, "y": 91}
    street = {"synsets": [], "h": 262, "object_id": 5046, "names": ["Street "], "w": 714, "x": 77, "y": 328}
    return {
        "image_data.json": [
            {
                "width": 800,
                "url": URL + "VG_100K_2/1.jpg",
                "height": 600,
                "image_id": 1,
                "coco_id": None,
                "flickr_id": None,
            },
            {"width": 500, "url": URL + "VG_100K/2.jpg", "height": 400, "image_id": 2, "coco_id": 77, "flickr_id": 5},
            {
                "width": 50,
                "url": URL + "VG_100K/3.jpg",
                "height": 40,
                "image_id": 3,
                "coco_id": None,
                "flickr_id": None,
            },
        ],
        "region_descriptions.json": [
            {
                "id": 1,
                "regions": [
                    {
                        "region_id": 1382,
                        "width": 82,
                        "height": 139,
                        "image_id": 1,
                        "phrase": "The CLOCK is green.",
                        "y": 57,
                        "x": 421,
                    },
                    {
                        "region_id": 1383,
                        "width": 79,
                        "height": 338,
                        "image_id": 1,
                        "phrase": "a tall clock",
                        "y": 91,
                        "x": 421,
                    },
                    {
                        "region_id": 1384,
                        "width": 714,
                        "height": 262,
                        "image_id": 1,
                        "phrase": "½ a street",
                        "y": 328,
                        "x": 77,
                    },
                    {
                        "region_id": 1385,
                        "width": 714,
                        "height": 262,
                        "image_id": 1,
                        "phrase": "wet street",
                        "y": 328,
                        "x": 77,
                    },
                    {
                        "region_id": 1386,
                        "width": 900,
                        "height": 900,
                        "image_id": 1,
                        "phrase": "a city",
                        "y": -3,
                        "x": 0,
                    },
                    {"region_id": 1387, "width": 9, "height": 9, "image_id": 1, "phrase": "w " * 16, "y": 9, "x": 9},
                    {"region_id": 1388, "width": 9, "height": 9, "image_id": 1, "phrase": "w " * 15, "y": 9, "x": 9},
                    {"region_id": 1389, "width": 9, "height": 9, "image_id": 1, "phrase": "...", "y": 9, "x": 9},
                    {"region_id": 1390, "width": 0, "height": 9, "image_id": 1, "phrase": "nothing", "y": 9, "x": 9},
                ],
            },
            {
                "id": 2,
                "regions": [{"region_id": 7, "width": 9, "height": 9, "image_id": 2, "phrase": "...", "y": 9, "x": 9}],
            },
            {"id": 3, "regions": []},
        ],
        "objects.json": [{"image_id": 1, "objects": [clock, street], "image_url": URL + "VG_100K_2/1.jpg"}],
        "attributes.json": [
            {"image_id": 1, "attributes": [clock | {"attributes": ["green", "Tall ", "green"]}, street]},
        ],
        "relationships.json": [
            {
                "image_id": 1,
                "relationships": [
                    {
                        "predicate": "ON",
                        "object": {
                            "h": 262,
                            "object_id": 5046,
                            "name": "street",
                            "w": 714,
                            "x": 77,
                            "y": 328,
                            "synsets": [],
                        },
                        "relationship_id": 15927,
                        "synsets": ["along.r.01"],
                        "subject": {"name": "clock", "object_id": 1058498, "h": 339, "w": 79, "x": 421, "y": 91},
                    },
                    {
                        "predicate": "near",
                        "object": {"object_id": 99, "names": ["shade"], "h": 1, "w": 1, "x": 1, "y": 1},
                        "relationship_id": 15928,
                        "subject": {"names": ["clock"], "object_id": 1058498, "h": 339, "w": 79, "x": 421, "y": 91},
                    },
                ],
            }
        ],
        "question_answers.json": [
            {
                "id": 1,
                "qas": [
                    {
                        "a_objects": [],
                        "question": "What color is the clock?",
                        "image_id": 1,
                        "qa_id": 9,
                        "answer": "Green.",
                        "q_objects": [],
                    }
                ],
            }
        ],
        "densecap_splits.json": {"train": [1, 3], "val": [], "test": [2]},
    }


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_real_layout_1_2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "foveate"):
        dataset = open_dataset("visual-genome", write(tmp_path, files_of_1_2()), "train")
    assert len(dataset) == 2
    first, last = dataset
    assert (first.image_id, first.width, first.height) == (1, 800, 600)
    assert first.path == tmp_path / "VG_100K_2/1.jpg"
    assert last.regions == dataset[-1].regions == ()
    regions = {region.region_id: region for region in first.regions}
    assert list(regions) == [1382, 1383, 1384, 1385, 1386, 1388]
    assert [region.captions for region in first.regions[:4]] == [
        ("the clock is green",),
        ("a tall clock",),
        ("half a street",),
        ("wet street",),
    ]
    assert regions[1382].box == (421, 57, 503, 196)
    assert regions[1386].box == (1, 1, 800, 600)
    # 82x139 at (421, 57) overlaps the clock by little: unknown, not the clock's attributes.
    assert regions[1382].category is None
    assert regions[1382].attributes == ()
    clock = regions[1383]
    assert (clock.category, clock.attributes, clock.negative_attributes) == ("clock", ("green", "tall"), ())
    # An object that several regions show is represented by the first; one without a region by -1.
    assert clock.relations == (Relation("on", 1384, "street"), Relation("near", -1, "shade"))
    assert regions[1384].category == "street"
    assert first.questions == (Question("What color is the clock?", "Green.", "colour"),)
    assert dataset.dropped == {"empty box": 1, "empty phrase": 1, "phrase of more than 15 words": 1}
    assert not dataset.skipped
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_test_split_keeps_empty_phrases(tmp_path: Path) -> None:
    dataset = open_dataset("visual-genome", write(tmp_path, files_of_1_2()), "test")
    assert [region.captions for region in dataset[0].regions] == [("",)]


def test_real_layout_1_0(tmp_path: Path) -> None:
    thing = {"id": 12, "x": 10, "y": 20, "w": 30, "h": 40}
    files = {
        "image_data.json": [{"id": 5, "width": 100, "height": 90, "url": URL + "VG_100K/5.jpg"}],
        "region_descriptions.json": [
            {
                "id": 5,
                "regions": [{"id": 3, "image": 5, "phrase": "red cup", "x": 10, "y": 20, "width": 30, "height": 40}],
            }
        ],
        "objects.json": [{"id": 5, "objects": [thing | {"names": ["cup"]}]}],
        "attributes.json": [
            {
                "id": 5,
                "attributes": [{"x": 10, "y": 20, "w": 30, "h": 40, "object_names": ["cup"], "attributes": ["red"]}],
            }
        ],
        "relationships.json": [
            {
                "id": 5,
                "relationships": [{"id": 1, "predicate": "on", "subject": thing, "object": thing | {"name": "cup"}}],
            }
        ],
        "densecap_splits.json": {"train": [5]},
    }
    (region,) = open_dataset("visual-genome", write(tmp_path, files), "train")[0].regions
    assert (region.region_id, region.box, region.captions) == (3, (10, 20, 40, 60), ("red cup",))
    assert (region.category, region.attributes) == ("cup", ("red",))
    assert region.relations == (Relation("on", 3, "cup"),)


@pytest.mark.parametrize(("width", "linked"), [(100, True), (91, True), (90, True), (89, False)])
def test_link_by_best_iou_from_0_9(tmp_path: Path, width: int, linked: bool) -> None:
    region = {"region_id": 1, "x": 10, "y": 10, "width": width, "height": 50, "phrase": "a car"}
    objects = [
        {"object_id": 1, "x": 10, "y": 10, "w": 60, "h": 50, "names": ["wheel"]},
        {"object_id": 2, "x": 10, "y": 10, "w": 100, "h": 50, "names": ["car"]},
    ]
    files = files_of_1_2() | {
        "region_descriptions.json": [{"id": 1, "regions": [region]}],
        "objects.json": [{"image_id": 1, "objects": objects}],
        "attributes.json": [],
        "relationships.json": [],
    }
    (found,) = open_dataset("visual-genome", write(tmp_path, files), "train")[0].regions
    assert found.category == ("car" if linked else None)


def test_optional_keys_and_files(tmp_path: Path) -> None:
    files = files_of_1_2()
    for name in ("objects.json", "relationships.json", "question_answers.json"):
        del files[name]
    regions = files["region_descriptions.json"][0]["regions"]
    regions[1] |= {"object_id": 5046, "tags": ["street"]}
    regions[2] |= {"object_id": 5046, "tags": ["other"]}
    files["attributes.json"][0]["attributes"][1]["negative_attributes"] = ["dry"]
    files["dataset.json"] = {"max_phrase_words": 16}
    dataset = open_dataset("visual-genome", write(tmp_path, files), "train")
    merged = dataset[0].regions[1]
    # Descriptions that name one object are one region, whatever their boxes say.
    assert merged.captions == ("a tall clock", "half a street")
    assert (merged.category, merged.negative_attributes, merged.tags) == ("street", ("dry",), ("street",))
    assert 1387 in {region.region_id for region in dataset[0].regions}


def test_excluded_coco_ids(tmp_path: Path) -> None:
    files = files_of_1_2()
    files["densecap_splits.json"]["train"].append(2)
    dataset = VisualGenome(write(tmp_path, files), "train", exclude_coco_ids={77})
    assert [sample.image_id for sample in dataset] == [1, 3]
    assert dataset.dropped["excluded COCO id"] == 1


def test_only_images_with_a_coco_id(tmp_path: Path) -> None:
    files = files_of_1_2()
    files["densecap_splits.json"]["train"].append(2)
    dataset = VisualGenome(write(tmp_path, files), "train", only_coco=True, exclude_coco_ids={78})
    with_id = {image["image_id"] for image in files["image_data.json"] if image.get("coco_id") is not None}
    assert {sample.image_id for sample in dataset} == with_id
    assert dataset.dropped["no COCO id"] == 3 - len(with_id) > 0


def set_in(files: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    files = copy.deepcopy(files)
    place = files
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return files


REGION = ("region_descriptions.json", 0, "regions", 1)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ((*REGION, "x"), KeyError, ["region_descriptions.json", "image 1", "region 1383", '"x"']),
        ((*REGION, "x"), float("nan"), ["region_descriptions.json", "image 1", "region 1383", "nan"]),
        ((*REGION, "width"), float("inf"), ["region 1383", "inf"]),
        ((*REGION, "width"), True, ["region 1383", "True"]),
        ((*REGION, "phrase"), 17, ["region 1383", "17"]),
        ((*REGION, "phrase"), None, ["region 1383", "None"]),
        ((*REGION, "object_id"), 4, ["region 1383", "4"]),
        (REGION, ["not", "an", "object"], ["region_descriptions.json", "image 1", "not an object"]),
        (("region_descriptions.json", 0, "regions"), {}, ["region_descriptions.json", "image 1", "not a list"]),
        (("region_descriptions.json", 0, "id"), "1", ["region_descriptions.json", "image '1'"]),
        (("image_data.json", 0, "width"), 0, ["image_data.json", "image 1", "(0, 600)"]),
        (("image_data.json", 0, "url"), "http://x/../../etc/1.jpg", ["image_data.json", "image 1", "etc"]),
        (("image_data.json", 1, "image_id"), 1, ["image_data.json", "twice"]),
        (("objects.json", 0, "objects", 0, "object_id"), KeyError, []),
        (("objects.json", 0, "objects", 0, "names"), "clock", ["objects.json", "object 1058498", "clock"]),
        (("attributes.json", 0, "attributes", 0, "attributes"), [3], ["attributes.json", "object 1058498", "[3]"]),
        (("attributes.json", 0, "attributes", 0, "negative_attributes"), ["green"], ["object 1058498", "green"]),
        (("relationships.json", 0, "relationships", 0, "subject"), None, ["relationships.json", "15927", "None"]),
        (("question_answers.json", 0, "qas", 0, "answer"), KeyError, ["question_answers.json", "9", '"answer"']),
        (("densecap_splits.json", "train"), [1, 3, 999], ["densecap_splits.json", "999"]),
        (("densecap_splits.json", "train"), [1, 3, "2"], ["densecap_splits.json", "'2'"]),
    ],
)
def test_broken_records(
    tmp_path: Path, path: tuple, value: Any, named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, set_in(files_of_1_2(), path, value))
    if not named:  # version 1.0 has objects without an id: not broken
        assert not open_dataset("visual-genome", tmp_path, "train").skipped
        return
    with pytest.raises(InputError) as raised:
        open_dataset("visual-genome", tmp_path, "train")
    assert all(word in str(raised.value) for word in named), raised.value
    assert "skip_bad=True" in str(raised.value)
    with caplog.at_level(logging.WARNING, "foveate"):
        dataset = open_dataset("visual-genome", tmp_path, "train", skip_bad=True)
    assert dataset.skipped.total() >= 1
    assert all(str(path[0]) in reason or "region_descriptions.json" in reason for reason in dataset.skipped)
    (line,) = caplog.records
    assert str(dataset.skipped.total()) in line.getMessage()


@pytest.mark.parametrize(
    "text", ["", "{}", "[", '[{"id": 1}', '[{"id": 1} {"id": 2}]', "[] []", "[1, nul]", "3", "[" * 100_000, "[,{}]"]
)
def test_damaged_file(tmp_path: Path, text: str) -> None:
    write(tmp_path, files_of_1_2())
    (tmp_path / "region_descriptions.json").write_text(text)
    with pytest.raises(InputError, match=r"region_descriptions\.json"):
        open_dataset("visual-genome", tmp_path, "train")


def test_missing_files_and_splits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"densecap_splits\.json does not exist"):
        open_dataset("visual-genome", tmp_path, "train")
    write(tmp_path, files_of_1_2())
    with pytest.raises(InputError, match="no split 'dev'; take one of train, val, test"):
        open_dataset("visual-genome", tmp_path, "dev")
    with pytest.raises(InputError, match="'val' has no usable image"):
        open_dataset("visual-genome", tmp_path, "val")
    with pytest.raises(InputError, match="not a folder"):
        open_dataset("visual-genome", tmp_path / "absent", "train")
    (tmp_path / "image_data.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        open_dataset("visual-genome", tmp_path, "train")


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What color is it?", "colour"),
        ("How many dogs?", "count"),
        ("Where is it?", "where"),
        ("What is it?", "what"),
        ("", "what"),
    ],
)
def test_question_kind(question: str, kind: str) -> None:
    assert question_kind(question) == kind
