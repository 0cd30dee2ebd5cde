from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.metrics.detection import (
    IOU_THRESHOLDS,
    METEOR_THRESHOLDS,
    DenseCaptionImage,
    coco_recognition,
    dense_caption_map,
    match_dense_captions,
    merge_ground_truth,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dynrefer" / "densecap.json"
BOX = [0.0, 0.0, 100.0, 100.0]
FAR = [200.0, 200.0, 300.0, 300.0]


def image(boxes, scores, target_boxes):
    return DenseCaptionImage(
        boxes, scores, [f"d{i}" for i in range(len(boxes))], target_boxes, [f"t{i}" for i in range(len(target_boxes))]
    )


@pytest.fixture(scope="module")
def golden():
    content = json.loads(GOLDEN.read_text())
    images = [
        DenseCaptionImage(i["boxes"], i["scores"], i["text"], i["target_boxes"], i["target_text"])
        for i in content["images"]
    ]
    return content, images


def test_golden_merging(golden):
    for entry in golden[0]["images"]:
        boxes, captions = merge_ground_truth(entry["target_boxes"], entry["target_text"])
        np.testing.assert_allclose(boxes, entry["merged_boxes"], rtol=1e-12)
        assert [list(group) for group in captions] == entry["merged_text"]


def test_golden_records(golden):
    content, images = golden
    records = match_dense_captions(images)
    assert list(records.candidates) == [record["candidate"] for record in content["records"]]
    assert [list(group) for group in records.references] == [record["references"] for record in content["records"]]
    np.testing.assert_array_equal(records.matched, [record["ok"] for record in content["records"]])
    np.testing.assert_array_equal(records.image_indices, [record["img_info"] for record in content["records"]])
    np.testing.assert_allclose(records.overlaps, [record["iou"] for record in content["records"]], rtol=1e-12)
    assert (records.positives, records.skipped_positives) == (content["npos"], 0)


def test_golden_map(golden):
    content, images = golden
    result = dense_caption_map(match_dense_captions(images), content["meteors_per_record"])
    expected = content["result"]
    assert result.map == pytest.approx(expected["map"], abs=1e-6)
    assert result.det_map == pytest.approx(expected["detmap"], abs=1e-6)
    joint = {f"iou_{iou}_meteor_{meteor:g}": ap for (iou, meteor), ap in result.average_precisions.items()}
    assert joint == pytest.approx(expected["ap_breakdown"], abs=1e-6)
    located = {f"iou_{iou}": ap for iou, ap in result.det_average_precisions.items()}
    assert located == pytest.approx(expected["det_breakdown"], abs=1e-6)


def test_merging_takes_the_box_with_most_neighbours_first():
    # The middle box overlaps both others by more than 0.7 (90/110 of their union), which overlap each other by 80/120.
    boxes = [[0, 0, 100, 10], [10, 0, 110, 10], [20, 0, 120, 10], [500, 0, 510, 10]]
    merged, captions = merge_ground_truth(boxes, ["a", "b", "c", "d"])
    np.testing.assert_allclose(merged, [[10, 0, 110, 10], [500, 0, 510, 10]])
    assert captions == [("a", "b", "c"), ("d",)]


def test_merging_removes_a_group_before_the_next_is_sought():
    # 0-1-2-3-4 in a chain; 1 is the first with three neighbours and takes 0 and 2; 3 and 4 remain neighbours.
    boxes = [[10 * i, 0, 100 + 10 * i, 10] for i in range(5)]
    merged, captions = merge_ground_truth(boxes, list("abcde"))
    assert captions == [("a", "b", "c"), ("d", "e")]
    np.testing.assert_allclose(merged, [[10, 0, 110, 10], [35, 0, 135, 10]])


def test_a_ground_truth_box_without_area_still_counts():
    merged, captions = merge_ground_truth([[5, 5, 5, 9], BOX], ["line", "box"])
    assert len(merged) == 2
    assert captions == [("line",), ("box",)]


def test_average_precision_by_hand():
    # Order of scores: hit, miss, hit; two boxes to find. Precision 1 up to recall 0.5 (51 grid points), then 2/3 (49).
    records = match_dense_captions([image([BOX, [400, 400, 410, 410], FAR], [0.9, 0.8, 0.7], [BOX, FAR])])
    assert records.references == (("t0",), (), ("t1",))
    result = dense_caption_map(records, [1.0, 1.0, 1.0])
    expected = (51 + 49 * 2 / 3) / 100
    assert result.map == pytest.approx(expected, abs=1e-6)
    assert result.det_map == pytest.approx(expected, abs=1e-6)


def test_the_best_box_is_the_only_choice_and_a_poor_overlap_uses_it_up():
    # All three prefer the first target. The highest score overlaps it by 0.01 only and still takes it.
    sliver, exact = [0.0, 0.0, 10.0, 10.0], BOX
    records = match_dense_captions([image([exact, sliver, exact], [0.5, 0.9, 0.4], [BOX, [0, 0, 100, 160]])])
    assert records.candidates == ("d1", "d0", "d2")
    np.testing.assert_array_equal(records.matched, [True, False, False])
    assert records.references == (("t0",), ("t0",), ("t0",))
    assert records.positives == 2
    assert dense_caption_map(records, [1, 1, 1]).det_map == 0.0


def test_thresholds_are_at_least_for_iou_and_above_for_meteor():
    # Half of the target's area: IoU exactly 0.5.
    records = match_dense_captions([image([[0.0, 0.0, 50.0, 100.0]], [1.0], [BOX])])
    result = dense_caption_map(records, [0.1])
    located = {iou: float(iou <= 0.5) for iou in IOU_THRESHOLDS}
    assert result.det_average_precisions == located
    for (iou, meteor), ap in result.average_precisions.items():
        assert ap == (located[iou] if meteor < 0.1 else 0.0)
    assert result.map == pytest.approx(3 * 2 / 30)
    # A METEOR of 0 passes no threshold, but localisation does not ask for one.
    assert dense_caption_map(records, [0.0]).map == 0.0


def test_images_without_detections_count_only_if_strict():
    records = match_dense_captions([image([BOX], [1.0], [BOX]), image([], [], [BOX, FAR, [0, 0, 99, 100]])])
    assert (records.positives, records.skipped_positives) == (1, 2)
    assert dense_caption_map(records, [1.0]).map == 1.0
    strict = dense_caption_map(records, [1.0], strict_npos=True)
    assert strict.positives == 3
    # Recall 1/3 reaches the grid points 0 to 0.33.
    assert strict.map == pytest.approx(0.34, abs=1e-6)


def test_an_image_without_ground_truth_gives_false_positives():
    records = match_dense_captions([image([BOX], [0.9], []), image([BOX], [0.8], [BOX])])
    assert records.references == ((), ("t0",))
    assert dense_caption_map(records, [0.0, 1.0]).det_map == pytest.approx(0.5)


def random_images(seed, count=6):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(10_000)[: count * 9].reshape(count, 9) / 10_000
    images = []
    for row in scores:
        corner = rng.uniform(0, 150, (5, 2))
        targets = np.concatenate([corner, corner + rng.uniform(20, 80, (5, 2))], axis=1)
        targets = np.concatenate([targets, targets[:2] + rng.normal(0, 2, (2, 4))])
        boxes = targets[rng.integers(0, 7, 9)] + rng.normal(0, 6, (9, 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        images.append(image(boxes, row, targets))
    return images, rng


def plain_dense_caption_map(records, meteors):
    """The definition of the spec, one record at a time in torch."""
    order = torch.sort(torch.from_numpy(records.scores), descending=True).indices.tolist()
    results = []
    for iou in IOU_THRESHOLDS:
        for meteor in METEOR_THRESHOLDS:
            tp = torch.tensor(
                [
                    float(bool(records.references[i]) and records.overlaps[i] >= iou and records.matched[i])
                    * float(meteors[i] > meteor)
                    for i in order
                ]
            )
            found = tp.cumsum(0)
            recall = found / records.positives
            precision = found / (found + (1 - tp).cumsum(0))
            points = [float((precision * (recall >= t)).max()) for t in torch.arange(0, 1, 0.01)]
            results.append(sum(points) / 100)
    return sum(results) / len(results)


@pytest.mark.parametrize("seed", range(3))
def test_map_equals_the_definition_step_by_step(seed):
    images, rng = random_images(seed)
    records = match_dense_captions(images)
    meteors = rng.choice([0, 0.05, 0.1, 0.12, 0.2, 0.25, 0.3, 0.6], len(records.scores))
    result = dense_caption_map(records, meteors)
    assert 0.05 < result.map < 0.95
    assert result.map == pytest.approx(plain_dense_caption_map(records, meteors), abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.data())
def test_order_of_images_and_monotone_transforms_of_scores_do_not_matter(seed, data):
    images, rng = random_images(seed)
    records = match_dense_captions(images)
    meteors = rng.random(len(records.scores)) / 2
    by_candidate = dict(zip(zip(records.image_indices, records.candidates, strict=True), meteors, strict=True))
    order = data.draw(st.permutations(range(len(images))))
    moved = match_dense_captions(
        [dataclasses.replace(images[i], scores=3 * np.asarray(images[i].scores) ** 2 - 5) for i in order]
    )
    keys = zip(moved.image_indices, moved.candidates, strict=True)
    moved_meteors = [by_candidate[order[index], candidate] for index, candidate in keys]
    before, after = dense_caption_map(records, meteors), dense_caption_map(moved, moved_meteors)
    assert after.average_precisions == pytest.approx(before.average_precisions)
    assert after.det_average_precisions == pytest.approx(before.det_average_precisions)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=8), min_size=1, max_size=5), st.integers(0, 999))
