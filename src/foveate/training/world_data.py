"""Scenes that a recipe has rendered and exported before it reads them as any other dataset."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from pydantic import Field

from foveate.data.records import read_json
from foveate.errors import RecipeError
from foveate.training.recipes import LARGEST, RecipeSection
from foveate.world.export import MANIFEST, export_scenes

log = logging.getLogger(__name__)


class WorldScenes(RecipeSection):
    """Scenes to render and export into `root` when nothing is there yet."""

    first_seed: int = Field(ge=0, le=LARGEST)
    count: int = Field(gt=0, le=LARGEST)
    size: int = Field(256, ge=32, le=2048, description="side in pixels")
    processes: int = Field(2, gt=0, le=64)


def ensure_rendered(root: Path, format: str, world: WorldScenes | None) -> None:
    """Renders the scenes of a recipe into `root` if it does not exist; all of them are its split "train".

    Raises:
        RecipeError: other scenes were rendered into `root`: other seeds, another size, more or fewer.
        InputError: `root` cannot be written.
    """
    if world is None:
        return
    if root.exists():
        _check_rendered(root, world)
        return
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        # Of the processes that torchrun starts on a machine the first one renders, and the folder appears whole.
        # Should that fail, torchrun ends the others.
        while not root.exists():
            time.sleep(0.2)
        return
    log.info("rendering %d scenes into %s", world.count, root)
    export_scenes(
        root,
        format,
        first_seed=world.first_seed,
        count=world.count,
        size=world.size,
        val_fraction=0.0,
        processes=world.processes,
    )


def _check_rendered(root: Path, world: WorldScenes) -> None:
    manifest = root / MANIFEST
    if not manifest.is_file():
        return  # a dataset of the user's own, in place of the rendered one
    found = read_json(manifest, dict)
    for key in ("first_seed", "count", "size"):
        if key in found and found[key] != getattr(world, key):
            raise RecipeError(
                f"{root} was rendered with {key} {found[key]}, but the recipe asks for {getattr(world, key)}; "
                "remove that folder, or give another root"
            )
