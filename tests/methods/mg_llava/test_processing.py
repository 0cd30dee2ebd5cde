from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mg_llava_parts import make_config, make_tokenizer  # pyright: ignore[reportMissingImports] (conftest.py)
from PIL import Image

from foveate.errors import CheckpointError, InputError
from foveate.methods.mg_llava.boxes import prepare_boxes, square_offset
from foveate.methods.mg_llava.processing import BoxRecord, MGLlavaProcessor, sample_frames

Picture = Callable[..., Image.Image]


def prepare(
    boxes: Any, width: int = 64, height: int = 64, labels: Any = None, scores: Any = None, **options: Any
) -> Any:
    labels = labels or [f"#{number}" for number in range(len(boxes))]
    scores = scores or [1.0] * len(boxes)
    return prepare_boxes(boxes, labels, scores, width, height, **{"canvas": 64, **options})


# ---------------------------------------------------------------- boxes


def test_boxes_move_with_the_padding() -> None:
    # 80 x 40 lies 20 pixels down in its square; the canvas of 160 doubles it.
    found = prepare([[10, 5, 30, 20]], 80, 40, canvas=160)
    assert found.boxes.tolist() == [[20, 50, 60, 80]]
    assert prepare([[10, 5, 30, 20]], 40, 80, canvas=160).boxes.tolist() == [[60, 10, 100, 40]]
    assert square_offset(41, 80) == (19, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.randoms(use_true_random=False), st.booleans())
def test_a_bright_square_lies_in_its_box(width: int, height: int, draw: Any, pad: bool) -> None:
    x, y = draw.randrange(width - 10), draw.randrange(height - 10)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y : y + 10, x : x + 10] = 255
    processor = MGLlavaProcessor(None, make_config(pad_to_square=pad))
    seen = processor.picture(Image.fromarray(pixels), [[x, y, x + 10, y + 10]])
    bright = (seen.pixel_values_aux[0] > 1.5).nonzero()
    if not len(bright):  # cropped away
        return
    x0, y0, x1, y1 = seen.boxes[0].tolist()
    low, high = bright.amin(0), bright.amax(0)
    assert x0 - 2 <= low[1]
    assert y0 - 2 <= low[0]
    assert high[1] <= x1 + 1
    assert high[0] <= y1 + 1


def test_only_boxes_of_one_label_suppress_each_other() -> None:
    boxes = [[0, 0, 20, 20], [2, 0, 22, 20], [1, 0, 21, 20]]
    found = prepare(boxes, labels=["cup", "cup", "dog"], scores=[0.3, 0.9, 0.5])
    assert found.labels == ("cup", "dog")
    assert found.sources == (1, 2)
    # An IoU of the threshold itself is kept: 10 x 10 each, a third of the union.
    at_threshold = [[0, 0, 10, 10], [5, 0, 15, 10]]
    assert len(prepare(at_threshold, labels=["cup"] * 2, iou=1 / 3).boxes) == 2
    assert len(prepare(at_threshold, labels=["cup"] * 2, iou=0.33).boxes) == 1