def test_perfect_detections_score_one(sizes_by_image, seed):
    rng = np.random.default_rng(seed)
    images = []
    for sizes in sizes_by_image:
        boxes = [[100 * i, 0, 100 * i + size, size] for i, size in enumerate(sizes)]
        images.append(image(boxes, rng.random(len(boxes)), boxes))
    records = match_dense_captions(images)
    assert records.references == tuple((f"t{candidate[1:]}",) for candidate in records.candidates)
    result = dense_caption_map(records, np.ones(len(records.scores)))
    assert result.map == pytest.approx(1.0)
    assert result.det_map == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0, 0, 1]]}, r"images\[0\]: boxes has shape"),
        ({"boxes": [[5, 0, 1, 1]]}, "x1 <= x2"),
        ({"boxes": [[0, 0, math.nan, 1]]}, "nan"),
        ({"scores": [0.5, 0.4]}, r"scores has shape \(2,\)"),
        ({"scores": [math.inf]}, "inf"),
        ({"captions": ["a", "b"]}, "captions has 2 entries for 1 boxes"),
        ({"captions": "a"}, "sequence of strings"),
        ({"target_boxes": [[9, 9, 1, 1]]}, "target_boxes"),
        ({"target_captions": []}, "target_captions has 0 entries"),
    ],
)
def test_bad_images_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        match_dense_captions([dataclasses.replace(image([BOX], [0.5], [BOX]), **change)])


