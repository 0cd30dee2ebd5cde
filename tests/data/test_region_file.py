"""Boxes of a detector in DynRefer's annotation file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.data import open_dataset
from foveate.data.records import RecordLog
from foveate.data.region_file import RegionFile, annotation_record, read_scored_boxes
from foveate.errors import InputError

SIZES = {1: (64, 48), 2: (64, 48), 3: (64, 48)}


def write(folder: Path, annotations: list[Any]) -> Path:
    path = folder / "test_grit.json"
    path.write_text(json.dumps({"dataset": {}, "images": [], "annotations": annotations}))
    return path


def record(number: int, image_id: int, box: Any, score: Any = 0.5) -> dict[str, Any]:
    return annotation_record(number, image_id, box, "a dog", {"grit_result": {"score": score}})


def test_boxes_are_xyxy_and_the_polygon_says_them(tmp_path: Path) -> None:
    polygon = record(4, 2, (0, 0, 1, 1), 0.25) | {"segmentation": [[5, 6, 30, 6, 30, 40], [4, 7, 5, 8]]}
    plain = {key: value for key, value in record(5, 1, (10, 20, 30, 48.5)).items() if key != "segmentation"}
    log = RecordLog(False)
    found = read_scored_boxes(write(tmp_path, [plain, polygon, record(6, 9, (0, 0, 9, 9))]), SIZES, log)
    assert {key: [(r.region_id, r.box, r.score) for r in regions] for key, regions in found.items()} == {
        # A detector's rounding, less than a pixel, is cut as in COCO's files.
        1: [(5, (10, 20, 30, 48), 0.5)],
        2: [(4, (4, 6, 30, 40), 0.25)],
    }
    assert log.dropped == {"box of another image": 1}


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (record(7, 1, (0, 0, 80, 20)), "annotation 7: the box leaves the image of 64x48"),
        (record(7, 1, (0, 0, 8, 20), "high"), 'annotation 7: "score" is not a finite number'),
        (annotation_record(7, 1, (0, 0, 8, 20), None, {}), 'annotation 7: has no key "grit_result"'),
        (record(7, 1, (0, 0, 8, 20)) | {"segmentation": [[1, 2, 3]]}, "annotation 7: a polygon is not"),
        (record(7, 1, (0, 0, 8, 20)) | {"segmentation": None, "bbox": [1, 2, 3]}, 'annotation 7: "bbox" is not a list'),
    ],
)
def test_broken_records(tmp_path: Path, broken: Any, named: str) -> None:
    path = write(tmp_path, [broken, record(8, 1, (0, 0, 9, 9))])
    with pytest.raises(InputError, match=rf"test_grit\.json: {named}"):
        read_scored_boxes(path, SIZES, RecordLog(False))
    log = RecordLog(True)
    assert [region.region_id for region in read_scored_boxes(path, SIZES, log)[1]] == [8]
    assert log.skipped.total() == 1


def test_a_file_of_other_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no box of the images to evaluate"):
        read_scored_boxes(write(tmp_path, [record(1, 77, (0, 0, 9, 9))]), SIZES, RecordLog(False))


class TestPreparedTrainingData:
    @staticmethod
    def write(root: Path, annotations: list[Any]) -> None:
        images = [{"id": 7, "file_name": "a.jpg", "width": 64, "height": 48}]
        (root / "train.json").write_text(json.dumps({"dataset": {}, "images": images, "annotations": annotations}))

    @staticmethod
    def parsed(number: int, one: Any, two: Any, caption: str = "A Dog.") -> dict[str, Any]:
        extra = {"parser_result": {"graph": {}, "tag_set1": one, "tag_set2": two}}
        return annotation_record(number, 7, (1, 2, 30, 40), caption, extra)

    def test_captions_boxes_and_the_tags_that_the_parser_found(self, tmp_path: Path) -> None:
        bare = annotation_record(2, 7, (0, 0, 5, 5), "a cat", {})
        self.write(tmp_path, [self.parsed(1, [9, 4], [4, 2]), bare, self.parsed(3, [], [], " ")])
        dataset = open_dataset("controlcap", tmp_path, "train")
        assert isinstance(dataset, RegionFile)
        first, second = dataset[0].regions
        assert dataset[0].path == tmp_path / "images/a.jpg"
        assert (first.box, first.captions, first.tag_places) == ((1, 2, 30, 40), ("a dog",), (2, 4, 9))
        assert (second.captions, second.tag_places) == (("a cat",), None)
        assert dataset.dropped == {"empty caption": 1}

    @pytest.mark.parametrize(("one", "two"), [([-1], []), ([1.5], []), ([], ["dog"]), ({}, []), ([True], [])])
    def test_tag_sets_that_are_none(self, tmp_path: Path, one: Any, two: Any) -> None:
        self.write(tmp_path, [self.parsed(1, one, two), self.parsed(2, [3], [])])
        with pytest.raises(InputError, match=r'train.json: annotation 1: "tag_set1"'):
            open_dataset("controlcap", tmp_path, "train")
        dataset = open_dataset("controlcap", tmp_path, "train", skip_bad=True)
        assert [region.region_id for region in dataset[0].regions] == [2]

    def test_a_split_that_is_not_there(self, tmp_path: Path) -> None:
        self.write(tmp_path, [])
        with pytest.raises(InputError, match="the splits there are train"):
            open_dataset("controlcap", tmp_path, "test")
