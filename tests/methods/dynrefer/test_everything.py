"""Describe everything: proposers of every kind, duplicates, and what the shipped models find in rendered scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.errors import InputError
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.predictor import DynReferPredictor
from foveate.methods.dynrefer.processing import DynReferProcessor
from foveate.metrics.proposals import ProposalImage, evaluate_proposals
from foveate.vision.images import decode_rle, encode_rle
from foveate.vision.proposals import load_proposer
from foveate.vision.sam import SamProposer, SamSettings
from foveate.world.scenes import render_scene

BOXES = [[0.0, 0.0, 40.0, 40.0], [0.0, 0.0, 36.0, 40.0], [0.0, 0.0, 20.0, 40.0], [50.0, 20.0, 90.0, 70.0]]


def propose(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    return np.array(BOXES), np.array([0.5, 0.75, 0.25, 1.0])


def found(regions: Any) -> list[tuple[list[float], float]]:
    return [(list(region.box), region.score) for region in regions]


@pytest.fixture
def repeating(
    tiny_model: DynReferModel, processor: DynReferProcessor, monkeypatch: pytest.MonkeyPatch
) -> DynReferPredictor:
    """Says the same of every region."""
    predictor = DynReferPredictor(tiny_model, processor, proposer=propose)
    answer = predictor._answer

    def same(*arguments: Any) -> Any:
        answers = answer(*arguments)
        for fields in answers.get("caption", []):
            fields["caption"] = "a red car"
        return answers

    monkeypatch.setattr(predictor, "_answer", same)
    return predictor


def test_proposals_are_thinned_out_and_in_order(repeating: DynReferPredictor, photo: Image.Image) -> None:
    first, second, third, far = ((box, score) for box, score in zip(BOXES, (0.5, 0.75, 0.25, 1.0), strict=True))
    tags = {"everything": True, "tasks": "tags"}
    assert found(repeating(photo, **tags)) == [far, second, third]
    assert found(repeating(photo, **tags, box_iou=None)) == [far, second, first, third]
    assert found(repeating(photo, **tags, max_regions=1)) == [far]
    assert found(repeating(photo, **tags, min_score=0.5)) == [far, second]
    # With captions, the third goes: it overlaps the second by 20 / 36. The far one says the same of another place.
    captions = {"everything": True, "tasks": "caption"}
    assert found(repeating(photo, **captions)) == [far, second]
    assert found(repeating(photo, **captions, caption_iou=0.56)) == [far, second, third]
    assert found(repeating(photo, **captions, caption_iou=None, box_iou=None)) == [far, second, first, third]


def test_regions_are_proposed_without_being_described(repeating: DynReferPredictor, photo: Image.Image) -> None:
    every_limit: list[dict[str, Any]] = [{}, {"box_iou": None}, {"max_regions": 2}, {"min_score": 0.5}]
    for limits in every_limit:
        proposed = repeating.propose(photo, **limits)
        described = repeating(photo, everything=True, tasks="tags", **limits)
        assert list(zip(proposed.boxes.tolist(), proposed.scores.tolist(), strict=True)) == found(described)


def test_joint_score(repeating: DynReferPredictor, photo: Image.Image) -> None:
    for region in repeating(photo, everything=True, tasks="caption"):
        plain = region.to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        assert plain["joint_score"] == pytest.approx(plain["score"] * plain["caption_score"], abs=1e-3)
        assert 0 < plain["joint_score"] < plain["score"]
    [given] = repeating(photo, boxes=BOXES[:1], tasks="caption")
    assert given.joint_score is None  # pyright: ignore[reportAttributeAccessIssue]


def test_a_proposer_for_a_call_and_many_images(
    predictor: DynReferPredictor, photo: Image.Image, wide_photo: Image.Image
) -> None:
    def corner(image: Image.Image) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        mask = np.zeros((image.height, image.width), dtype=bool)
        mask[-20:, -20:] = True
        box = [image.width - 20, image.height - 20, image.width, image.height]
        return np.array([box], dtype=float), np.array([0.5]), [encode_rle(mask)]

    results: Any = predictor([photo, wide_photo], everything=True, proposer=corner, tasks="tags")
    assert [regions[0].box for regions in results] == [(76, 60, 96, 80), (100, 44, 120, 64)]
    for regions in results:
        mask = decode_rle(json.loads(json.dumps(regions.to_dict()))["regions"][0]["mask"])
        assert mask.shape == (regions.image.height, regions.image.width)
        assert mask.sum() == mask[-20:, -20:].sum() == 400


def test_nothing_found(predictor: DynReferPredictor, photo: Image.Image) -> None:
    for views in (None, "auto"):
        regions = predictor(photo, everything=True, proposer=lambda _: (np.zeros((0, 4)), np.zeros(0)), views=views)
        assert len(regions) == 0
        assert regions.to_dict()["regions"] == []  # pyright: ignore[reportAttributeAccessIssue]


def test_sam_and_owlv2_by_name(
    predictor: DynReferPredictor, photo: Image.Image, sam_folder: Path, owlv2_folder: Path
) -> None:
    sam: Any = load_proposer(sam_folder)
    sam = SamProposer(
        sam.model, sam.image_processor, SamSettings(3, iou_threshold=0, stability_threshold=0, nms_threshold=1.0)
    )
    regions: Any = predictor(photo, everything=True, proposer=sam, tasks="tags", max_regions=5, box_iou=None)
    boxes, scores, masks = sam(photo)
    assert len(regions) == 5
    assert found(regions) == [(box, score) for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)][:5]
    assert [region.mask for region in regions] == masks[: len(regions)]
    # The official thresholds leave nothing of random weights.
    assert len(predictor(photo, everything=True, proposer=sam_folder)) == 0
    words = {"proposer": str(owlv2_folder), "proposer_words": ["cat", "dog"], "max_regions": 3}
    regions = predictor(photo, everything=True, tasks="tags", **words)
    expected: Any = load_proposer(owlv2_folder, words=["cat", "dog"])
    assert found(regions)[0] == (expected(photo)[0][0].tolist(), pytest.approx(float(expected(photo)[1][0])))
    with pytest.raises(InputError, match="looks for words and none is given"):
        predictor(photo, everything=True, proposer=owlv2_folder)


def test_a_file_of_boxes(predictor: DynReferPredictor, photo: Image.Image, tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        photo.save(path)
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"a": {"boxes": BOXES[2:], "scores": [0.25, 0.5]}, "b.png": BOXES[:1]}))
    results: Any = predictor(paths, everything=True, proposer=file, tasks="tags")
    assert [found(regions) for regions in results] == [[(BOXES[3], 0.5), (BOXES[2], 0.25)], [(BOXES[0], 1.0)]]
    with pytest.raises(InputError, match="so give paths, not a Image"):
        predictor(photo, everything=True, proposer=file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"proposer": propose}, "proposer belongs to everything=True"),
        ({"max_regions": 5}, "max_regions belongs to everything=True"),
        ({"everything": True, "proposer": 5}, "must be a name or a function of an image, not a int"),
        ({"everything": True, "proposer": propose, "proposer_words": ["cat"]}, "this one is loaded already"),
        ({"everything": True, "proposer": "proposer-world", "proposer_words": "cat"}, "proposer_words must be a list"),
        ({"everything": True, "proposer": "clip-world"}, "which proposes no regions"),
        (
            {"everything": True, "proposer": propose, "caption_iou": 2},
            "caption_iou must be a number from 0 to 1 or None",
        ),
        ({"everything": True, "proposer": propose, "max_regions": True}, "max_regions must be a whole number"),
        ({"everything": True, "proposer": lambda _: (np.full((1, 4), np.nan), np.ones(1))}, "must be finite numbers"),
    ],
)
def test_bad_input(predictor: DynReferPredictor, photo: Image.Image, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        predictor(photo, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:dynrefer-world knows the rendered world only")
def test_the_shipped_models_describe_what_is_there() -> None:
    """Rendered scenes of seeds that no shipped weight was trained on: nearly every object is found and named."""
    describer = foveate.load("dynrefer-world", proposer="proposer-world")
    scenes = [render_scene(9_600_000 + number) for number in range(6)]
    results = describer([scene.image for scene in scenes], everything=True, tasks=["caption", "category"])
    objects = taken = named = coloured = wrong = 0
    for scene, regions in zip(scenes, results, strict=True):
        wanted = [item for item in scene.instances if item.describable]
        there = ProposalImage(
            [region.box for region in regions],
            [region.score for region in regions],
            [item.box for item in wanted],
            [1] * len(wanted),
        )
        objects += len(wanted)
        for region, match in zip(regions, evaluate_proposals([there]).matched[0], strict=True):
            wrong += match < 0
            if match >= 0:
                item = wanted[match]
                taken += 1
                named += region.category == item.category
                coloured += item.attributes["colour"] in region.caption.split()
        assert [region.score for region in regions] == sorted((region.score for region in regions), reverse=True)
    assert objects > 25
    assert taken / objects > 0.85
    assert named / taken > 0.9
    assert coloured / taken > 0.85
    assert wrong / (taken + wrong) < 0.25