def test_bad_evaluations_are_refused():
    with pytest.raises(InputError, match="no images"):
        match_dense_captions([])
    records = match_dense_captions([image([BOX], [0.5], [BOX])])
    with pytest.raises(InputError, match=r"meteors has shape \(2,\)"):
        dense_caption_map(records, [0.5, 0.5])
    with pytest.raises(InputError, match=r"meteors holds 21\.2"):
        dense_caption_map(records, [21.2])
    with pytest.raises(InputError, match="No ground-truth box"):
        dense_caption_map(match_dense_captions([image([BOX], [0.5], [])]), [0.5])


LABELS = [0, 0, 1, 1]
IMAGE_IDS = [10, 11, 11, 12]
BOXES = [[0, 0, 50, 50], [0, 0, 50, 50], [100, 100, 180, 150], [5, 5, 60, 60]]


def test_recognition_accuracy_counts_crowds_and_map_does_not():
    logits = np.array([[3.0, 0.0], [2.0, 1.0], [0.0, 4.0], [1.0, 0.0]])
    result = coco_recognition(BOXES, LABELS, IMAGE_IDS, logits, crowd=[0, 0, 0, 1])
    # The crowd of class 1 is called class 0: wrong for accuracy; for mAP a false positive of class 0 ranked last.
    assert result.accuracy == 0.75
    assert result.map == pytest.approx(1.0)
    assert result.map50 == result.map75 == pytest.approx(1.0)


def test_recognition_map_ranks_by_the_raw_logit():
    logits = np.array([[3.0, 0.0], [2.0, 1.0], [9.0, 4.0], [0.0, 1.0]])
    result = coco_recognition(BOXES, LABELS, IMAGE_IDS, logits)
    # Class 0: the mistake has the highest logit, precision 1/2 then 2/3, interpolated 2/3 throughout.
    # Class 1: one of two found, precision 1 up to recall 0.5, that is 51 of 101 points.
    assert result.accuracy == 0.75
    assert result.map == pytest.approx((2 / 3 + 51 / 101) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BOXES, [0, 0, 1, 2], IMAGE_IDS, np.zeros((4, 2))), "labels holds 2"),
        ((BOXES[:3], LABELS, IMAGE_IDS, np.zeros((4, 2))), "3 boxes for 4 rows"),
        ((BOXES, LABELS, [1, 2, 3.5, 4], np.zeros((4, 2))), "whole numbers"),
        ((BOXES, LABELS, IMAGE_IDS, np.full((4, 2), np.nan)), "nan"),
        (([], [], [], np.zeros((0, 2))), "at least one sample"),
        ((BOXES, LABELS, IMAGE_IDS, np.zeros((4, 2)), [1, 1, 1, 1]), "All annotations are crowds"),
        ((BOXES, LABELS, IMAGE_IDS, np.zeros((4, 2)), [0, 0, 0, 2]), "crowd holds 2"),
    ],
)
def test_bad_recognition_input_is_refused(arguments, message):
    *positional, crowd = arguments if len(arguments) == 5 else (*arguments, None)
    with pytest.raises(InputError, match=message):
        coco_recognition(*positional, crowd=crowd)
