"""The shipped models in the rendered world, through the public door."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.checkpoints import WEIGHTS, shipped_models
from foveate.methods.vision_gru.recipe import square_around
from foveate.metrics.segmentation import SegmentationScore
from foveate.world.export import pixel_classes
from foveate.world.scenes import Scene, render_scene
from foveate.world.vocabulary import category_names

CLASSIFIER, SEGMENTER = "vision-gru-world", "vision-gru-world-segment"


def shipped(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not {*names} <= set(shipped_models()), reason="these weights are not in this installation"
    )


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """With seeds that no recipe trains on."""
    return [render_scene(seed, 192) for seed in range(9_500_000, 9_500_012)]


@shipped(CLASSIFIER)
def test_it_names_objects(scenes: list[Scene]) -> None:
    with pytest.warns(UserWarning, match="knows the rendered world only"):
        classify = foveate.load(CLASSIFIER, device="cpu")
    assert classify.labels == category_names()
    pictures, wanted = [], []
    for scene in scenes:
        for item in scene.instances:
            if item.describable:
                left, top, side = square_around(item.box, 192)
                pictures.append(Image.fromarray(scene.image[top : top + side, left : left + side]))
                wanted.append(item.category)
    assert len(wanted) > 30
    named = [found.label for found in classify(pictures)]
    assert np.mean([a == b for a, b in zip(named, wanted, strict=True)]) > 0.9


@shipped(SEGMENTER)
def test_it_segments_scenes(scenes: list[Scene]) -> None:
    with pytest.warns(UserWarning, match="knows the rendered world only"):
        segment = foveate.load(SEGMENTER, device="cpu")
    assert segment.labels == pixel_classes()
    score = SegmentationScore(len(segment.labels))
    for scene, found in zip(scenes, segment([scene.image for scene in scenes]), strict=True):
        truth = np.full(found.classes.shape, segment.labels.index(scene.background))
        for item in scene.instances:
            truth[item.mask] = segment.labels.index(item.category)
        score.add(truth, found.classes)
    assert score.result().pixel_accuracy > 0.93
    # Of classes that hardly appear in so few scenes, too: what is no more than backgrounds has 0.13.
    assert score.result().mean_iou > 0.5


@shipped(CLASSIFIER, SEGMENTER)
def test_they_are_small() -> None:
    for name, most in ((CLASSIFIER, 2.5e6), (SEGMENTER, 3.5e6)):
        assert sum(path.stat().st_size for path in (WEIGHTS / name).iterdir()) <= most
