"""Rendered pictures to try the page on."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

SEEDS = (3, 11, 19, 27, 42, 58)
SIDE = 384


@cache
def samples() -> list[dict[str, Any]]:
    """A few scenes of the rendered world: PNG data URLs, what is in them, and questions that have an answer."""
    from PIL import Image

    from foveate.world.scenes import render_scene

    listed = []
    for number, seed in enumerate(SEEDS, start=1):
        scene = render_scene(seed, size=SIDE)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "PNG")
        shown = [item for item in scene.instances if item.describable]
        listed.append(
            {
                "name": f"scene {number}",
                "width": SIDE,
                "height": SIDE,
                "image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
                "objects": [{"box": [float(v) for v in item.box], "category": item.category} for item in shown],
                "questions": [question.question for question in scene.questions],
            }
        )
    return listed
