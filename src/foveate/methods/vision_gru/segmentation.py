"""Training and evaluation of UPerNet on VisionGRU (spec 3.2, 4.2, 5), on ADE20K or on rendered scenes in its layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.models.upernet.modeling_upernet import UperNetForSemanticSegmentation

from foveate.data.ade20k import ADE20K
from foveate.errors import RecipeError
from foveate.files import atomic_write
from foveate.metrics.segmentation import IGNORE, SegmentationScore
from foveate.training.recipes import RecipePath, RecipeSection
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.trainer import TrainingTask
from foveate.training.world_data import WorldScenes, ensure_rendered
from foveate.vision.drawing import tile

from .augmentation import photometric_distortion, scene_window
from .configuration import VisionGRUConfig
from .losses import pixel_loss
from .modeling import VisionGRUModel, build_upernet
from .processing import VisionGRUSceneProcessor, fitted_sides, to_pixels
from .schedules import AveragedTraining
from .segmenter import MULTI_SCALE, VisionGRUSegmenter, paint

if TYPE_CHECKING:
    from .recipe import VisionGRURecipe


class SceneData(RecipeSection):
    """Images with a class for each pixel, on disk in ADE20K's layout."""

    root: RecipePath = Field(description="folder with images/SPLIT and annotations/SPLIT")
    split: str = "training"
    skip_bad: bool = Field(False, description="leave out images that have no annotation")
    world: WorldScenes | None = Field(None, description="scenes to render into root when it is not there yet")

    def open(self) -> ADE20K:
        """Raises:
        InputError, RecipeError: there are no such files, or others were rendered there.
        """
        ensure_rendered(self.root, "ade20k", self.world)
        return ADE20K(self.root, self.split, skip_bad=self.skip_bad)


class SceneAugmentation(RecipeSection):
    """What happens to a training scene; the defaults are the published recipe's."""

    smallest_ratio: float = Field(0.5, gt=0, le=16, description="least random size, in sizes that inference looks at")
    largest_ratio: float = Field(2.0, gt=0, le=16)
    largest_share: float = Field(0.75, gt=0, le=1, description="share of a window that one class stays below; 1 is off")
    flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring left and right")
    photometric: bool = Field(True, description="random brightness, contrast, saturation and hue")

    @model_validator(mode="after")
    def _in_order(self) -> SceneAugmentation:
        if self.smallest_ratio > self.largest_ratio:
            raise ValueError("smallest_ratio is above largest_ratio")
        return self


class SegmenterSettings(RecipeSection):
    """UPerNet's heads and the sizes that scenes are looked at; the defaults are the published ones."""

    hidden_size: int = Field(512, gt=0, le=65536, description="channels of the decoding head")
    auxiliary_channels: int = Field(256, gt=0, le=65536)
    auxiliary_weight: float = Field(0.4, ge=0, description="of the auxiliary head's loss")
    dropout: float = Field(0.1, ge=0, lt=1, description="of whole channels, before both classifiers")
    class_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="power of 1 / share of a class, as which its pixels count; 0 is published: all alike",
    )
    short_side: int = Field(512, gt=0, le=16384, description="pixels, of a scene as inference looks at it, at most")
    long_side: int = Field(2048, gt=0, le=16384)
    multi_scale: bool = Field(False, description="evaluate at six sizes with their mirror images, averaged")
    pictures: int = Field(6, ge=0, le=100, description="scenes that evaluation draws: image, prediction, truth")

    @model_validator(mode="after")
    def _in_order(self) -> SegmenterSettings:
        if self.short_side > self.long_side:
            raise ValueError("short_side is above long_side")
        return self


class TrainingScenes(SeededDataset):
    """Random windows of scenes of random size: pixel_values (3, S, S) and labels (S, S), padded with 0 and `IGNORE`."""

    def __init__(self, scenes: ADE20K, size: int, settings: SegmenterSettings, augmentation: SceneAugmentation) -> None:
        self.scenes, self.size, self.settings, self.augmentation = scenes, size, settings, augmentation

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, index: int, random: SampleRandom) -> dict[str, Tensor]:
        draw, own = random.numpy, self.augmentation
        image, labels = self.scenes.load(index)
        ratio = draw.uniform(own.smallest_ratio, own.largest_ratio)
        sides = fitted_sides(*image.size, int(self.settings.short_side * ratio), int(self.settings.long_side * ratio))
        labels = np.asarray(Image.fromarray(labels).resize(sides, Image.Resampling.NEAREST))
        left, top, right, bottom = scene_window(labels, self.size, draw, own.largest_share)
        # Only the window is resized; it is the same as a window of the resized image.
        across, down = image.width / sides[0], image.height / sides[1]
        box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
        image = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
        labels = labels[top:bottom, left:right]
        if draw.random() < own.flip:
            image, labels = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels[:, ::-1]
        if own.photometric:
            image = photometric_distortion(image, draw)
        missing = (0, self.size - image.width, 0, self.size - image.height)
        return {
            "pixel_values": F.pad(to_pixels(image), missing),
            "labels": F.pad(torch.from_numpy(labels.astype(np.int64)), missing, value=IGNORE),
        }


class SegmenterTraining(AveragedTraining):
    """UPerNet and the moving average of its weights."""

    class_weights: Tensor | None

    def __init__(
        self,
        network: UperNetForSemanticSegmentation,
        decay: float,
        auxiliary_weight: float,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(network, decay)
        self.auxiliary_weight = auxiliary_weight
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Any]:
        if self.training:
            self.follow()
        network: Any = self.network
        maps = network.backbone(pixel_values).feature_maps
        losses = {
            "decoding": pixel_loss(network.decode_head(maps), labels, self.class_weights),
            "auxiliary": self.auxiliary_weight * pixel_loss(network.auxiliary_head(maps), labels, self.class_weights),
        }
        return {"loss": losses["decoding"] + losses["auxiliary"], "losses": losses}


