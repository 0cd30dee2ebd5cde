"""Features that are kept are those that the towers would give, for every part of the network that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mg_llava_parts  # pyright: ignore[reportMissingImports] (conftest.py loads it)
import numpy as np
import pytest
import torch
from PIL import Image

from foveate.errors import InputError, RecipeError
from foveate.methods.mg_llava import feature_cache
from foveate.methods.mg_llava.feature_cache import Entry, FeatureCache
from foveate.methods.mg_llava.modeling import TowerFeatures
from foveate.methods.mg_llava.processing import MGLlavaProcessor

BOXES = {
    "boxes": [[2, 2, 20, 20], [30, 5, 55, 35], [1, 30, 9, 39]],
    "scores": [0.9, 0.8, 0.7],
    "labels": ["a", "a", "b"],
}


@pytest.fixture
def entries(tmp_path: Path, picture: Any) -> list[Entry]:
    """Two pictures, one of them without boxes, and a video of two frames."""
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.png")
        picture(number).save(paths[-1])
    (tmp_path / "clip").mkdir()
    for number in range(2):
        Image.fromarray(np.full((40, 60, 3), 90 * number, np.uint8)).save(tmp_path / "clip" / f"{number}.png")
    frame = {"boxes": [[10, 0, 50, 40]], "scores": [1.0], "labels": ["a"]}
    return [
        Entry(paths[0], False, (BOXES,)),
        Entry(tmp_path / "clip", True, (frame, frame)),
        Entry(paths[1], False, ()),
    ]


def made(tokenizer: Any, **changes: Any) -> tuple[Any, MGLlavaProcessor]:
    torch.manual_seed(0)
    model = mg_llava_parts.make_model(num_frames=2, max_text_length=100, **changes).eval()
    return model, MGLlavaProcessor(tokenizer, model.config)


def seen_anew(model: Any, processor: MGLlavaProcessor, entry: Entry) -> TowerFeatures:
    if entry.video:
        frames = [Image.open(path).convert("RGB") for path in sorted(entry.path.iterdir())]
        pictures = processor.video(frames, list(entry.records))
    else:
        pictures = [processor.picture(entry.path, entry.records[0] if entry.records else None)]
    low, high = (torch.stack([getattr(one, name) for one in pictures]) for name in ("pixel_values", "pixel_values_aux"))
    return model.look(low, high, [one.boxes for one in pictures])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "none", "objects": "none"},
        {"fusion": "patch_info_mining"},
        {"object_levels": "multi_level"},
        {"objects": "none"},
    ],
)
def test_the_tokens_are_those_of_the_pictures(
    tokenizer: Any, entries: list[Entry], tmp_path: Path, monkeypatch: Any, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(feature_cache, "CHUNK", 2)  # so that there are two files, the first with a video
    model, processor = made(tokenizer, **changes)
    cache = FeatureCache(tmp_path / "cache", entries, model, processor)
    order = [2, 0, 1]
    batch = TowerFeatures.join([cache.read(number) for number in order])
    kept = model.bridge(TowerFeatures.of(batch.tensors()))
    pictures = [number for number in order for _ in range(2 if entries[number].video else 1)]
    assert len(kept) == len(pictures) == 4
    first = 0
    for number in order:
        own = model.bridge(seen_anew(model, processor, entries[number]))
        for k in range(len(own)):
            torch.testing.assert_close(kept.image[first + k], own.image[k], atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(kept.objects[first + k], own.objects[k], atol=2e-3, rtol=2e-3)
        first += len(own)


def test_a_long_text_leaves_room_for_fewer_objects(tokenizer: Any, entries: list[Entry], tmp_path: Path) -> None:
    model, processor = made(tokenizer)
    cache = FeatureCache(tmp_path / "cache", entries, model, processor)
    long = cache.read(0, text_length=80)
    assert cache.read(0, text_length=10).counts.tolist() == [3]
    assert long.counts.tolist() == [2]  # one of each label
    picture = processor.picture(entries[0].path, BOXES, text_length=80)
    expected = model.look(picture.pixel_values[None], picture.pixel_values_aux[None], [picture.boxes])
    torch.testing.assert_close(long.levels[0].float(), expected.levels[0], atol=2e-3, rtol=2e-3)


def test_a_killed_run_goes_on_and_smaller_networks_read_what_is_there(
    tokenizer: Any, entries: list[Entry], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(feature_cache, "CHUNK", 2)
    model, processor = made(tokenizer)
    FeatureCache(tmp_path / "cache", entries, model, processor)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 6  # three kinds, two files each
    last = max(path for path in files if path.parent.name.startswith("objects"))
    last.unlink()
    FeatureCache(tmp_path / "cache", entries, model, processor)
    assert last.is_file()
    assert {path: path.stat().st_mtime_ns for path in files if path != last} == {
        path: changed for path, changed in files.items() if path != last
    }
    smaller, _ = made(tokenizer, fusion="none", objects="none")
    smaller.vision_tower.load_state_dict(model.vision_tower.state_dict())
    FeatureCache(tmp_path / "cache", entries, smaller, processor)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6
    other, _ = made(tokenizer)
    with torch.no_grad():
        next(other.high_res_tower.parameters()).add_(1)
    FeatureCache(tmp_path / "cache", entries, other, processor)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 10  # the tower of the tokens is the same


def test_what_cannot_be_kept(tokenizer: Any, entries: list[Entry], tmp_path: Path) -> None:
    model, processor = made(tokenizer)
    cache = FeatureCache(tmp_path / "cache", entries, model, processor)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="delete that file"):
        cache.read(0)
    with pytest.raises(InputError, match=r"gone\.png"):
        FeatureCache(tmp_path / "new", [Entry(tmp_path / "gone.png", False, ())], model, processor)
    with torch.no_grad():
        model.high_res_tower.model.encoder.stages[-1].downsampling_layer[1].weight.mul_(1e9)
    with pytest.raises(RecipeError, match="beyond what float16 holds"):
        FeatureCache(tmp_path / "large", entries, model, processor)
    moving, _ = made(tokenizer, legacy_tower_train_mode=True)
    with pytest.raises(RecipeError, match="legacy_tower_train_mode"):
        FeatureCache(tmp_path / "moving", entries, moving, processor)
