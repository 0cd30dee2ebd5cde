"""Cached views: the same samples and losses as views that are cropped and encoded anew."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data.samples import ImageSample, RegionSample
from foveate.errors import InputError, RecipeError
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.processing import DynReferProcessor
from foveate.methods.dynrefer.recipe import Collate, RegionDataset, TrainingData
from foveate.methods.dynrefer.view_cache import ViewCache
from foveate.training.sampling import SampleKey


class Listed(list[ImageSample]):
    """A dataset in memory with the folder that it would lie in."""

    root: Path


@pytest.fixture
def images(photo: Image.Image, tmp_path: Path) -> Any:
    listed = Listed()
    listed.root = tmp_path
    for number, boxes in enumerate([[(20.0, 10.0, 50.0, 30.0), (0.0, 0.0, 9.0, 60.0)], [(5.0, 40.0, 90.0, 70.0)]]):
        path = tmp_path / f"{number}.png"
        photo.rotate(90 * number).save(path)
        regions = tuple(RegionSample(k, box, captions=("a red car",), tags=("car",)) for k, box in enumerate(boxes))
        listed.append(ImageSample(number, path, *photo.rotate(90 * number).size, regions))
    return listed


INDEX = [(0, 0), (0, 1), (1, 0)]


def test_cached_views_give_the_losses_of_fresh_ones(
    images: Any, tmp_path: Path, tiny_model: DynReferModel, processor: DynReferProcessor
) -> None:
    cache = ViewCache.open(tmp_path / "views", images, INDEX, tiny_model)
    config: Any = tiny_model.config
    data = TrainingData.model_validate({"root": tmp_path})
    plain = RegionDataset(images, INDEX, config, processor.vocabulary, data)
    cached = RegionDataset(images, INDEX, config, processor.vocabulary, data, cache)
    embeds = tiny_model.encode_text(*processor.text_ids(processor.vocabulary.tags))
    prompts = tiny_model.encode_text(
        *processor.text_ids([*processor.vocabulary.prompts, *processor.vocabulary.classes])
    )
    collate = Collate(processor, embeds, prompts)
    collate_cached = Collate(processor, embeds, prompts, cache, tiny_model)
    tiny_model.eval()
    for epoch in (2, 2, 3):  # unknown, known, some of both
        keys = [SampleKey(4, epoch, row) for row in range(3)]
        with torch.no_grad():
            fresh: Any = collate([plain[key] for key in keys])
            kept: Any = collate_cached([cached[key] for key in keys])
            assert "pixel_values" not in kept
            torch.testing.assert_close(kept["region_boxes"], fresh["region_boxes"], rtol=0, atol=0)
            tokens = tiny_model.encode_views(fresh["pixel_values"])
            torch.testing.assert_close(kept["view_tokens"], tokens, rtol=2e-3, atol=2e-3)
            a, b = tiny_model(**fresh), tiny_model(**kept)
        assert a.losses.keys() == b.losses.keys()
        for name, loss in a.losses.items():
            torch.testing.assert_close(b.losses[name], loss, rtol=2e-3, atol=2e-3)
        again = [cached[key] for key in keys]
        assert not any(sample["unknown"].any() or len(sample["crops"]) for sample in again)
    with pytest.raises(ValueError, match="either pixel_values or view_tokens"):
        tiny_model(region_boxes=fresh["region_boxes"])


def test_there_is_one_cache_for_each_tower_and_list(
    images: Any, tmp_path: Path, tiny_model: DynReferModel, processor: DynReferProcessor
) -> None:
    folder = tmp_path / "views"
    first = ViewCache.open(folder, images, INDEX, tiny_model)
    first.tokens[1, 3] = 1
    again = ViewCache.open(folder, images, INDEX, tiny_model)
    assert again.known(1, np.array([0, 3, 4])).tolist() == [False, True, False]
    assert ViewCache.open(folder, images, INDEX[:2], tiny_model).tokens.shape == (2, 11, 17, 32)
    changed = copy.deepcopy(tiny_model)  # the others' tests compare its weights to the last bit
    with torch.no_grad():
        next(changed.vision_tower.parameters()).add_(1)
    other = ViewCache.open(folder, images, INDEX, changed)
    assert not other.tokens.any()
    assert len(list(folder.iterdir())) == 3


def test_only_views_of_the_candidates_are_cached() -> None:
    assert ViewCache.columns(np.array([0.0, 1.0, 0.3])).tolist() == [0, 10, 3]
    with pytest.raises(RecipeError, match=r"0\.25"):
        ViewCache.columns(np.array([0.0, 0.25]))


def test_a_damaged_cache_says_what_to_do(images: Any, tmp_path: Path, tiny_model: DynReferModel) -> None:
    ViewCache.open(tmp_path / "views", images, INDEX, tiny_model)
    [file] = (tmp_path / "views").rglob("tokens.npy")
    for content in (file.read_bytes()[:20], b"no array", b""):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"tokens\.npy cannot be used .*; delete its folder"):
            ViewCache.open(tmp_path / "views", images, INDEX, tiny_model)