COUNTED_SCENES = 2000
LEAST_SHARE = 0.05


def class_weights(scenes: ADE20K, power: float) -> Tensor:
    """(K,): share^-power of each class, so that what is rare is learnt too; their mean over all pixels is 1.

    Shares are those of the pixels of up to `COUNTED_SCENES` scenes, evenly spaced. A class that has less than
    `LEAST_SHARE` of an even share counts as if it had that.
    """
    number = len(scenes.classes)
    counts = np.zeros(number)
    for index in range(0, len(scenes), -(-len(scenes) // COUNTED_SCENES)):
        labels = scenes.load(index)[1]
        counts += np.bincount(labels[labels != IGNORE], minlength=number)
    shares = counts / max(counts.sum(), 1)
    weights = np.maximum(shares, LEAST_SHARE / number) ** -power
    return torch.from_numpy(weights / (shares @ weights)).float()


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: no decay of what is called a norm (spec 3.2).

    The batch norms of the heads are called `bn` where this rule comes from, so that theirs decay.
    """
    norms, others = [], []
    for name, parameter in network.named_parameters():
        (norms if "norm" in name.replace("batch_norm", "bn") else others).append(parameter)
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def build_segmenter(recipe: VisionGRURecipe, config: VisionGRUConfig, backbone: VisionGRUModel | None) -> TrainingTask:
    """UPerNet with its data.

    Args:
        config: of the backbone.
        backbone: weights to begin with, those of a classifier.

    Raises:
        InputError: there is no such data.
    """
    settings, data = recipe.segmenter, recipe.data.scenes
    assert data is not None
    scenes = data.open()
    names = dict(enumerate(scenes.classes))
    network = build_upernet(
        config,
        len(names),
        dropout=settings.dropout,
        hidden_size=settings.hidden_size,
        auxiliary_channels=settings.auxiliary_channels,
        auxiliary_loss_weight=settings.auxiliary_weight,
    )
    network.config.id2label, network.config.label2id = names, {name: label for label, name in names.items()}
    trunk: Any = network.backbone
    if backbone is not None:
        trunk.vision_gru.load_state_dict(backbone.state_dict())
    if recipe.model.gradient_checkpointing:
        trunk.gradient_checkpointing_enable()
    module: nn.Module = network
    if torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # two images a device are too few (spec 3.2)
    weights = class_weights(scenes, settings.class_balance) if settings.class_balance else None
    training = SegmenterTraining(module, recipe.model.ema_decay, settings.auxiliary_weight, weights)  # type: ignore[arg-type]

    def save(folder: Path) -> None:
        with training.averaged():
            network.save_pretrained(folder)
        VisionGRUSceneProcessor(settings.short_side, settings.long_side).save_pretrained(folder)

    return TrainingTask(
        model=training,
        train_dataset=TrainingScenes(scenes, recipe.model.image_size, settings, recipe.scene_augmentation),
        save=save,
        parameter_groups=lambda _: parameter_groups(module, recipe.training.weight_decay),
    )


def evaluate_segmenter(
    recipe: VisionGRURecipe, model_path: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """mIoU, accuracy of pixels, and the IoU of each class; draws some scenes into OUTPUT/segmentation.png.

    Raises:
        InputError: the model is no segmenter, or a file cannot be read.
        CheckpointError: it is damaged.
        RecipeError: the model has other classes than the data.
    """
    settings, data = recipe.segmenter, recipe.evaluation.scenes
    assert data is not None
    segmenter = VisionGRUSegmenter.from_pretrained(model_path)
    scenes = data.open()
    if scenes.classes != segmenter.labels:
        raise RecipeError(
            f"evaluation: {data.root} has {len(scenes.classes)} classes ({scenes.classes[0]!r}, ...), the model "
            f"{len(segmenter.labels)} ({segmenter.labels[0]!r}, ...); they must be the same, in the same order."
        )
    score = SegmentationScore(len(scenes.classes))
    looks: dict[str, Any] = {"ratios": MULTI_SCALE, "flip": True} if settings.multi_scale else {}
    batch = recipe.training.batch_size
    drawn: list[Image.Image] = []
    for start in range(0, len(scenes), batch):
        images, truths = zip(*(scenes.load(k) for k in range(start, min(start + batch, len(scenes)))), strict=True)
        maps = segmenter.class_maps(images, batch_size=batch, **looks)
        for image, truth, classes in zip(images, truths, maps, strict=True):
            score.add(truth, classes)
            if len(drawn) < 3 * settings.pictures:
                drawn += [image, *(paint(image, each, score.classes) for each in (classes, truth))]
        if progress is not None:
            progress(start + len(images), len(scenes))
    if drawn:
        with atomic_write(recipe.output / "segmentation.png", "wb") as file:
            tile(drawn, columns=3).save(file, format="PNG")
    result = score.result()
    return {
        "images": len(scenes),
        "classes": len(scenes.classes),
        "miou": result.mean_iou,
        "mean_accuracy": result.mean_accuracy,
        "pixel_accuracy": result.pixel_accuracy,
        "iou": _by_name(scenes.classes, result.iou),
    }


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Name -> value; ADE20K has names twice ("door", "screen"), of which the later ones get their number."""
    found: dict[str, float] = {}
    for number, (name, value) in enumerate(zip(names, values.tolist(), strict=True), 1):
        found[f"{name} ({number})" if name in found else name] = value
    return found
