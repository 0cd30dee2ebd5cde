"""Training and evaluation of the classifier by recipe (spec 3.1), on ImageNet, on a folder a class, or on the rendered
world, where a sample is the picture of one object and the class its category."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from foveate.data.image_folder import ImageFolder
from foveate.errors import RecipeError
from foveate.metrics.classification import top_k_accuracy
from foveate.training.recipes import Recipe, RecipePath, RecipeSection
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.standins.rendered import RenderedData, RenderedScenes
from foveate.training.trainer import TrainingTask
from foveate.world.vocabulary import category_names

from .augmentation import mix, rand_augment, random_erasing, random_resized_crop, smoothed
from .configuration import VARIANTS, VisionGRUConfig
from .losses import soft_target_divergence
from .modeling import VisionGRUForImageClassification
from .predictor import VisionGRUPredictor
from .processing import VisionGRUProcessor, to_pixels
from .schedules import MovingAverage

_CONTEXT = 0.1
"""How much of an object's box a rendered sample shows around it, on each side."""


class FolderData(RecipeSection):
    """Labelled images on disk."""

    root: RecipePath = Field(description="folder with SPLIT/CLASS/image.jpg, or ImageNet's ILSVRC")
    split: str = "train"
    skip_bad: bool = Field(False, description="decode every image once and leave out those that cannot be read")


class ClassData(RecipeSection):
    """Where labelled images come from: one of the two."""

    folder: FolderData | None = None
    world: RenderedData | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ClassData:
        if (self.folder is None) == (self.world is None):
            raise ValueError("give either folder or world, where the labelled images come from")
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

    variant: Literal["vision_gru_tiny", "vision_gru_base"] | None = None
    dim: int | None = Field(None, ge=2, le=8192, multiple_of=2)
    depths: list[int] | None = Field(None, min_length=4, max_length=4)
    init_from: str | None = Field(None, description="go on from this classifier of the same sizes and classes")
    image_size: int = Field(224, ge=1, le=16384, description="pixels, side of training images")
    gradient_checkpointing: bool = Field(False, description="compute blocks again in the backward pass: less memory")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the moving average that is saved; 0 is off")

    @model_validator(mode="after")
    def _one_size(self) -> VisionGRUSizes:
        own = self.dim is not None and self.depths is not None
        if own == (self.variant is not None) or (self.dim is None) != (self.depths is None):
            raise ValueError("give either variant, or dim and depths")
        return self


class VisionGRURecipe(Recipe):
    data: ClassData
    augmentation: AugmentationSettings = Field(default_factory=lambda: AugmentationSettings.model_validate({}))
    model: VisionGRUSizes
    evaluation: ClassData


RECIPE = VisionGRURecipe


class Pictures:
    """Images with classes, of either source; `classes` are those of a trained model, or None for the data's own."""

    def __init__(self, data: ClassData, classes: list[str] | None = None) -> None:
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
        x0, y0, x1, y1 = item.box
        side = pixels.shape[0]
        dx, dy = _CONTEXT * (x1 - x0), _CONTEXT * (y1 - y0)
        left, top = int(max(x0 - dx, 0)), int(max(y0 - dy, 0))
        right, bottom = max(int(min(x1 + dx, side)), left + 1), max(int(min(y1 + dy, side)), top + 1)
        return Image.fromarray(pixels[top:bottom, left:right]), self.classes.index(item.category)


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


class ClassifierTraining(nn.Module):
    """The classifier and the moving average of its weights, which resumes with it.

    The average follows when the weights have changed since the last look, that is, once for each optimiser step.
    """

    seen: Tensor

    def __init__(self, classifier: VisionGRUForImageClassification, decay: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.average = MovingAverage(classifier.parameters(), decay) if decay else None
        # What the weights were when the average last followed; part of the state, so that a resumed run goes on so.
        self.register_buffer("seen", classifier.fc.bias.detach().clone())

    def follow(self) -> None:
        """Moves the average towards the weights if these are others than before."""
        bias = self.classifier.fc.bias.detach()
        if self.average is not None and not torch.equal(self.seen, bias):
            self.average.update(self.classifier.parameters())
            self.seen.copy_(bias)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.follow()
        return {"loss": soft_target_divergence(self.classifier(pixel_values).logits, labels)}


def build(recipe: VisionGRURecipe) -> TrainingTask:
    """The classifier with its data; the folder that training saves holds the moving average, if there is one.

    Raises:
        InputError: there is no such data, or `model.init_from` is no classifier.
        RecipeError: `model.init_from` has other sizes or classes.
    """
    sizes = recipe.model
    pictures = Pictures(recipe.data)
    names = dict(enumerate(pictures.classes))
    shape = VARIANTS[sizes.variant] if sizes.variant else {"dim": sizes.dim, "depths": sizes.depths}
    config = VisionGRUConfig(
        **shape, image_size=sizes.image_size, id2label=names, label2id={name: k for k, name in names.items()}
    )
    if sizes.init_from is None:
        model = VisionGRUForImageClassification(config)
    else:
        model = VisionGRUPredictor.from_pretrained(sizes.init_from, device=torch.device("cpu")).model
        found = model.config
        if (found.dim, list(found.depths), found.id2label) != (config.dim, config.depths, config.id2label):
            raise RecipeError(
                f"model.init_from: {sizes.init_from} has dim {found.dim}, depths {found.depths} and "
                f"{found.num_labels} classes, not those of the recipe and its data; change model or data."
            )
    if sizes.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    training = ClassifierTraining(model, sizes.ema_decay)
    decay = recipe.training.weight_decay

    def save(folder: Path) -> None:
        training.follow()
        kept = [value.detach().clone() for value in model.parameters()]
        if training.average is not None and int(training.average.updates):
            training.average.copy_to(model.parameters())
        model.save_pretrained(folder)
        VisionGRUProcessor(sizes.image_size).save_pretrained(folder)
        with torch.no_grad():
            for value, before in zip(model.parameters(), kept, strict=True):
                value.copy_(before)

    return TrainingTask(
        model=training,
        train_dataset=TrainingImages(pictures, sizes.image_size, recipe.augmentation),
        collate=MixingCollate(len(names), recipe.augmentation),
        save=save,
        # The published training decays every parameter, norms and biases too.
        parameter_groups=lambda module: [{"params": list(module.parameters()), "weight_decay": decay}],
    )


def evaluate(recipe: VisionGRURecipe, model_path: Path) -> dict[str, Any]:
    """Top-1 and top-5 accuracy on centre crops (spec 4.1, 5).

    Raises:
        InputError: the model is no classifier, or an image cannot be read.
        CheckpointError: it is damaged.
    """
    predictor = VisionGRUPredictor.from_pretrained(model_path)
    pictures = Pictures(recipe.evaluation, predictor.labels)
    scores, labels = [], []
    batch = recipe.training.batch_size
    for start in range(0, len(pictures), batch):
        images, wanted = zip(
            *(pictures.load(index) for index in range(start, min(start + batch, len(pictures)))), strict=True
        )
        scores.append(predictor.probabilities(images, batch_size=batch).numpy())
        labels += wanted
    probabilities, truth = np.concatenate(scores), np.array(labels)
    return {
        "images": len(labels),
        "classes": len(pictures.classes),
        "top1": top_k_accuracy(probabilities, truth),
        "top5": top_k_accuracy(probabilities, truth, min(5, len(pictures.classes))),
    }
