"""Training and evaluation by recipe: of the classifier (spec 3.1), on ImageNet, on a folder a class, or on the rendered
world, where a sample is the picture of one object and the class its category; of the segmenter (spec 3.2), see
`segmentation`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from foveate.data.image_folder import ImageFolder
from foveate.errors import RecipeError
from foveate.metrics.classification import top_k_accuracy
from foveate.training.recipes import Recipe, RecipePath, RecipeSection
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.standins.rendered import RenderedData, RenderedScenes
from foveate.training.trainer import TrainingTask
from foveate.world.vocabulary import category_names

from .augmentation import mix, rand_augment, random_erasing, random_resized_crop, smoothed
from .baselines import build_baseline, load_baseline
from .configuration import VARIANTS, VisionGRUConfig
from .losses import soft_target_divergence
from .modeling import VisionGRUForImageClassification
from .predictor import VisionGRUPredictor
from .processing import VisionGRUProcessor, to_pixels
from .schedules import AveragedTraining
from .segmentation import SceneAugmentation, SceneData, SegmenterSettings, build_segmenter, evaluate_segmenter

_CONTEXT = 0.1
"""How much of the longer side of an object's box a rendered sample shows around it, on each side: what evaluation cuts
off of the picture's edges is about that much."""


class FolderData(RecipeSection):
    """Labelled images on disk."""

    root: RecipePath = Field(description="folder with SPLIT/CLASS/image.jpg, or ImageNet's ILSVRC")
    split: str = "train"
    skip_bad: bool = Field(False, description="decode every image once and leave out those that cannot be read")


class ImageData(RecipeSection):
    """Where images come from: one of the three."""

    folder: FolderData | None = Field(None, description="stage classify: images with a class each")
    world: RenderedData | None = Field(None, description="stage classify: objects of the rendered world")
    scenes: SceneData | None = Field(None, description="stage segment: images with a class for each pixel")

    @model_validator(mode="after")
    def _one_source(self) -> ImageData:
        if sum(source is not None for source in (self.folder, self.world, self.scenes)) != 1:
            raise ValueError("give one of folder, world and scenes, where the images come from")
        return self


class AugmentationSettings(RecipeSection):
    """What happens to a training image; the defaults are the published recipe's."""

    smallest_crop: float = Field(0.08, gt=0, le=1, description="least share of the area that a random crop shows")
    flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring left and right")
    rand_augment: int = Field(2, ge=0, le=10, description="operations of RandAugment")
    magnitude: float = Field(9.0, ge=0, le=10)
    erasing: float = Field(0.25, ge=0, le=1, description="probability of erasing a rectangle")
    mixup: float = Field(0.8, ge=0, le=100, description="alpha of mixup; 0 is off")
    cutmix: float = Field(1.0, ge=0, le=100, description="alpha of cutmix; 0 is off")
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class VisionGRUSizes(RecipeSection):
    """The network."""

    kind: Literal["vision_gru", "vit", "convnext"] = Field(
        "vision_gru", description="another network to compare with: the width of a ViT is dim, its depth their sum"
    )
    mixer: Literal["both", "forward", "local"] = Field(
        "both", description="what carries information over a map: runs from both ends, from the first pixel, or none"
    )
    variant: Literal["vision_gru_tiny", "vision_gru_base"] | None = None
    dim: int | None = Field(None, ge=2, le=8192, multiple_of=2)
    depths: list[Annotated[int, Field(ge=1, le=1024)]] | None = Field(None, min_length=4, max_length=4)
    patch_size: int = Field(16, ge=1, le=1024, description="pixels, side of a ViT's patches")
    init_from: str | None = Field(
        None, description="go on from this classifier of the same sizes, and where it is trained further, classes"
    )
    image_size: int = Field(224, ge=1, le=16384, description="pixels, side of training images")
    gradient_checkpointing: bool = Field(False, description="compute blocks again in the backward pass: less memory")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the moving average that is saved; 0 is off")

    @model_validator(mode="after")
    def _one_size(self) -> VisionGRUSizes:
        own = self.dim is not None and self.depths is not None
        if own == (self.variant is not None) or (self.dim is None) != (self.depths is None):
            raise ValueError("give either variant, or dim and depths")
        if self.kind != "vision_gru" and (self.variant is not None or self.mixer != "both" or self.init_from):
            raise ValueError(f"a {self.kind} takes dim and depths, and no variant, mixer or init_from")
        return self


def _defaults(section: type[Any]) -> Any:
    return Field(default_factory=lambda: section.model_validate({}))


