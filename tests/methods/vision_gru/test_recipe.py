"""Training by recipe: augmentation, mixing, moving average, resume, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import foveate
from foveate.errors import InputError, RecipeError
from foveate.methods.vision_gru.augmentation import (
    OPERATIONS,
    mix,
    rand_augment,
    random_erasing,
    random_resized_crop,
    smoothed,
)
from foveate.methods.vision_gru.recipe import build, square_around
from foveate.methods.vision_gru.schedules import MovingAverage, ema_decay
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train

ROOT = Path(__file__).parents[3]
COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Plain colours, which a tiny network learns in seconds."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in COLOURS.items():
            for number in range(count):
                pixels = np.clip(np.array(colour) + noise.integers(-30, 30, (24, 30, 3)), 0, 255).astype(np.uint8)
                path = tmp_path / "data" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    content: dict[str, Any] = {
        "method": "vision_gru",
        "output": str(tmp_path / "out"),
        "data": {"folder": {"root": str(tmp_path / "data")}},
        "augmentation": {"rand_augment": 0, "mixup": 0, "cutmix": 0, "erasing": 0},
        "model": {"dim": 8, "depths": [1, 1, 1, 1], "image_size": 16, "ema_decay": 0.5},
        "evaluation": {"folder": {"root": str(tmp_path / "data"), "split": "val"}},
        "training": {"max_steps": 60, "batch_size": 9, "learning_rate": 0.01, "save_every": 0, "precision": "fp32"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_training_learns_and_evaluates(recipe: Path) -> None:
    result = train(recipe)
    assert result.steps == 60
    metrics = evaluate(recipe, result.checkpoint).metrics
    assert (metrics["images"], metrics["classes"]) == (9, 3)
    assert metrics["top1"] == metrics["top5"] == 1.0
    classify = foveate.load(result.checkpoint, device="cpu")
    assert classify(Image.new("RGB", (40, 40), COLOURS["green"])).label == "green"
    assert classify.processor.image_size == 16


def test_a_resumed_run_ends_with_the_same_average(recipe: Path, tmp_path: Path) -> None:
    whole = train(recipe, ["training.max_steps=8", "training.save_every=4"], out=tmp_path / "whole")
    cut = tmp_path / "cut"
    train(recipe, ["training.max_steps=8", "training.save_every=4"], out=cut)
    first = next(path for path in cut.rglob("*-4") if path.is_dir())
    for path in cut.rglob("*-8"):
        assert path.is_dir()
    resumed = train(recipe, ["training.max_steps=8", "training.save_every=4"], resume=first, out=cut)
    weights = [(folder.checkpoint / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]


def test_what_is_saved_is_the_average(recipe: Path, tmp_path: Path) -> None:
    task = build(load_recipe(recipe))  # type: ignore[arg-type]
    training: Any = task.model
    start = training.network.fc.bias.detach().clone()
    with torch.no_grad():
        for value in training.network.parameters():
            value.add_(1.0)
    assert task.save is not None
    task.save(tmp_path / "saved")
    saved = foveate.load(tmp_path / "saved", device="cpu").model.fc.bias
    # The first update keeps (1 + 1) / (10 + 1) of the start.
    torch.testing.assert_close(saved, start + 9 / 11)
    torch.testing.assert_close(training.network.fc.bias, start + 1.0)
    groups = task.parameter_groups(task.model)  # type: ignore[misc]
    assert len(groups) == 1
    assert len(groups[0]["params"]) == len(list(training.network.parameters()))


def test_moving_average_by_hand() -> None:
    value = nn.Parameter(torch.tensor([0.0]))
    average = MovingAverage([value], decay=0.2)
    assert [ema_decay(n, 0.2) for n in (1, 2)] == [2 / 11, 0.2]
    expected = 0.0
    for n in (1, 2, 3):
        value.data.fill_(n)
        average.update([value])
        keep = min(0.2, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * n
    average.copy_to([value])
    assert value.item() == pytest.approx(expected)


def test_mixing_by_hand(draw: np.random.Generator) -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    targets = smoothed(torch.tensor([0, 1]), 4, 0.1)
    assert targets[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])
    for options in ({"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}, {}):
        seen = set()
        for _ in range(30):
            mixed, labels = mix(images, targets, draw, **options)  # type: ignore[arg-type]
            share = 1 - mixed[0].mean().item()  # of the first image in the first mixture
            wanted = share * targets[0] + (1 - share) * targets[1]
            torch.testing.assert_close(labels[0], wanted, atol=1e-5, rtol=0)
            torch.testing.assert_close(labels.sum(1), torch.ones(2))
            binary = bool(((mixed == 0) | (mixed == 1)).all())
            assert binary or "cutmix_alpha" in options or not options
            seen.add(round(share, 6))
        assert len(seen) > 5
    same, labels = mix(images, targets, draw, mixup_alpha=0, cutmix_alpha=0)
    assert torch.equal(same, images)
    assert torch.equal(labels, targets)


def test_augmentations(draw: np.random.Generator) -> None:
    image = Image.fromarray(draw.integers(0, 256, (20, 33, 3), np.uint8))
    for name in OPERATIONS:
        assert name
    for _ in range(200):
        assert rand_augment(image, draw, probability=1.0).size == image.size
    assert rand_augment(image, draw, operations=0).tobytes() == image.tobytes()
    for size in ((33, 20), (1, 1), (2, 500)):
        for _ in range(20):
            assert random_resized_crop(image.resize(size), 8, draw).size == (8, 8)
    erased = [random_erasing(torch.ones(3, 20, 20), draw, 1.0) for _ in range(100)]
    shares = [1 - pixels.mean().item() for pixels in erased]
    assert 0.01 < min(shares) < max(shares) < 0.36
    assert torch.equal(random_erasing(torch.ones(3, 5, 5), draw, 0.0), torch.ones(3, 5, 5))


def test_samples_depend_on_their_key_alone(recipe: Path) -> None:
    first, second = (build(load_recipe(recipe, ["augmentation.rand_augment=2"])) for _ in range(2))  # type: ignore
    a, b = first.train_dataset[5], second.train_dataset[5]
    assert torch.equal(a["pixels"], b["pixels"])
    assert first.collate is not None
    one, two = (first.collate([a, second.train_dataset[0]]) for _ in range(2))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert one["labels"].shape == (2, 3)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.variant=vision_gru_tiny", "either variant, or dim and depths"),
        ("data.world={first_seed: 1, count: 1}", "give one of folder, world and scenes"),
        ("model.dmi=3", "did you mean 'model.dim'"),
        ("model.dim=7", "multiple of 2"),
    ],
)
def test_wrong_recipes(recipe: Path, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(recipe, [override])


def test_wrong_data(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        train(recipe, ["data.folder.split=nothing"])
    (tmp_path / "data/train/red/0.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"0\.png.*skip_bad=True"):
        train(recipe, ["training.max_steps=2", "training.batch_size=18"])
    train(recipe, ["training.max_steps=2", "data.folder.skip_bad=true"], out=tmp_path / "other")


def test_shipped_recipes_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    monkeypatch.setenv("ADE20K", "/data/ADEChallengeData2016")
    names = [path.name for path in sorted((ROOT / "recipes/vision_gru").glob("*.yaml"))]
    assert names == ["ade20k.yaml", "imagenet.yaml", "world.yaml", "world_segment.yaml"]
    for name in names:
        assert load_recipe(ROOT / "recipes/vision_gru" / name).method == "vision_gru"


@pytest.mark.parametrize(
    "kind",
    [
        ["model.kind=vit", "model.dim=32", "model.patch_size=4"],
        ["model.kind=convnext", "model.image_size=32"],
        ["model.mixer=local"],
    ],
)
def test_other_networks_by_the_same_recipe(recipe: Path, kind: list[str]) -> None:
    short = [*kind, "training.max_steps=3"]
    result = train(recipe, short)
    metrics = evaluate(recipe, result.checkpoint, short).metrics
    assert metrics["images"] == 9
    if "model.mixer=local" not in kind:
        with pytest.raises(InputError):
            foveate.load(result.checkpoint)
        with pytest.raises(RecipeError, match="takes dim and depths, and no variant"):
            load_recipe(recipe, [*kind, "model.mixer=forward"])


def test_sizes_that_other_networks_do_not_take(recipe: Path) -> None:
    with pytest.raises(InputError, match="needs images of 32 pixels or more, not 16"):
        build(load_recipe(recipe, ["model.kind=convnext"]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="patch_size 5; change model"):
        build(load_recipe(recipe, ["model.kind=vit", "model.patch_size=5"]))  # type: ignore[arg-type]


def test_pictures_show_the_whole_object() -> None:
    # 60 x 20 around (50, 50) with a tenth of 60 on each side: 72 x 72.
    assert square_around((20, 40, 80, 60), 192) == (14, 14, 72)
    assert square_around((0, 40, 60, 60), 192) == (0, 14, 72)
    assert square_around((0, 0, 192, 30), 192) == (0, 0, 192)
    assert square_around((150, 180, 192, 192), 192) == (141, 141, 51)


def test_the_world_has_classes(recipe: Path) -> None:
    world = "{first_seed: 5, count: 3, size: 64, processes: 1}"
    resolved = load_recipe(recipe, ["data.folder=null", f"data.world={world}"])
    task = build(resolved)  # type: ignore[arg-type]
    sample = task.train_dataset[0]
    assert sample["pixels"].shape == (3, 16, 16)
    names: Any = task.model.network.config.id2label  # type: ignore[union-attr]
    assert len(names) >= 40
    assert 0 <= sample["label"] < len(names)
