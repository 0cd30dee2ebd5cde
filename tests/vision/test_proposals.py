"""What is made of proposals, whoever proposes: checks, order, duplicates, clicks; and proposers by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.errors import CheckpointError, InputError
from foveate.ops.boxes import box_iou
from foveate.vision.box_file import BoxFile
from foveate.vision.images import encode_rle
from foveate.vision.owlv2 import Owlv2Proposer
from foveate.vision.proposals import FoundRegions, drop_repeated_captions, find_regions, load_proposer
from foveate.vision.proposer import RegionProposer
from foveate.vision.sam import SamProposer

IMAGE = Image.new("RGB", (100, 80))
# The second covers nine tenths of the first, the third half of it: IoU 0.9 and 0.5.
BOXES = [[0.0, 0.0, 20.0, 10.0], [0.0, 0.0, 18.0, 10.0], [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
SCORES = [0.5, 0.75, 0.625, 0.25]


def propose(boxes: Any = BOXES, scores: Any = SCORES, *masks: Any) -> Any:
    return lambda image: (np.array(boxes, dtype=np.float64), np.array(scores), *masks)


def mask_of(box: list[float]) -> dict[str, Any]:
    mask = np.zeros((80, 100), dtype=bool)
    x1, y1, x2, y2 = map(int, box)
    mask[y1:y2, x1:x2] = True
    return encode_rle(mask)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"box_iou": None}, [1, 2, 0, 3]),
        ({}, [1, 2, 3]),  # 0.7 by default: the first goes, which the second covers by 0.9
        ({"box_iou": 0.9}, [1, 2, 0, 3]),  # above, not at
        ({"box_iou": 0.5}, [1, 3]),  # the third overlaps the second by 10 / 18
        ({"box_iou": 0.0, "max_regions": 1}, [1]),
        ({"box_iou": None, "max_regions": 3}, [1, 2, 0]),
        ({"min_score": 0.5}, [1, 2]),  # the first is as good as that, and a duplicate
        ({"min_score": 0.5, "box_iou": None}, [1, 2, 0]),
        ({"min_score": 1}, []),
    ],
)
def test_order_and_duplicates(options: dict[str, Any], rows: list[int]) -> None:
    masks = [mask_of(box) for box in BOXES]
    found = find_regions(propose(BOXES, SCORES, masks), IMAGE, **options)
    assert found.boxes.tolist() == [BOXES[row] for row in rows]
    assert found.scores.tolist() == [SCORES[row] for row in rows]
    assert found.masks == tuple(masks[row] for row in rows)  # masks stay with their boxes
    assert find_regions(propose(), IMAGE, **options).masks is None


def test_nothing_found() -> None:
    found = find_regions(propose([], []), IMAGE)
    assert (found.boxes.shape, found.scores.shape) == ((0, 4), (0,))
    assert found.smallest_at(5, 5) is None


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (([[0, 0, float("nan"), 4]], [0.5]), r"gives wrong boxes: box 0 is .*finite"),
        (([[0, 0, 4, 4]], [float("nan")]), "scores of the proposer must be from 0 to 1, and one is nan"),
        (([[0, 0, 4, 4]], [1.5]), "one is 1.5"),
        (([[0, 0, 101, 4]], [0.5]), "leaves the image, 100 wide and 80 high"),
        (([[0, 0, 4, 4]], [0.5, 0.5]), "1 boxes but 2 scores"),
        (([[0, 0, 4, 4]], [0.5], []), "1 boxes but 0 masks"),
        (([[0, 0, 4, 4]], [0.5], [{"size": [100, 80], "counts": ""}]), "no COCO run-length encoding of the image's"),
        ([[0, 0, 4, 4]], r"must give \(boxes, scores\) or"),
        (([[0, 0, 4, 4]],), r"must give \(boxes, scores\) or"),
    ],
)
def test_wrong_answers_of_a_proposer(answer: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        find_regions(lambda _: answer, IMAGE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_regions": 0}, "max_regions must be a whole number of at least 1, not 0"),
        ({"max_regions": 2.0}, r"not 2\.0"),
        ({"min_score": 2}, "min_score must be a number from 0 to 1, not 2"),
        ({"min_score": None}, "min_score must be a number from 0 to 1, not None"),
        ({"box_iou": "no"}, "box_iou must be a number from 0 to 1 or None, not 'no'"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        find_regions(propose(), IMAGE, **options)


# ---------------------------------------------------------------- captions


def test_the_same_caption_of_the_same_place_goes() -> None:
    captions = ["a red car", "A red  car", "a red car", "a red car"]
    assert drop_repeated_captions(np.array(BOXES), SCORES, captions, 0.3) == [1, 3]
    assert drop_repeated_captions(np.array(BOXES), SCORES, captions, 0.56) == [1, 2, 3]  # 10 / 18 is not above it
    assert drop_repeated_captions(np.array(BOXES), SCORES, ["a", "b", "c", "d"], 0.0) == [1, 2, 0, 3]
    assert drop_repeated_captions(np.zeros((0, 4)), [], [], 0.3) == []


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 20)] * 2, st.sampled_from("ab"), st.floats(0, 1)),
        max_size=12,
    ),
    st.floats(0, 1),
)
def test_what_goes_is_beaten_by_what_stays(regions: list[tuple[Any, ...]], threshold: float) -> None:
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h, _, _ in regions], dtype=np.float32).reshape(-1, 4)
    captions, scores = [region[4] for region in regions], [region[5] for region in regions]
    kept = drop_repeated_captions(boxes, scores, captions, threshold)
    overlap = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)) > threshold

    def repeats(row: int, other: int) -> bool:
        return bool(overlap[row, other]) and captions[row] == captions[other]

    assert [scores[row] for row in kept] == sorted((scores[row] for row in kept), reverse=True)
    assert not any(repeats(row, other) for row in kept for other in kept if row != other)
    for row in set(range(len(regions))) - set(kept):
        assert any(repeats(row, other) and scores[other] >= scores[row] for other in kept)


# ---------------------------------------------------------------- clicks


def test_a_click_takes_the_smallest_mask_under_it() -> None:
    frame = np.zeros((80, 100), dtype=bool)
    frame[10:40, 10:40] = True
    frame[15:35, 15:35] = False  # a ring: 500 pixels
    inner = [20.0, 20.0, 25.0, 25.0]
    disc = [0.0, 0.0, 50.0, 50.0]
    boxes = np.array([disc, [10, 10, 40, 40], inner], dtype=np.float32)
    masks = (mask_of(disc), encode_rle(frame), mask_of(inner))
    found = FoundRegions(boxes, np.array([0.9, 0.8, 0.7]), masks)
    assert [found.smallest_at(*at) for at in ((12, 12), (18, 18), (22.5, 24.9), (25, 25), (45, 5), (60, 5))] == [
        1,
        0,  # in the box of the ring, and in its hole
        2,
        0,
        0,
        None,
    ]
    # Without masks the boxes decide.
    assert FoundRegions(boxes, found.scores).smallest_at(18, 18) == 1


# ---------------------------------------------------------------- by name


def test_the_configuration_says_which_proposer_it_is(sam_folder: Path, owlv2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text("[]")
    assert isinstance(load_proposer(sam_folder), SamProposer)
    owl = load_proposer(owlv2_folder, words=["cat"])
    assert isinstance(owl, Owlv2Proposer)
    assert owl.words == ("cat",)
    assert isinstance(load_proposer("proposer-world"), RegionProposer)
    assert isinstance(load_proposer(tmp_path / "boxes.json"), BoxFile)


@pytest.mark.parametrize(
    ("name", "words", "kind", "sentence"),
    [
        ("empty", None, CheckpointError, r"has no config\.json"),
        ("bert", None, InputError, "is a 'bert' model, which proposes no regions; give proposer-world, a SAM or OWLv2"),
        ("clip-world", None, InputError, "which proposes no regions"),
        ("proposer-wrld", None, InputError, "did you mean 'proposer-world'"),
        ("proposer-world", ["cat"], InputError, "looks for no words; leave the words out"),
        ("boxes.json", ["cat"], InputError, "is a file of boxes, which looks for no words"),
        ("none.json", None, InputError, "there is no file"),
    ],
)
def test_wrong_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    words: list[str] | None,
    kind: type[Exception],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bert"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "boxes.json").write_text("[]")
    with pytest.raises(kind, match=sentence) as caught:
        load_proposer(f"./{name}" if (tmp_path / name).exists() else name, words=words)
    assert "\n" not in str(caught.value)


def test_owlv2_by_name_needs_words(owlv2_folder: Path) -> None:
    with pytest.raises(InputError, match="looks for words and none is given"):
        load_proposer(owlv2_folder)
