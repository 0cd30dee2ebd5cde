"""Training of `proposer-world`: the region proposer on rendered scenes.

Targets and losses are TTFNet's (Liu et al., "Training-Time-Friendly Network for Real-Time Object Detection", AAAI
2020): a Gaussian around each object's centre is the target of the objectness map, and its cells, weighted by it, are
the samples that learn box and class, so that few steps are enough.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from foveate.metrics.proposals import ProposalImage, evaluate_proposals
from foveate.ops.boxes import box_area, box_giou
from foveate.training.recipes import Recipe, RecipeSection
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.standins.rendered import RenderedData, RenderedScenes, tight_box, whole_areas
from foveate.training.trainer import TrainingTask
from foveate.vision.proposer import (
    STRIDE,
    Proposals,
    ProposerConfig,
    ProposerModel,
    ProposerOutput,
    RegionProposer,
    cell_centres,
    decode_boxes,
    fit_image,
    to_pixel_values,
)
from foveate.world.vocabulary import category_names

log = logging.getLogger(__name__)

MIN_VISIBLE, MIN_PIXELS = 0.3, 8
"""An object is to be found if so much of it is visible and its longer side has so many pixels in the resized image."""

# TTFNet's alpha: the Gaussian is so long and wide, relative to the box.
_GAUSSIAN_SHARE = 0.54
# Shares of the image's side below which an object counts as small.
_SMALL = 0.17
# CornerNet's alpha and beta (Law and Deng 2018, eq. 1).
_FOCAL, _NEAR_CENTRE = 2, 4


class ProposerSizes(RecipeSection):
    """Sizes of the network, and the weights of its losses."""

    image_size: int = Field(256, gt=0, le=4096, multiple_of=32, description="pixels, side of the input")
    widths: list[Annotated[int, Field(gt=0, le=4096)]] = Field(
        [16, 32, 64, 96, 128], min_length=5, max_length=5, description="channels at strides 2 to 32"
    )
    head_width: int = Field(48, gt=0, le=4096)
    box_weight: float = Field(2.0, ge=0, description="factor of the GIoU loss")
    class_weight: float = Field(0.5, ge=0, description="factor of the cross-entropy of the classes")


class ProposerRecipe(Recipe):
    data: RenderedData
    model: ProposerSizes = Field(default_factory=lambda: ProposerSizes.model_validate({}))
    calibration: RenderedData = Field(description="scenes on which the score threshold is chosen")
    evaluation: RenderedData


RECIPE = ProposerRecipe


# -------------------------------------------------------------------- data


class CropDataset(SeededDataset):
    """A random part of each scene, mirrored half of the time, and the objects in it.

    A sample: pixels (h, w, 3) uint8 with the longer side of the network's input; boxes (N, 4) float32 and labels (N,)
    of the objects to be found; ignored (M, 4), the boxes of too little of an object to be asked for.
    """

    def __init__(self, scenes: RenderedScenes, image_size: int) -> None:
        self.scenes = scenes
        self.image_size = image_size
        self.labels = {name: k for k, name in enumerate(category_names())}
        self.areas = whole_areas(scenes)

    def __len__(self) -> int:
        return len(self.scenes.images)

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        draw = random.numpy
        image, ids = self.scenes.images[index], self.scenes.instance_maps[index]
        side = len(image)
        if draw.random() < 0.6:
            # Other shapes and sizes: a part with sides of 40 to 100 per cent.
            width, height = (int(side * draw.uniform(0.4, 1)) for _ in range(2))
            x, y = int(draw.integers(side - width + 1)), int(draw.integers(side - height + 1))
            image, ids = image[y : y + height, x : x + width], ids[y : y + height, x : x + width]
        if draw.random() < 0.5:
            image, ids = image[:, ::-1], ids[:, ::-1]
        pixels = fit_image(Image.fromarray(image), self.image_size)
        scale = np.array([pixels.shape[1] / image.shape[1], pixels.shape[0] / image.shape[0]] * 2)
        wanted, ignored, labels = [], [], []
        for number, item in enumerate(self.scenes.instances[index]):
            mask = ids == number + 1
            box = tight_box(mask)
            if box is None:
                continue
            box = box * scale
            visible = mask.sum() / self.areas[index][number]
            if visible >= MIN_VISIBLE and max(box[2] - box[0], box[3] - box[1]) >= MIN_PIXELS:
                wanted.append(box)
                labels.append(self.labels[item.category])
            else:
                ignored.append(box)
        return {
            "pixels": pixels,
            "boxes": torch.from_numpy(np.array(wanted, np.float32).reshape(-1, 4)),
            "labels": torch.tensor(labels, dtype=torch.long),
            "ignored": torch.from_numpy(np.array(ignored, np.float32).reshape(-1, 4)),
        }


class Targets(NamedTuple):
    """What the maps of an image should be, for g x g cells.

    Attributes:
        heat: (g, g) 1 in the cell with the centre of an object, falling to 0 around it.
        known: (g, g) bool; False where nothing is said about objectness.
        owner: (g, g) the object whose box and class a cell learns, -1 for none.
        weight: (g, g) of these cells; the cells of an object add up to 1, unless a smaller object took some.
    """

    heat: Tensor
    known: Tensor
    owner: Tensor
    weight: Tensor


def assign_targets(boxes: Tensor, ignored: Tensor, grid: int) -> Targets:
    """Targets from N boxes (N, 4) and M boxes to ignore (M, 4), xyxy pixels of the network's input.

    The Gaussian of a box of w x h cells is cut off at the radii int(0.54 w / 2) and int(0.54 h / 2) and has a sixth of
    the diameters 2 r + 1 as standard deviations; where several meet, the largest value is the heat, and the smallest
    box is the owner (TTFNet, section 3.2).
    """
    if not len(boxes):
        heat, owner, weight = torch.zeros(grid, grid), torch.full((grid, grid), -1), torch.zeros(grid, grid)
    else:
        cells = boxes / STRIDE
        centre = ((cells[:, :2] + cells[:, 2:]) / 2).floor().clamp(max=grid - 1)
        radius = ((cells[:, 2:] - cells[:, :2]) * _GAUSSIAN_SHARE / 2).floor()
        # (N, g) along each axis
        offsets = torch.arange(grid)[None, None] - centre.T[:, :, None]
        sigma = (2 * radius.T[:, :, None] + 1) / 6
        along = torch.exp(-(offsets**2) / (2 * sigma**2)) * (offsets.abs() <= radius.T[:, :, None])
        gaussians = along[1][:, :, None] * along[0][:, None, :]
        heat = gaussians.amax(0)
        # Of the Gaussians that reach a cell, the one of the smallest box.
        order = box_area(boxes).argsort()
        reached = gaussians[order] > 0
        owner = torch.where(reached.any(0), order[reached.int().argmax(0)], -1)
        share = gaussians / gaussians.sum((1, 2), keepdim=True)
        weight = torch.where(owner >= 0, share.gather(0, owner.clamp(min=0)[None])[0], 0.0)
    centres = cell_centres(grid)[None]
    hidden = ((centres > ignored[:, None, None, :2]) & (centres < ignored[:, None, None, 2:])).all(-1).any(0)
    return Targets(heat, ~hidden | (heat > 0), owner, weight)


def collate(samples: list[dict[str, Any]], image_size: int) -> dict[str, Tensor]:
    """Samples -> the keywords of `ProposerTraining.forward`; objects of the whole batch are numbered through."""
    targets, first = [], 0
    for sample in samples:
        found = assign_targets(sample["boxes"], sample["ignored"], image_size // STRIDE)
        targets.append(found._replace(owner=torch.where(found.owner >= 0, found.owner + first, -1)))
        first += len(sample["boxes"])
    heat, known, owner, weight = (torch.stack(parts) for parts in zip(*targets, strict=True))
    return {
        "pixel_values": to_pixel_values([sample["pixels"] for sample in samples], image_size),
        "heat": heat,
        "known": known,
        "owner": owner,
        "weight": weight,
        "boxes": torch.cat([sample["boxes"] for sample in samples]),
        "labels": torch.cat([sample["labels"] for sample in samples]),
    }


# -------------------------------------------------------------------- losses


def objectness_loss(logits: Tensor, heat: Tensor, known: Tensor) -> Tensor:
    """Penalty-reduced focal loss (CornerNet, eq. 1) of (B, g, g) maps, divided by the number of centres."""
    probability = logits.sigmoid()
    at_centre = (1 - probability) ** _FOCAL * F.logsigmoid(logits)
    elsewhere = (1 - heat) ** _NEAR_CENTRE * probability**_FOCAL * F.logsigmoid(-logits)
    centre = heat == 1
    return -(torch.where(centre, at_centre, elsewhere) * known).sum() / centre.sum().clamp(min=1)


class ProposerTraining(nn.Module):
    """The proposer and its losses."""

    def __init__(self, proposer: ProposerModel, sizes: ProposerSizes) -> None:
        super().__init__()
        self.proposer = proposer
        self.sizes = sizes

    def forward(
        self,
        pixel_values: Tensor,
        heat: Tensor,
        known: Tensor,
        owner: Tensor,
        weight: Tensor,
        boxes: Tensor,
        labels: Tensor,
    ) -> dict[str, Any]:
        output: ProposerOutput = self.proposer(pixel_values)
        image, row, column = (owner >= 0).nonzero(as_tuple=True)
        which, share = owner[image, row, column], weight[image, row, column]
        objects = max(len(boxes), 1)
        centres = cell_centres(owner.shape[-1], owner.device)[row, column]
        predicted = decode_boxes(output.log_distances[image, :, row, column], centres)
        overlap = box_giou(predicted, boxes[which], elementwise=True)
        classes = F.cross_entropy(output.classes[image, :, row, column], labels[which], reduction="none")
        losses = {
            "objectness": objectness_loss(output.objectness, heat, known),
            "box": self.sizes.box_weight * ((1 - overlap) * share).sum() / objects,
            "class": self.sizes.class_weight * (classes * share).sum() / objects,
        }
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}


# -------------------------------------------------------------------- the recipe's parts


def build(recipe: ProposerRecipe) -> TrainingTask:
    """Render the scenes and set the model up; its score threshold is chosen after training."""
    sizes = recipe.model
    names = category_names()
    config = ProposerConfig(
        image_size=sizes.image_size,
        widths=sizes.widths,
        head_width=sizes.head_width,
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
    )
    model = ProposerTraining(ProposerModel(config).to(memory_format=torch.channels_last), sizes)  # pyright: ignore[reportCallIssue]
    dataset = CropDataset(RenderedScenes.render(recipe.data), sizes.image_size)

    def choose(trained: nn.Module, output: Path) -> None:
        model.proposer.config.score_threshold = choose_threshold(
            RegionProposer(model.proposer), RenderedScenes.render(recipe.calibration)
        )
        log.info("score threshold %.2f", model.proposer.config.score_threshold)

    def save(folder: Path) -> None:
        model.proposer.half().save_pretrained(folder)

    return TrainingTask(
        model=model,
        train_dataset=dataset,
        collate=lambda samples: collate(samples, sizes.image_size),
        save=save,
        after_training=choose,
    )


def choose_threshold(proposer: RegionProposer, scenes: RenderedScenes) -> float:
    """The score threshold, of 0.05, 0.1, ..., 0.9, with the best F1 at IoU 0.5."""
    images = pair_with_objects(_propose_above(proposer, scenes, 0.05), scenes)

    def f1(threshold: float) -> float:
        kept = [
            replace(image, boxes=image.boxes[image.scores >= threshold], scores=image.scores[image.scores >= threshold])
            for image in images
        ]
        result = evaluate_proposals(kept)
        return 2 * result.recall * result.precision / (result.recall + result.precision) if result.recall else 0.0

    return max((step / 20 for step in range(1, 19)), key=f1)


def pair_with_objects(proposals: list[Proposals], scenes: RenderedScenes) -> list[ProposalImage]:
    """Proposals for each scene beside its objects, of which the describable ones must be found."""
    return [
        ProposalImage(found.boxes, found.scores, [i.box for i in items], [int(i.describable) for i in items])
        for found, items in zip(proposals, scenes.instances, strict=True)
    ]


def evaluate(recipe: ProposerRecipe, model_path: Path) -> dict[str, Any]:
    """Recall and precision for describable objects at the model's threshold, AP50, and the class of those found.

    A proposal of an object that is too small or too hidden to be described is neither right nor wrong;
    `precision_50_any_object` counts it as right.
    """
    proposer = RegionProposer.from_pretrained(model_path)
    scenes = RenderedScenes.render(recipe.evaluation)
    proposals = proposer.propose(list(scenes.images))
    images = pair_with_objects(proposals, scenes)
    at_50, at_70 = evaluate_proposals(images, 0.5), evaluate_proposals(images, 0.7)
    any_object = evaluate_proposals([replace(image, counted=np.ones(len(image.counted), int)) for image in images])
    below = pair_with_objects(_propose_above(proposer, scenes, 0.01), scenes)
    right_class, sizes, found = [], [], []
    for proposal, items, took in zip(proposals, scenes.instances, at_50.matched, strict=True):
        right_class.extend(items[k].category == label for label, k in zip(proposal.labels, took, strict=True) if k >= 0)
        for k, item in enumerate(items):
            if item.describable:
                sizes.append(max(item.box[2] - item.box[0], item.box[3] - item.box[1]) / recipe.evaluation.size)
                found.append(k in took)
    small = np.array(sizes) < _SMALL
    return {
        "scenes": len(images),
        "objects": at_50.objects,
        "score_threshold": proposer.model.config.score_threshold,
        "recall_50": at_50.recall,
        "recall_70": at_70.recall,
        "recall_50_small": float(np.array(found)[small].mean()) if small.any() else float("nan"),
        "precision_50": at_50.precision,
        "precision_70": at_70.precision,
        "precision_50_any_object": any_object.precision,
        "ap_50": evaluate_proposals(below).average_precision,
        "class_accuracy_of_found": float(np.mean(right_class)) if right_class else float("nan"),
    }


def _propose_above(proposer: RegionProposer, scenes: RenderedScenes, threshold: float) -> list[Proposals]:
    """Proposals with another score threshold than the model's own."""
    config = proposer.model.config
    before, config.score_threshold = config.score_threshold, threshold
    try:
        return proposer.propose(list(scenes.images))
    finally:
        config.score_threshold = before
