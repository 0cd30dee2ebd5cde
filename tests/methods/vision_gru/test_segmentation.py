"""UPerNet on VisionGRU by recipe: windows of scenes, loss, training that resumes, evaluation, the predictor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import UperNetForSemanticSegmentation

import foveate
from foveate.data.ade20k import ADE20K
from foveate.errors import CheckpointError, InputError, RecipeError
from foveate.methods.vision_gru.augmentation import photometric_distortion, scene_window
from foveate.methods.vision_gru.configuration import VisionGRUConfig
from foveate.methods.vision_gru.losses import pixel_loss
from foveate.methods.vision_gru.modeling import VisionGRUForImageClassification, build_upernet
from foveate.methods.vision_gru.processing import VisionGRUProcessor, VisionGRUSceneProcessor, fitted_sides
from foveate.methods.vision_gru.recipe import build
from foveate.methods.vision_gru.segmentation import class_weights, parameter_groups
from foveate.methods.vision_gru.segmenter import VisionGRUSegmenter, paint
from foveate.metrics.segmentation import SegmentationScore
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train

COLOURS = {"sky": (60, 120, 230), "grass": (40, 170, 50), "brick": (200, 60, 30)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours in two areas each, with a strip that has no class."""
    root = tmp_path_factory.mktemp("scenes")
    draw = np.random.default_rng(0)
    for split, count in (("training", 8), ("validation", 4)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            first, second = draw.permutation(3)[:2] + 1
            numbers = np.full((40, 48), first, np.uint8)
            numbers[:, int(draw.integers(12, 36)) :] = second
            pixels = np.array([(0, 0, 0), *COLOURS.values()])[numbers] + draw.integers(-12, 13, (40, 48, 3))
            numbers[-4:] = 0
            name = f"{split}_{number}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"images/{split}/{name}.png")
            Image.fromarray(numbers).save(root / f"annotations/{split}/{name}.png")
    lines = ["Idx\tName", *(f"{number}\t{name}" for number, name in enumerate(COLOURS, 1))]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def recipe(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    content: dict[str, Any] = {
        "method": "vision_gru",
        "stage": "segment",
        "output": str(folder / "out"),
        "data": {"scenes": {"root": str(scenes)}},
        "scene_augmentation": {"photometric": False},
        "model": {"dim": 8, "depths": [1, 1, 1, 1], "image_size": 32, "ema_decay": 0.5},
        "segmenter": {
            "hidden_size": 16,
            "auxiliary_channels": 8,
            "dropout": 0,
            "short_side": 32,
            "long_side": 64,
            "pictures": 2,
        },
        "evaluation": {"scenes": {"root": str(scenes), "split": "validation"}},
        "training": {"max_steps": 40, "batch_size": 4, "learning_rate": 0.01, "save_every": 0, "precision": "fp32"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    return train(recipe).checkpoint


def test_training_learns_and_evaluates(recipe: Path, trained: Path, scenes: Path) -> None:
    metrics = evaluate(recipe, trained).metrics
    assert (metrics["images"], metrics["classes"]) == (4, 3)
    assert metrics["miou"] > 0.8
    assert list(metrics["iou"]) == list(COLOURS)
    # The same from the predictor's maps, one image at a time.
    segment, data, score = foveate.load(trained, device="cpu"), ADE20K(scenes, "validation"), SegmentationScore(3)
    for index in range(len(data)):
        score.add(data.load(index)[1], segment(data[index].image).classes)
    assert metrics["miou"] == pytest.approx(score.result().mean_iou)
    assert metrics["pixel_accuracy"] == pytest.approx(score.result().pixel_accuracy)
    picture = Image.open(trained.parent / "segmentation.png")
    assert picture.width > 3 * 48
    with pytest.raises(RecipeError, match="they must be the same, in the same order"):
        root = trained.parent / "other"
        for kind in ("images", "annotations"):
            (root / kind).mkdir(parents=True)
            (root / kind / "validation").symlink_to(scenes / kind / "validation")
        evaluate(recipe, trained, [f"evaluation.scenes.root={root}"])


def test_the_predictor(trained: Path) -> None:
    segment = foveate.load(trained, device="cpu")
    assert isinstance(segment, VisionGRUSegmenter)
    grass, brick = (Image.new("RGB", (50, 41), COLOURS[name]) for name in ("grass", "brick"))
    found = segment([grass, brick.resize((20, 30)), brick])
    assert [result.classes.shape for result in found] == [(41, 50), (30, 20), (41, 50)]
    assert [next(iter(result.shares)) for result in found] == ["grass", "brick", "brick"]
    assert sum(found[0].shares.values()) == pytest.approx(1)
    assert found[2].mask("brick").mean() == found[2].shares["brick"]
    np.testing.assert_array_equal(found[0].classes, segment(grass).classes)
    assert found[0].plot().size == (50, 41)
    with pytest.raises(InputError, match="there is no class 'gras'"):
        found[0].mask("gras")
    with pytest.raises(InputError, match="ratios must be"):
        segment(grass, ratios=[0])


def test_scales_and_mirror_images_are_averaged(trained: Path, scenes: Path) -> None:
    segment = VisionGRUSegmenter.from_pretrained(trained, device=torch.device("cpu"))
    image = ADE20K(scenes).load(0)[0]
    total = torch.zeros(3, image.height, image.width)
    with torch.inference_mode():
        for ratio in (1.0, 1.5):
            pixels = segment.processor(image, ratio=ratio)[None]
            assert pixels.shape[2:] == (32 * ratio, round(48 * 0.8 * ratio + 1e-6))
            for dims in ([], [3]):
                logits = segment.model(pixels.flip(dims)).logits
                logits = F.interpolate(logits, size=total.shape[1:], mode="bilinear", align_corners=False).flip(dims)
                total += logits.softmax(1)[0]
    averaged = segment.class_maps([image], ratios=(1.0, 1.5), flip=True)[0]
    np.testing.assert_array_equal(averaged, total.argmax(0).numpy())


def test_a_resumed_run_ends_the_same(recipe: Path, tmp_path: Path) -> None:
    settings = ["training.max_steps=4", "training.save_every=2"]
    whole = train(recipe, settings, out=tmp_path / "whole")
    train(recipe, settings, out=tmp_path / "cut")
    first = next(path for path in (tmp_path / "cut").rglob("*-2") if path.is_dir())
    resumed = train(recipe, settings, resume=first, out=tmp_path / "cut")
    weights = [(run.checkpoint / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_a_saved_folder_loads_in_whole_or_not(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert VisionGRUSceneProcessor.from_pretrained(folder).short == 32
    assert isinstance(UperNetForSemanticSegmentation.from_pretrained(folder), UperNetForSemanticSegmentation)
    tensors = load_file(folder / "model.safetensors")
    gone = "decode_head.classifier.bias"
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 missing \({gone}\)"):
        VisionGRUSegmenter.from_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"short": 0}')
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="short must be"):
        VisionGRUSegmenter.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "backbone_config": {"model_type": "resnet"}}))
    with pytest.raises(InputError, match="no UPerNet on a VisionGRU"):
        VisionGRUSegmenter.from_pretrained(folder)


def test_it_starts_from_a_classifier(recipe: Path, tmp_path: Path) -> None:
    classifier = VisionGRUForImageClassification(VisionGRUConfig(dim=8, depths=[1, 1, 1, 1], num_labels=5))
    classifier.save_pretrained(tmp_path / "classifier")
    VisionGRUProcessor(32).save_pretrained(tmp_path / "classifier")
    task = build(load_recipe(recipe, [f"model.init_from={tmp_path}/classifier"]))  # type: ignore[arg-type]
    network: Any = task.model.network  # type: ignore[union-attr]
    for name, value in classifier.vision_gru.state_dict().items():
        assert torch.equal(network.backbone.vision_gru.state_dict()[name], value)
    with pytest.raises(RecipeError, match=r"has dim 8, depths \[1, 1, 1, 1\].*not those of the recipe"):
        build(load_recipe(recipe, [f"model.init_from={tmp_path}/classifier", "model.depths=[1, 1, 2, 1]"]))  # type: ignore


def test_published_settings() -> None:
    network = build_upernet(VisionGRUConfig(dim=8, depths=[1, 1, 1, 1]), 7)
    config: Any = network.config
    assert (config.hidden_size, list(config.pool_scales), config.auxiliary_channels) == (512, [1, 2, 3, 6], 256)
    assert config.auxiliary_loss_weight == 0.4
    names = {id(value): name for name, value in network.named_parameters()}
    decayed, free = parameter_groups(network, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    free_names = [names[id(value)] for value in free["params"]]
    assert all("norm" in name and name.startswith("backbone.") for name in free_names)
    # Stem 2, blocks 4 x 2, down-sampling 3; weight and bias each.
    assert len(free_names) == 2 * (2 + 8 + 3)


def test_pixel_loss_by_hand() -> None:
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])  # (1, 2, 1, 2)
    labels = torch.tensor([[[0, 255]]])
    assert pixel_loss(logits, labels).item() == pytest.approx(np.log(1 + np.exp(-2)))
    both = pixel_loss(logits, torch.tensor([[[0, 0]]])).item()
    assert both == pytest.approx((np.log(1 + np.exp(-2)) + np.log(1 + np.exp(1))) / 2)
    assert pixel_loss(logits, torch.full((1, 1, 2), 255)).item() == 0
    # Bilinear, not aligned at corners: of two columns made four, the second is 3/4 of the first and 1/4 of the other.
    wide = pixel_loss(logits, torch.tensor([[[255, 0, 255, 255]]])).item()
    assert wide == pytest.approx(np.log(1 + np.exp(-(1.5 - 0.25))))
    # Weights count in the sum, not in the number of pixels.
    mixed = pixel_loss(logits, torch.tensor([[[0, 1]]]), torch.tensor([0.5, 3.0])).item()
    assert mixed == pytest.approx((0.5 * np.log(1 + np.exp(-2)) + 3 * np.log(1 + np.exp(-1))) / 2)


def test_rare_classes_count_more(recipe: Path, scenes: Path, tmp_path: Path) -> None:
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
    (tmp_path / "objectInfo150.txt").write_text((scenes / "objectInfo150.txt").read_text())
    numbers = np.ones((10, 10), np.uint8)  # 80 pixels of the first class, 5 of the second, none of the third
    numbers[:1, :5], numbers[1:, :1], numbers[1, 1:7] = 2, 0, 0
    Image.fromarray(numbers).save(tmp_path / "annotations/training/0.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "images/training/0.png")
    shares = np.array([80 / 85, 5 / 85, 0])
    wanted = np.array([80 / 85, 5 / 85, 0.05 / 3]) ** -0.5
    found = class_weights(ADE20K(tmp_path, "training"), 0.5).numpy()
    assert found == pytest.approx(wanted / (shares @ wanted), rel=1e-6)
    assert shares @ found == pytest.approx(1)
    # The recipe's setting reaches both heads, and is no part of what is saved.
    overrides = ["segmenter.class_balance=1", "segmenter.auxiliary_weight=0.25"]
    task = build(load_recipe(recipe, overrides))  # type: ignore[arg-type]
    weights = class_weights(ADE20K(scenes, "training"), 1.0)
    sample = task.train_dataset[0]
    pixels, labels = sample["pixel_values"][None], sample["labels"][None]
    model: Any = task.model.eval()
    with torch.no_grad():
        losses = model(pixels, labels)["losses"]
        output = model.network.backbone(pixels).feature_maps
        decoded, auxiliary = model.network.decode_head(output), model.network.auxiliary_head(output)
    assert losses["decoding"].item() == pytest.approx(pixel_loss(decoded, labels, weights).item(), rel=1e-5)
    assert losses["auxiliary"].item() == pytest.approx(0.25 * pixel_loss(auxiliary, labels, weights).item(), rel=1e-5)
    assert "class_weights" not in model.state_dict()


def test_sides_that_fit() -> None:
    assert fitted_sides(640, 480, 512, 2048) == (683, 512)
    assert fitted_sides(3000, 500, 512, 2048) == (2048, 341)
    assert fitted_sides(1, 4000, 512, 2048) == (1, 2048)


def test_windows_avoid_one_class(scenes: Path) -> None:
    draw = np.random.default_rng(0)
    labels = np.zeros((20, 100), np.uint8)
    labels[:, 60:] = 1
    labels[0] = 255
    shares = []
    for _ in range(50):
        left, top, right, bottom = scene_window(labels, 20, draw)
        assert (right - left, bottom - top) == (20, 20)
        inside = labels[top:bottom, left:right]
        shares.append((inside == 1).sum() / (inside != 255).sum())
    # By chance a fifth of the windows would do; ten tries find one nine times in ten.
    assert np.mean([0.25 < share < 0.75 for share in shares]) > 0.6
    assert scene_window(labels, 500, draw) == (0, 0, 100, 20)


def test_samples_are_windows_of_the_scene(recipe: Path, scenes: Path) -> None:
    override = "scene_augmentation={smallest_ratio: 1.0, largest_ratio: 1.0, flip: 1.0, photometric: false}"
    task = build(load_recipe(recipe, [override, "model.image_size=44"]))  # type: ignore[arg-type]
    sample: Any = task.train_dataset[3]
    assert sample["pixel_values"].shape == (3, 44, 44)
    # Scenes of 48 x 40 become 38 x 32; the rest is padding, of which nothing is learnt.
    assert (sample["labels"][32:] == 255).all()
    assert (sample["labels"][:, 38:] == 255).all()
    assert (sample["pixel_values"][:, 32:] == 0).all()
    image, labels = ADE20K(scenes).load(3)
    expected = np.asarray(Image.fromarray(labels).resize((38, 32), Image.Resampling.NEAREST))[:, ::-1]
    np.testing.assert_array_equal(sample["labels"][:32, :38], expected)
    shown = VisionGRUSceneProcessor(32, 64)(image).flip(2)
    torch.testing.assert_close(sample["pixel_values"][:, :32, :38], shown)


def test_photometric_distortion() -> None:
    draw = np.random.default_rng(0)
    image = Image.new("RGB", (2, 2), (120, 80, 60))
    seen = np.array([photometric_distortion(image, draw).getpixel((0, 0)) for _ in range(300)])
    assert len(np.unique(seen, axis=0)) > 100
    assert (seen == (120, 80, 60)).all(1).mean() == pytest.approx(1 / 16, abs=0.05)
    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    values = np.array([photometric_distortion(grey, draw).getpixel((0, 0)) for _ in range(300)])
    assert (np.ptp(values, axis=1) == 0).all()  # hue and saturation leave grey alone
    assert 34 <= values.min() < 60
    assert 160 < values.max() <= 198


def test_painting_leaves_pixels_without_a_class() -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    painted = np.asarray(paint(image, np.array([[255, 0]], np.uint8), 2))
    assert painted[0, 0].tolist() == [10, 20, 30]
    assert painted[0, 1].tolist() != [10, 20, 30]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stage=classify", r"the stage classify takes data\.folder or world"),
        ("data={folder: {root: x}}", r"the stage segment takes data\.scenes"),
        ("augmentation.flip=0.1", "the stage segment has no augmentation"),
        ("model.kind=vit", "of the kind vision_gru"),
        ("training.batch_size=1", "at least 2"),
        ("segmenter.short_side=100", "short_side is above long_side"),
        ("scene_augmentation.smallest_ratio=3", "smallest_ratio is above"),
    ],
)
def test_wrong_recipes(recipe: Path, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(recipe, [override])
