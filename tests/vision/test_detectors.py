"""What finds tags: OWLv2 against transformers itself, proposals with names, and what ships."""

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

from foveate.data.samples import BoxSet
from foveate.errors import CheckpointError, InputError
from foveate.ops.boxes import box_iou
from foveate.vision.detectors import ProposalDetector, load_detector
from foveate.vision.owlv2 import Owlv2Detector
from foveate.world.scenes import render_scene

EMPTY = BoxSet((), (), ())


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(1)
    return [Image.fromarray(draw.integers(0, 255, (height, 90, 3), dtype=np.uint8)) for height in (60, 90, 130)]


@pytest.fixture(scope="module")
def owlv2(owlv2_folder: Path) -> Owlv2Detector:
    return Owlv2Detector.from_pretrained(owlv2_folder, threshold=0.0)


def by_transformers(folder: Path, picture: Image.Image, queries: list[str], pad: int | None) -> dict[str, Any]:
    """Boxes in floats, scores and queries of every candidate, in their order."""
    processor: Any = Owlv2Processor(
        Owlv2ImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    )
    square = picture
    if pad is not None:
        square = Image.new("RGB", (max(picture.size), max(picture.size)), (pad, pad, pad))
        square.paste(picture, (0, 0))
    inputs = processor(text=[queries], images=square, return_tensors="pt", max_length=24)
    model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**inputs)
    return processor.post_process_grounded_object_detection(
        output, threshold=0.0, target_sizes=[(picture.height, picture.width)]
    )[0]


@pytest.mark.parametrize("pad", [128, 0, None])
def test_owlv2_gives_what_transformers_gives(owlv2_folder: Path, pictures: list[Image.Image], pad: int | None) -> None:
    tags = ["cat", "dog", "cup"]
    detector = Owlv2Detector.from_pretrained(owlv2_folder, threshold=0.0, pad_value=pad)
    [found] = detector(pictures[:1], [tags])
    expected = by_transformers(owlv2_folder, pictures[0], [f"a photo of {tag}" for tag in tags], pad)
    assert found.labels == tuple(tags[k] for k in expected["labels"].tolist())
    assert found.scores == pytest.approx(expected["scores"].tolist(), abs=1e-6)
    # Whole numbers towards zero, whether inside the picture or not.
    assert [list(box) for box in found.boxes] == [[int(side) for side in box] for box in expected["boxes"].tolist()]
    assert all(isinstance(side, int) for box in found.boxes for side in box)
    assert len(set(found.labels)) > 1


def test_boxes_overhang_and_are_not_thinned_out(owlv2: Owlv2Detector, pictures: list[Image.Image]) -> None:
    [found] = owlv2(pictures[:1], [["cat"]])
    assert len(found.boxes) == 16, "every candidate of the 4 x 4 map"
    assert any(box[3] > 60 or box[0] < 0 or box[1] < 0 for box in found.boxes)


def test_what_surrounds_a_picture_counts_unless_it_is_square(
    owlv2_folder: Path, owlv2: Owlv2Detector, pictures: list[Image.Image]
) -> None:
    black = Owlv2Detector.from_pretrained(owlv2_folder, threshold=0.0, pad_value=0)
    tags = [["cat", "dog"]] * 3
    changes = [
        float(np.abs(np.subtract(grey.scores, dark.scores)).max())
        for grey, dark in zip(owlv2(pictures, tags), black(pictures, tags), strict=True)
    ]
    assert [change > 1e-3 for change in changes] == [True, False, True]
    assert changes[1] < 1e-6


def test_each_picture_has_its_own_tags(owlv2: Owlv2Detector, pictures: list[Image.Image]) -> None:
    tags = [["cat", "dog"], [], ["a red cup"]]
    together = owlv2(pictures, tags)
    for picture, own, found in zip(pictures, tags, together, strict=True):
        [alone] = owlv2([picture], [own])
        assert (found.boxes, found.labels) == (alone.boxes, alone.labels)
        assert found.scores == pytest.approx(alone.scores, abs=1e-6)
    assert together[1] == EMPTY
    assert set(together[2].labels) == {"a red cup"}


def test_the_threshold_is_passed_not_reached(
    owlv2_folder: Path, owlv2: Owlv2Detector, pictures: list[Image.Image]
) -> None:
    [all_of_them] = owlv2(pictures[:1], [["cat"]])
    middle = sorted(all_of_them.scores)[8]
    [found] = Owlv2Detector.from_pretrained(owlv2_folder, threshold=middle)(pictures[:1], [["cat"]])
    assert found.scores == tuple(score for score in all_of_them.scores if score > middle)
    assert len(found.scores) == 7


def test_a_picture_without_tags(owlv2_folder: Path, pictures: list[Image.Image]) -> None:
    legacy = Owlv2Detector.from_pretrained(owlv2_folder, threshold=0.0, legacy_empty_query=True)
    [found] = legacy(pictures[:1], [[]])
    expected = by_transformers(owlv2_folder, pictures[0], ["a photo of "], 128)
    assert found.scores == pytest.approx(expected["scores"].tolist(), abs=1e-6)
    assert set(found.labels) == {""}


