"""Rendered scenes as arrays in memory, for the pre-training of the stand-ins."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from foveate.training.recipes import LARGEST, RecipeSection
from foveate.world.scenes import Instance, render_scenes

log = logging.getLogger(__name__)

MAX_SCENES = 1_000_000
"""More would not fit into the memory of one machine."""


class RenderedData(RecipeSection):
    """Which scenes to render; the seeds decide every pixel."""

    first_seed: int = Field(ge=0, le=LARGEST)
    count: int = Field(gt=0, le=MAX_SCENES)
    size: int = Field(256, ge=32, le=1024, description="side in pixels")
    processes: int = Field(2, gt=0, le=64, description="rendering processes")


@dataclass
class RenderedScenes:
    """Scenes with, for each pixel, the number of its object.

    Attributes:
        images: (N, S, S, 3) uint8.
        instance_maps: (N, S, S) uint8; 0 is background, k + 1 the k-th instance of the scene.
        instances: per scene, its instances (their masks dropped to save memory).
        captions: per scene, captions of the whole image.
    """

    images: np.ndarray
    instance_maps: np.ndarray
    instances: list[list[Instance]]
    captions: list[tuple[str, ...]]

    @classmethod
    def render(cls, data: RenderedData) -> RenderedScenes:
        """Render them all, with a log line now and then."""
        images = np.empty((data.count, data.size, data.size, 3), np.uint8)
        maps = np.zeros((data.count, data.size, data.size), np.uint8)
        instances, captions = [], []
        start = said = time.monotonic()
        scenes = render_scenes(data.first_seed, data.count, size=data.size, processes=data.processes)
        for index, scene in enumerate(scenes):
            images[index] = scene.image
            for number, instance in enumerate(scene.instances):
                maps[index][instance.mask] = number + 1
                instance.mask = np.zeros((0, 0), bool)
            instances.append(scene.instances)
            captions.append(scene.captions)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                log.info(
                    "rendered %d of %d scenes (%.0f per second)", index + 1, data.count, (index + 1) / (said - start)
                )
        return cls(images, maps, instances, captions)

    def describable(self) -> list[tuple[int, int]]:
        """(scene, instance) of every object that has captions."""
        return [(s, k) for s, scene in enumerate(self.instances) for k, item in enumerate(scene) if item.describable]


def tight_box(mask: np.ndarray) -> np.ndarray | None:
    """xyxy, half-open, around the True of a (H, W) mask; None if there is none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def whole_areas(scenes: RenderedScenes) -> list[np.ndarray]:
    """For each scene, the pixels of each of its objects if nothing covered it."""
    areas = []
    for ids, items in zip(scenes.instance_maps, scenes.instances, strict=True):
        visible = np.bincount(ids.ravel(), minlength=len(items) + 1)[1:]
        areas.append(visible / np.array([item.visible_fraction for item in items]))
    return areas
