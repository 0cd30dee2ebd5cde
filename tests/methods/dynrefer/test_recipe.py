"""Recipes: going on from a checkpoint, whole-number generation settings, data without tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate.errors import RecipeError
from foveate.training.runner import train

SMALL = [
    "data.cache_views=null",
    "data.world={first_seed: 5, count: 4, size: 96, processes: 1}",
    "calibration=null",
    "training.max_steps=1",
    "training.batch_size=4",
    "training.save_every=0",
    "training.progress=false",
]
FRESH = ["model.qformer_width=32", "model.qformer_layers=1", "model.num_query_tokens=4", "model.head_size=16"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    settings = [f"data.root={folder / 'data'}", "model.generation={num_beams: 3, max_new_tokens: 5}"]
    return train("recipes/dynrefer/world.yaml", [*SMALL, *FRESH, *settings], out=folder / "run").checkpoint


def test_generation_settings_stay_whole_numbers(first: Path) -> None:
    describer: Any = foveate.load(str(first))
    assert describer.model.config.generation["num_beams"] == 3
    region = describer("docs/images/sample.png", boxes=[[10, 10, 60, 60]], tasks="caption")[0]
    assert region.caption is not None


def test_a_checkpoint_does_not_say_where_its_parts_lay(first: Path) -> None:
    assert '_name_or_path": "/' not in (first / "config.json").read_text()


def test_training_goes_on_from_a_checkpoint_with_the_settings_given(first: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *FRESH, f"data.root={first.parents[1] / 'data'}", f"model.init_from={first}"]
    settings += ["training.learning_rate=0", "training.matrix_learning_rate=0", "model.tag_threshold=0.25"]
    second = train("recipes/dynrefer/world.yaml", settings, out=tmp_path / "run").checkpoint
    before: Any = foveate.load(str(first))
    after: Any = foveate.load(str(second))
    assert after.model.config.tag_threshold == 0.25
    assert after.processor.vocabulary == before.processor.vocabulary
    weights = after.model.state_dict()
    assert all(bool((weights[key] == value).all()) for key, value in before.model.state_dict().items())
    with pytest.raises(RecipeError, match=r"model\.head_size is 64, but the checkpoint .* has 16"):
        train("recipes/dynrefer/world.yaml", [*settings, "model.head_size=64"], out=tmp_path / "other")


def test_cached_views_need_the_training_process(first: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *FRESH, f"data.root={first.parents[1] / 'data'}", f"data.cache_views={tmp_path / 'views'}"]
    train("recipes/dynrefer/world.yaml", settings, out=tmp_path / "run")
    assert len(list((tmp_path / "views").iterdir())) == 1
    with pytest.raises(RecipeError, match=r"set training\.workers to 0"):
        train("recipes/dynrefer/world.yaml", [*settings, "training.workers=1"], out=tmp_path / "other")