def test_the_limit_counts_labels_in_the_order_of_their_best_box() -> None:
    boxes = [[i % 10 * 6, i // 10 * 4, i % 10 * 6 + 4, i // 10 * 4 + 3] for i in range(130)]
    labels = ["rare" if i % 26 == 3 else "often" for i in range(130)]
    scores = [1 - i / 1000 for i in range(130)]
    found = prepare(boxes, labels=labels, scores=scores)
    assert found.labels == ("often",) * 20 + ("rare",) * 5
    assert found.sources[20:] == (3, 29, 55, 81, 107)
    assert len(prepare(boxes, labels=labels, scores=scores, limit=40).boxes) == 10
    assert len(prepare(boxes, labels=labels, scores=scores, limit=50).boxes) == 25
    assert prepare(boxes, labels=labels, scores=scores, mode="per_image").sources == tuple(range(100))
    # 130 labels of one box each pass "per_category" whole, as in the official code; the cap is an option.
    assert len(prepare(boxes, scores=scores).boxes) == 130
    assert len(prepare(boxes, scores=scores, hard_cap=True).boxes) == 100
    # A long text leaves room for few, however few there are.
    assert prepare(boxes, labels=labels, scores=scores, crowded=True).sources == (0, 3)
    assert len(prepare(boxes, labels=labels, scores=scores, mode="per_image", crowded=True).boxes) == 20


def test_a_side_whose_scale_is_inexact_shifts_every_box_by_one() -> None:
    # 768 / 47 * 47 is 767.999...: the whole part is a pixel short of the canvas (spec 2.4, step 4).
    assert int(768 / 47 * 47) == 767
    assert prepare([[0, 0, 47, 47]], 47, 47, canvas=768).boxes.tolist() == [[1, 1, 768, 768]]
    assert prepare([[0, 0, 48, 48]], 48, 48, canvas=768).boxes.tolist() == [[0, 0, 768, 768]]


def test_boxes_beside_the_crop_are_left_out_and_none_at_all_is_the_dummy() -> None:
    found = prepare([[0, 0, 10, 10], [50, 5, 70, 20]], 128, 64, pad_to_square=False)
    assert found.sources == (1,)
    assert found.boxes.tolist() == [[18, 5, 38, 20]]
    for nothing in ([], [[0, 0, 10, 10]]):
        found = prepare(nothing, 128, 64, pad_to_square=False)
        assert found.boxes.tolist() == [[0, 0, 0, 0]]
        assert found.labels == ()
        assert found.sources == ()


def test_broken_records() -> None:
    with pytest.raises(InputError, match="1 boxes come with 2 labels and 1 scores"):
        prepare([[0, 0, 1, 1]], labels=["a", "b"])
    with pytest.raises(InputError, match="finite"):
        prepare([[0, 0, float("inf"), 1]])
    with pytest.raises(InputError, match="labels of a box record"):
        BoxRecord.parse({"boxes": [[0, 0, 1, 1]], "labels": [3]})
    with pytest.raises(InputError, match="lists of numbers"):
        BoxRecord.parse({"boxes": [[0, 0, 1]]})


# ---------------------------------------------------------------- pictures


def test_a_picture_is_padded_with_the_mean_and_reduced_from_the_high_resolution(picture: Picture) -> None:
    processor = MGLlavaProcessor(None, make_config())
    seen = processor.picture(picture(0, 80, 40))
    top = seen.pixel_values_aux[:, 4, 10]
    expected = torch.tensor([122, 116, 104]) / 255
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    torch.testing.assert_close(top, (expected - mean) / std, atol=1e-5, rtol=1e-5)
    # 64 -> 16 without antialiasing: the middle of four pixels is the mean of the two by two around it.
    aux = seen.pixel_values_aux
    torch.testing.assert_close(seen.pixel_values[:, 3, 5], aux[:, 13:15, 21:23].mean((1, 2)), atol=1e-5, rtol=1e-4)
    assert seen.boxes.tolist() == [[0, 0, 0, 0]]


def test_frames_are_resized_apart_and_not_padded(picture: Picture) -> None:
    processor = MGLlavaProcessor(None, make_config())
    frames = processor.video([picture(0, 80, 64)] * 5)
    assert len(frames) == 3
    seen = frames[0]
    pixels = torch.from_numpy(np.array(picture(0, 80, 64))).float().permute(2, 0, 1) / 255
    values = (pixels - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[
        :, None, None
    ]
    torch.testing.assert_close(seen.pixel_values_aux, values[:, :, 8:72], atol=1e-5, rtol=1e-5)
    low = torch.nn.functional.interpolate(values[None], (16, 20), mode="bilinear", align_corners=False)[0, :, :, 2:18]
    torch.testing.assert_close(seen.pixel_values, low, atol=1e-5, rtol=1e-5)
    assert sample_frames(100, 8) == [0, 14, 28, 42, 56, 70, 84, 99]
    assert sample_frames(1, 3) == [0, 0, 0]
    with pytest.raises(InputError, match="no frame"):
        processor.video([])
    with pytest.raises(InputError, match="2 entries of boxes are given for the 3 frames"):
        processor.video([picture()] * 4, [None, None])


def test_a_conversation_is_cut_at_the_limit() -> None:
    processor = MGLlavaProcessor(make_tokenizer(), make_config(max_text_length=40))
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "word " * 50}]
    ids, labels = processor.encode(talk)
    assert len(ids) == len(labels) == 40
    assert labels[-1] == ids[-1]


def test_settings_are_written_and_read(tmp_path: Path) -> None:
    processor = MGLlavaProcessor(make_tokenizer(), make_config(), image_mean=(0.1, 0.2, 0.3), image_std=(1, 2, 3))
    processor.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MGLlavaProcessor.from_pretrained(tmp_path)
    assert again.image_mean == (0.1, 0.2, 0.3)
    assert again.tokenizer.encode("a b") == processor.tokenizer.encode("a b")
    (tmp_path / "processor_config.json").write_text('{"image_mean": [1, 2], "image_std": [1, 1, 1]}')
    with pytest.raises(CheckpointError, match="image_mean must be three numbers"):
        MGLlavaProcessor.from_pretrained(tmp_path)