class VisionGRURecipe(Recipe):
    stage: Literal["classify", "segment"] = Field("classify", description="segment: UPerNet, from a trained classifier")
    data: ImageData
    augmentation: AugmentationSettings = _defaults(AugmentationSettings)
    scene_augmentation: SceneAugmentation = _defaults(SceneAugmentation)
    model: VisionGRUSizes
    segmenter: SegmenterSettings = _defaults(SegmenterSettings)
    evaluation: ImageData

    @model_validator(mode="after")
    def _of_one_stage(self) -> VisionGRURecipe:
        segment = self.stage == "segment"
        for name in ("data", "evaluation"):
            if (getattr(self, name).scenes is not None) != segment:
                wanted = "scenes" if segment else "folder or world"
                raise ValueError(f"the stage {self.stage} takes {name}.{wanted}")
        # Written to recipe.yaml are the sections of both, so that those of the other stage may stand there unchanged.
        for name in ("augmentation",) if segment else ("scene_augmentation", "segmenter"):
            if getattr(self, name) != type(getattr(self, name)).model_validate({}):
                raise ValueError(f"the stage {self.stage} has no {name}; remove it")
        if segment and self.model.kind != "vision_gru":
            raise ValueError(f"the stage segment is of the kind vision_gru, not {self.model.kind}")
        if segment and self.training.batch_size < 2:
            raise ValueError("training.batch_size must be at least 2, for the heads normalise over the batch")
        return self


RECIPE = VisionGRURecipe


class Pictures:
    """Images with classes, of either source; `classes` are those of a trained model, or None for the data's own."""

    def __init__(self, data: ImageData, classes: list[str] | None = None) -> None:
        self.folder = self.scenes = None
        if data.folder is not None:
            settings = data.folder
            self.folder = ImageFolder(settings.root, settings.split, classes=classes, skip_bad=settings.skip_bad)
            self.classes = self.folder.classes
            return
        assert data.world is not None
        self.classes = list(classes or category_names())
        unknown = sorted(set(category_names()) - set(self.classes))
        if unknown:
            raise RecipeError(f"evaluation: the model does not know the world's {', '.join(unknown)}; use a folder.")
        self.scenes = RenderedScenes.render(data.world)
        self.objects = self.scenes.describable()
        if not self.objects:
            raise RecipeError("the rendered scenes have no object to classify; raise the count of scenes.")

    def __len__(self) -> int:
        return len(self.folder) if self.folder is not None else len(self.objects)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """RGB image and class."""
        if self.folder is not None:
            return self.folder.load(index)
        assert self.scenes is not None
        scene, number = self.objects[index]
        pixels, item = self.scenes.images[scene], self.scenes.instances[scene][number]
        left, top, side = square_around(item.box, pixels.shape[0])
        return Image.fromarray(pixels[top : top + side, left : left + side]), self.classes.index(item.category)


def square_around(box: Sequence[float], limit: int) -> tuple[int, int, int]:
    """Left, top and side of the square picture of an object inside a scene of `limit` x `limit` pixels: its box (xyxy)
    with `_CONTEXT` around it, moved inwards where it would leave the scene, so that the object is seen whole."""
    x0, y0, x1, y1 = box
    side = min(math.ceil((1 + 2 * _CONTEXT) * max(x1 - x0, y1 - y0)), limit)
    left, top = (round((low + high - side) / 2) for low, high in ((x0, x1), (y0, y1)))
    return min(max(left, 0), limit - side), min(max(top, 0), limit - side), side


class TrainingImages(SeededDataset):
    """Augmented images: a sample is pixels (3, S, S), the class, and a seed that mixing its batch may use."""

    def __init__(self, pictures: Pictures, size: int, settings: AugmentationSettings) -> None:
        self.pictures, self.size, self.settings = pictures, size, settings

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        draw, settings = random.numpy, self.settings
        image, label = self.pictures.load(index)
        image = random_resized_crop(image, self.size, draw, (settings.smallest_crop, 1.0))
        if draw.random() < settings.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = rand_augment(image, draw, operations=settings.rand_augment, magnitude=settings.magnitude)
        pixels = random_erasing(to_pixels(image), draw, settings.erasing)
        return {"pixels": pixels, "label": label, "seed": int(draw.integers(2**32))}


class MixingCollate:
    """Samples -> pixel_values (B, 3, S, S) and soft labels (B, K), mixed as the first sample's seed decides."""

    def __init__(self, classes: int, settings: AugmentationSettings) -> None:
        self.classes, self.settings = classes, settings

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.tensor([sample["label"] for sample in samples])
        images, targets = mix(
            torch.stack([sample["pixels"] for sample in samples]),
            smoothed(labels, self.classes, self.settings.label_smoothing),
            np.random.default_rng(samples[0]["seed"]),
            mixup_alpha=self.settings.mixup,
            cutmix_alpha=self.settings.cutmix,
        )
        return {"pixel_values": images, "labels": targets}


