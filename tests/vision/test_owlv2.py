"""OWLv2 as a proposer: a small random checkpoint against transformers itself, thresholds, words, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlv2.modeling_owlv2 import Owlv2ForObjectDetection
from transformers.models.owlv2.processing_owlv2 import Owlv2Processor

from foveate.errors import CheckpointError, InputError
from foveate.ops.boxes import box_iou
from foveate.vision.owlv2 import Owlv2Proposer

WORDS = ["cat", "dog", "cup"]


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def load(folder: Path, words: Any = WORDS, **options: Any) -> Owlv2Proposer:
    return Owlv2Proposer.from_pretrained(folder, words=words, **options)


def test_scores_and_boxes_are_those_of_transformers(owlv2_folder: Path, noise: Image.Image) -> None:
    """The words are encoded once here and with every image there."""
    boxes, scores = load(owlv2_folder, threshold=0.0, nms_threshold=1.0)(noise)
    model = Owlv2ForObjectDetection.from_pretrained(owlv2_folder).eval()
    processor: Any = Owlv2Processor(
        Owlv2ImageProcessorPil.from_pretrained(owlv2_folder), CLIPTokenizer.from_pretrained(owlv2_folder)
    )
    texts = [[f"a photo of {word}" for word in WORDS]]
    inputs = processor(text=texts, images=noise, return_tensors="pt", max_length=24)
    with torch.no_grad():
        output = model(**inputs)
    [expected] = processor.post_process_grounded_object_detection(output, threshold=0.0, target_sizes=[(60, 90)])
    limit = torch.tensor([90.0, 60.0, 90.0, 60.0])
    clipped = torch.minimum(expected["boxes"].clamp(min=0), limit)
    real = ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(-1)
    order = expected["scores"][real].argsort(descending=True, stable=True)
    assert 0 < int(real.sum()) == len(boxes)
    np.testing.assert_allclose(scores, expected["scores"][real][order].numpy(), atol=1e-6)
    np.testing.assert_allclose(boxes, clipped[real][order].numpy(), atol=1e-4)


def test_thresholds(owlv2_folder: Path, noise: Image.Image) -> None:
    boxes, scores = load(owlv2_folder, threshold=0.0, nms_threshold=1.0)(noise)
    middle = float(np.sort(scores)[len(scores) // 2])
    above = load(owlv2_folder, threshold=middle, nms_threshold=1.0)(noise)[1]
    assert above.tolist() == scores[scores > np.float32(middle)].tolist()
    assert 0 < len(above) < len(scores)
    # Whatever the word: what is left overlaps by no more than the threshold, and what went is beaten by what is left.
    kept, kept_scores = load(owlv2_folder, threshold=0.0, nms_threshold=0.1)(noise)
    overlap = box_iou(torch.from_numpy(kept), torch.from_numpy(kept)) - torch.eye(len(kept))
    assert 1 < len(kept) < len(boxes)
    assert float(overlap.max()) <= 0.1
    gone = [row for row, box in enumerate(boxes.tolist()) if box not in kept.tolist()]
    beats = box_iou(torch.from_numpy(boxes[gone]), torch.from_numpy(kept)) > 0.1
    better = torch.from_numpy(kept_scores)[None] >= torch.from_numpy(scores[gone])[:, None]
    assert (beats & better).any(1).all()


def test_a_word_more_changes_no_other(owlv2_folder: Path, noise: Image.Image) -> None:
    # The score of a box is that of its best word, so another word can only raise it.
    options = {"threshold": 0.0, "nms_threshold": 1.0}
    few, many = (load(owlv2_folder, words, **options) for words in (["cat"], ["cat", "elephant"]))
    first = {tuple(box): score for box, score in zip(*[part.tolist() for part in few(noise)], strict=True)}
    second = {tuple(box): score for box, score in zip(*[part.tolist() for part in many(noise)], strict=True)}
    assert first.keys() == second.keys()
    assert all(second[box] >= first[box] - 1e-6 for box in first)
    assert any(second[box] > first[box] + 1e-4 for box in first)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "looks for words and none is given"),
        ("cat", "must be a list of words, not 'cat'"),
        (["cat", " "], "and ' ' is none"),
        ([f"w{k}" for k in range(5_001)], "5001 words for OWLv2 are more than the 5000 allowed"),
        (["cat", "interdependence"], "the word 'interdependence' for OWLv2 has 25 tokens, more than the 24"),
    ],
)
def test_bad_words(owlv2_folder: Path, words: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        load(owlv2_folder, words)
    assert "\n" not in str(caught.value)


def test_bad_thresholds_and_numbers(owlv2_folder: Path, sam_folder: Path, noise: Image.Image) -> None:
    with pytest.raises(InputError, match=r"nms_threshold must be a number from 0 to 1, not 1\.5"):
        load(owlv2_folder, nms_threshold=1.5)
    with pytest.raises(InputError, match="is a 'sam' model, not an OWLv2"):
        load(sam_folder)
    proposer = load(owlv2_folder)
    with torch.no_grad():
        proposer.model.class_head.logit_shift.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="OWLv2 gives non-finite numbers"):
        proposer(noise)