def test_bad_input_of_owlv2(owlv2_folder: Path, owlv2: Owlv2Detector, pictures: list[Image.Image]) -> None:
    with pytest.raises(InputError, match=r"pad_value must be a whole number from 0 to 255 or None, not 300"):
        Owlv2Detector.from_pretrained(owlv2_folder, pad_value=300)
    with pytest.raises(InputError, match="the word 'interdependence' for OWLv2 has 25 tokens, more than the 24"):
        owlv2(pictures[:1], [["interdependence"]])
    broken = Owlv2Detector.from_pretrained(owlv2_folder)
    with torch.no_grad():
        broken.model.class_head.logit_shift.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="OWLv2 gives non-finite numbers"):
        broken(pictures[:1], [["cat"]])


# -------------------------------------------------------------------- proposals


def test_proposals_get_the_tag_that_fits_best(pictures: list[Image.Image]) -> None:
    boxes = np.array([[1.9, 2.2, 30.7, 40.9], [5, 5, 9, 9], [0, 0, 90, 60]], dtype=np.float32)
    scores = np.array([0.9, 0.5, 0.8], dtype=np.float32)
    of_classes = np.array([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.1, 0.1, 0.8]], dtype=np.float32)
    detector = ProposalDetector(
        lambda images: [(boxes, scores, of_classes)] * len(images), classes=["cat", "dog", "bus"], threshold=0.2
    )
    everything, animals, nothing = detector(pictures, [["bus", "dog", "cat"], ["dog", "red", "cat"], []])
    assert everything.labels == ("cat", "dog", "bus")
    assert everything.scores == pytest.approx([0.54, 0.25, 0.64])
    assert everything.boxes == ((1, 2, 30, 40), (5, 5, 9, 9), (0, 0, 90, 60))
    # What is a bus is no dog, for 0.8 x 0.1 is below the threshold; "red" is no class.
    assert animals.labels == ("cat", "dog")
    assert nothing == EMPTY
    assert detector(pictures[:1], [["red"]]) == [EMPTY]
    with pytest.raises(InputError, match="has no names for what it finds"):
        ProposalDetector(lambda images: [])
    with pytest.raises(InputError, match="threshold must be a number from 0 to 1"):
        ProposalDetector(lambda images: [], classes=["cat"], threshold=-1)


def test_the_shipped_proposer_finds_and_names() -> None:
    detector = load_detector("proposer-world")
    assert detector.names is not None
    scenes = [render_scene(seed, size=192) for seed in range(9_000_020, 9_000_024)]
    found = detector([Image.fromarray(scene.image) for scene in scenes], [detector.names] * 4)
    met = named = total = 0
    for scene, own in zip(scenes, found, strict=True):
        truth = torch.tensor([thing.box for thing in scene.instances])
        total += len(truth)
        overlap, which = box_iou(torch.tensor(own.boxes, dtype=torch.float32), truth).max(1)
        pairs = [(k, j) for k, (best, j) in enumerate(zip(overlap, which, strict=True)) if best > 0.5]
        met += len(pairs)
        named += sum(own.labels[k] == scene.instances[j].category for k, j in pairs)
    assert met / total > 0.7
    assert named / met > 0.9


def test_a_sam_whose_boxes_a_clip_names(sam_folder: Path) -> None:
    picture = Image.fromarray(render_scene(3, size=96).image)
    detector = load_detector(sam_folder, labels="clip-world", threshold=0.0)
    assert isinstance(detector, ProposalDetector)
    assert detector.names is None
    assert detector([picture], [["cat", "bus"]]) == [EMPTY], "random weights are sure of nothing"
    sure = ProposalDetector(
        lambda images: [(np.array([[0, 0, 96, 96], [10.6, 10.6, 10.7, 10.7]]), np.array([1.0, 0.5]), None)],
        zero_shot=detector.zero_shot,
        threshold=0.0,
    )
    [found] = sure([picture], [["cat", "bus"]])
    assert detector.zero_shot is not None
    [row] = detector.zero_shot([picture], ["cat", "bus"])
    assert found.labels[0] == ["cat", "bus"][int(row.argmax())]
    assert found.scores[0] == pytest.approx(float(row.max()), abs=1e-5)
    assert len(found.boxes) == 2, "a box thinner than a pixel is looked at, too"


def test_bad_detectors(sam_folder: Path, owlv2_folder: Path) -> None:
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (sam_folder, {}, "is a SAM, which names nothing; give a CLIP"),
        (owlv2_folder, {"labels": "clip-world"}, "labels its boxes itself"),
        ("proposer-world", {"pad_value": 3}, "are of OWLv2, and proposer-world is a 'foveate_proposer'"),
        ("clip-world", {}, "is a 'clip' model, which finds no boxes of tags"),
        ("proposer-word", {}, "did you mean 'proposer-world'"),
    )
    for name, options, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            load_detector(name, **options)