class ClassifierTraining(AveragedTraining):
    """The classifier and the moving average of its weights."""

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.follow()
        return {"loss": soft_target_divergence(self.network(pixel_values).logits, labels)}


def build(recipe: VisionGRURecipe) -> TrainingTask:
    """The network of the stage with its data; the folder that training saves holds the moving average, if there is one.

    Raises:
        InputError: there is no such data, or `model.init_from` is no classifier.
        RecipeError: `model.init_from` has other sizes or classes.
    """
    sizes = recipe.model
    shape = VARIANTS[sizes.variant] if sizes.variant else {"dim": sizes.dim, "depths": sizes.depths}
    config = VisionGRUConfig(**shape, image_size=sizes.image_size, mixer=sizes.mixer)
    start = None
    if sizes.init_from is not None:
        start = VisionGRUPredictor.from_pretrained(sizes.init_from, device=torch.device("cpu")).model
        found = start.config
        if (found.dim, list(found.depths), found.mixer) != (config.dim, list(config.depths), config.mixer):
            raise RecipeError(
                f"model.init_from: {sizes.init_from} has dim {found.dim}, depths {found.depths} and mixer "
                f"{found.mixer}, not those of the recipe; change model."
            )
    if recipe.stage == "segment":
        return build_segmenter(recipe, config, None if start is None else start.vision_gru)
    return build_classifier(recipe, config, start)


def build_classifier(
    recipe: VisionGRURecipe, config: VisionGRUConfig, start: VisionGRUForImageClassification | None
) -> TrainingTask:
    """The classifier with its data.

    Args:
        config: of a VisionGRU, without classes.
        start: the classifier to go on from.
    """
    sizes = recipe.model
    pictures = Pictures(recipe.data)
    names = dict(enumerate(pictures.classes))
    if start is not None and start.config.id2label != names:
        raise RecipeError(
            f"model.init_from: {sizes.init_from} has {start.config.num_labels} classes, not those of the data; change "
            "model or data."
        )
    classes = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    if sizes.kind != "vision_gru":
        network = build_baseline(sizes.kind, config, sizes.patch_size, classes)
    else:
        network = start or VisionGRUForImageClassification(VisionGRUConfig.from_dict(config.to_dict() | classes))
    if sizes.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    training = ClassifierTraining(network, sizes.ema_decay)
    decay = recipe.training.weight_decay

    def save(folder: Path) -> None:
        with training.averaged():
            network.save_pretrained(folder)
        VisionGRUProcessor(sizes.image_size).save_pretrained(folder)

    return TrainingTask(
        model=training,
        train_dataset=TrainingImages(pictures, sizes.image_size, recipe.augmentation),
        collate=MixingCollate(len(names), recipe.augmentation),
        save=save,
        # The published training decays every parameter, norms and biases too.
        parameter_groups=lambda module: [{"params": list(module.parameters()), "weight_decay": decay}],
    )


def evaluate(
    recipe: VisionGRURecipe, model_path: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy on centre crops (spec 4.1, 5); mIoU where the stage is segment.

    Raises:
        InputError: the model is none of the stage's, or an image cannot be read.
        CheckpointError: it is damaged.
        RecipeError: it has other classes than the data.
    """
    if recipe.stage == "segment":
        return evaluate_segmenter(recipe, model_path, progress)
    if recipe.model.kind == "vision_gru":
        predictor = VisionGRUPredictor.from_pretrained(model_path)
    else:
        predictor = load_baseline(model_path)
    pictures = Pictures(recipe.evaluation, predictor.labels)
    scores, labels = [], []
    batch = recipe.training.batch_size
    for start in range(0, len(pictures), batch):
        images, wanted = zip(
            *(pictures.load(index) for index in range(start, min(start + batch, len(pictures)))), strict=True
        )
        scores.append(predictor.probabilities(images, batch_size=batch).numpy())
        labels += wanted
        if progress is not None:
            progress(len(labels), len(pictures))
    probabilities, truth = np.concatenate(scores), np.array(labels)
    return {
        "images": len(labels),
        "classes": len(pictures.classes),
        "top1": top_k_accuracy(probabilities, truth),
        "top5": top_k_accuracy(probabilities, truth, min(5, len(pictures.classes))),
    }
