"""The shipped model, on scenes that no part was trained on: every grain counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.checkpoints import shipped_models
from foveate.world.scenes import Scene, SceneQuestion, render_scene

pytestmark = pytest.mark.skipif("mg-llava-world" not in shipped_models(), reason="the shipped weights are not made yet")


@pytest.fixture(scope="module")
def model() -> Any:
    with pytest.warns(UserWarning, match="knows the rendered world only"):
        return foveate.load("mg-llava-world", device="cpu")


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, SceneQuestion]]:
    scenes = [render_scene(seed, size=256) for seed in range(9_700_000, 9_700_016)]
    return [(scene, each) for scene in scenes for each in scene.all_questions if each.kind in ("colour", "count")]


def boxes_of(scene: Scene) -> dict[str, Any]:
    return {
        "boxes": [list(item.box) for item in scene.instances],
        "scores": [1.0] * len(scene.instances),
        "labels": [item.category for item in scene.instances],
    }


def right(model: Any, asked: list[tuple[Scene, SceneQuestion]], boxes: list[Any]) -> dict[str, float]:
    pictures = {id(scene): Image.fromarray(scene.image) for scene, _ in asked}
    questions = [each.question for _, each in asked]
    said = model.ask([pictures[id(scene)] for scene, _ in asked], questions, boxes=boxes, batch_size=32)
    kinds = np.array([each.kind for _, each in asked])
    correct = np.array([answer.text == each.answer for answer, (_, each) in zip(said, asked, strict=True)])
    return {kind: float(correct[kinds == kind].mean()) for kind in ("colour", "count")}


def test_objects_are_looked_up(model: Any, asked: list[tuple[Scene, SceneQuestion]]) -> None:
    whole = right(model, asked, [boxes_of(scene) for scene, _ in asked])
    blind = right(model, asked, [[] for _ in asked])
    assert whole["colour"] > 0.5
    assert whole["count"] > 0.85
    assert blind["colour"] < whole["colour"] - 0.1, "without object tokens small things are not seen"
