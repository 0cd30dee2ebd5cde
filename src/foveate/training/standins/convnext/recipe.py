"""Pre-training of `convnext-world`: a `ConvNextModel` whose four maps say what is where in a rendered scene.

MG-LLaVA reads such a tower in two ways: the cells of the last map are fused with the low-resolution tokens, and objects
are pooled from all four maps. So the objectives are the same two, and their heads are thrown away: each cell of the
coarser three names the smallest object in it (category, attributes, the letters of a sign), the cells of the last map
also everything that is in them, and each object is named from what is pooled over its box. Signs are one object in
fifty, too few to learn to read from: more of them, some with words that no scene has, are drawn into the training
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel

from foveate.errors import RecipeError
from foveate.ops.roi_align import roi_align
from foveate.training.recipes import Recipe, RecipeSection
from foveate.training.sampling import SampleKey, SampleRandom, SeededDataset
from foveate.training.standins.labels import asked_cross_entropy, attribute_loss, background_row, label_row
from foveate.training.standins.loading import load_stand_in_model
from foveate.training.standins.pixels import save_image_processor, to_pixel_values
from foveate.training.standins.rendered import RenderedData, RenderedScenes, tight_box, whole_areas
from foveate.training.trainer import TrainingTask
from foveate.world.grammar import attribute_words
from foveate.world.scenes import Instance, random_look
from foveate.world.shapes import SHAPES, draw_object
from foveate.world.vocabulary import attribute_vocabulary, categories, category_names, raw_vocabulary

STRIDES = (4, 8, 16, 32)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_LETTERS = 5
MIN_VISIBLE, MIN_PIXELS = 0.3, 6
"""An object is asked for if so much of it is visible and its longer side has so many pixels of the network's input."""

_SMALL = 0.17
"""Share of the image's side below which an object counts as small."""

Width = Annotated[int, Field(gt=0, le=4096)]
Depth = Annotated[int, Field(gt=0, le=64)]


class ConvNextSizes(RecipeSection):
    """Sizes of the network, what it is shown, and the weights of its objectives."""

    image_size: int = Field(192, gt=0, le=4096, multiple_of=32, description="pixels, side of the input")
    widths: list[Width] = Field([24, 48, 96, 192], min_length=4, max_length=4, description="channels of the stages")
    depths: list[Depth] = Field([2, 2, 4, 2], min_length=4, max_length=4, description="blocks of the stages")
    layer_scale: float = Field(0.5, gt=0, le=1, description="first factor of each block's branch")
    min_crop: float = Field(0.5, gt=0, le=1, description="smallest side of a training picture, in sides of its scene")
    whole: float = Field(0.3, ge=0, le=1, description="share of training pictures that are whole scenes")
    signs: float = Field(2.0, ge=0, le=8, description="signs drawn into a training picture, on average")
    new_words: float = Field(0.3, ge=0, le=1, description="share of these with random letters")
    cell_weight: float = Field(1.0, ge=0, description="factor of the objectives on cells")
    object_weight: float = Field(1.0, ge=0, description="factor of the objectives on pooled objects")

    @model_validator(mode="after")
    def _some_objective(self) -> ConvNextSizes:
        if not self.cell_weight and not self.object_weight:
            raise ValueError("cell_weight and object_weight are both 0; there is nothing to learn")
        return self


class ConvNextRecipe(Recipe):
    data: RenderedData
    model: ConvNextSizes = Field(default_factory=lambda: ConvNextSizes.model_validate({}))
    probe: RenderedData = Field(description="scenes that the probes of evaluation are fitted on")
    evaluation: RenderedData


RECIPE = ConvNextRecipe


# -------------------------------------------------------------------- data


class DrawnSign(NamedTuple):
    """A sign that is drawn into a picture: its instance, RGBA pixels (h, w, 4) and top left corner."""

    instance: Instance
    picture: np.ndarray
    corner: tuple[int, int]


def draw_sign(draw: np.random.Generator, window: tuple[int, int, int], new_words: float) -> DrawnSign:
    """A random sign somewhere in the square `window` (x, y, side), its longer side 7 to 33 per cent of that.

    Args:
        new_words: how often its word is of 2 to 5 random letters, and not one of the world's.
    """
    families = categories()["sign"].families
    # The word for its size depends on the whole scene, which is not what is seen.
    attributes = {name: str(draw.choice(values)) for name, values in families.items() if name != "size"}
    if draw.random() < 0.5:
        attributes["pattern"] = "plain"
    if draw.random() < new_words:
        word = "".join(draw.choice(list(LETTERS), int(draw.integers(2, MOST_LETTERS + 1))))
    else:
        word = str(draw.choice(raw_vocabulary()["sign_words"]))
    look = random_look(draw, "sign", attributes, word)
    left, top, side = window
    longer = side * float(np.exp(draw.uniform(np.log(0.07), np.log(0.33))))
    aspect = SHAPES["sign"].aspect(look)
    width, height = (longer, longer / aspect) if aspect >= 1 else (longer * aspect, longer)
    width, height = max(3, round(width)), max(3, round(height))
    x, y = (int(low + draw.integers(0, max(1, side - size))) for low, size in ((left, width), (top, height)))
    positive, negative = attribute_words("sign", attributes)
    box = (float(x), float(y), float(x + width), float(y + height))
    instance = Instance("sign", box, np.zeros((0, 0), bool), 1.0, attributes, positive, negative, word, False)
    return DrawnSign(instance, draw_object("sign", look, width, height), (x, y))


def paint_sign(image: np.ndarray, ids: np.ndarray, sign: DrawnSign, number: int) -> int:
    """Blends a sign into (H, W, 3) pixels and marks it in the (H, W) map; returns how many pixels it has."""
    (x, y), (height, width) = sign.corner, sign.picture.shape[:2]
    under, marks = image[y : y + height, x : x + width], ids[y : y + height, x : x + width]
    picture = sign.picture[: under.shape[0], : under.shape[1]]
    alpha = picture[..., 3:].astype(np.uint16)
    under[:] = ((picture[..., :3] * alpha + under * (255 - alpha) + 127) // 255).astype(np.uint8)
    solid = picture[..., 3] >= 128
    marks[solid] = number
    return int(solid.sum())


def letters_of(text: str | None) -> np.ndarray:
    """(5,) the letters' places in the alphabet from 1 on, 0 behind the last one; -1 where there is no text."""
    if text is None:
        return np.full(MOST_LETTERS, -1)
    found = [LETTERS.index(letter) + 1 for letter in text]
    return np.array(found + [0] * (MOST_LETTERS - len(found)))


def smallest_in_blocks(cells: np.ndarray, block: int) -> np.ndarray:
    """(n, n) numbers of objects, 0: none -> for each block of cells, the object in it that has the fewest cells.

    Of objects with equally many it is the one with the higher number.
    """
    counts = np.bincount(cells.ravel())
    order = np.argsort(-counts[1:], kind="stable") + 1  # the largest first
    rank = np.zeros(len(counts), int)
    rank[order] = np.arange(1, len(order) + 1)
    side = len(cells) // block
    first = rank[cells].reshape(side, block, side, block).max(axis=(1, 3))
    return np.concatenate([[0], order])[first]


class PictureDataset(SeededDataset):
    """Whole scenes and square parts of them, with more signs drawn in.

    A sample: pixels (S, S, 3) uint8; labels (K + 1, L), the rows of `label_row` and the letters of the background and
    of K objects; cells, for each stride the (S / stride, S / stride) rows of what is in the cells; boxes (M, 4) float32
    xyxy in pixels and rows (M,) of the objects that are asked for, and their longer sides (M,) in sides of the scene.
    """

    def __init__(self, scenes: RenderedScenes, sizes: ConvNextSizes) -> None:
        self.scenes = scenes
        self.sizes = sizes
        self.areas = whole_areas(scenes)

    def __len__(self) -> int:
        return len(self.scenes.images)

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        draw, sizes = random.numpy, self.sizes
        image, ids = self.scenes.images[index].copy(), self.scenes.instance_maps[index].astype(np.int64)
        instances, areas = list(self.scenes.instances[index]), list(self.areas[index])
        side = scene_side = len(image)
        left = top = 0
        if draw.random() >= sizes.whole:
            side = int(scene_side * draw.uniform(sizes.min_crop, 1))
            left, top = (int(value) for value in draw.integers(scene_side - side + 1, size=2))
        for _ in range(int(draw.poisson(sizes.signs))):
            sign = draw_sign(draw, (left, top, side), sizes.new_words)
            instances.append(sign.instance)
            areas.append(paint_sign(image, ids, sign, len(instances)))
        window = (slice(top, top + side), slice(left, left + side))
        crop = Image.fromarray(image[window]).resize((sizes.image_size, sizes.image_size), Image.Resampling.BICUBIC)
        ids = ids[window]
        finest = sizes.image_size // STRIDES[0]
        centres = ((np.arange(finest) + 0.5) / finest * side).astype(int)
        cells = ids[np.ix_(centres, centres)]
        scale = sizes.image_size / side
        boxes, rows, shares = [], [], []
        for number, area in enumerate(areas, 1):
            mask = ids == number
            box = tight_box(mask)
            if box is None or mask.sum() < MIN_VISIBLE * area:
                continue
            longer = max(box[2] - box[0], box[3] - box[1])
            if longer * scale >= MIN_PIXELS:
                boxes.append(box * scale)
                rows.append(number)
                shares.append(longer / scene_side)
        labels = [np.concatenate([background_row(), letters_of(None)])]
        labels += [np.concatenate([label_row(item, instances), letters_of(item.text)]) for item in instances]
        return {
            "pixels": np.asarray(crop),
            "labels": np.stack(labels),
            "cells": [smallest_in_blocks(cells, stride // STRIDES[0]) for stride in STRIDES],
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "rows": np.array(rows, np.int64),
            "shares": np.array(shares),
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> the keywords of `ConvNextPretraining.forward`; the rows of the whole batch are numbered through."""
    firsts = np.cumsum([0, *(len(sample["labels"]) for sample in samples[:-1])])
    cells = [
        torch.from_numpy(np.stack([sample["cells"][k] + first for sample, first in zip(samples, firsts, strict=True)]))
        for k in range(len(STRIDES))
    ]
    counts = [len(sample["rows"]) for sample in samples]
    return {
        "pixel_values": to_pixel_values([sample["pixels"] for sample in samples]),
        "labels": torch.from_numpy(np.concatenate([sample["labels"] for sample in samples])),
        "cells": torch.cat([one.flatten(1) for one in cells], dim=1),
        "boxes": torch.from_numpy(np.concatenate([sample["boxes"] for sample in samples])),
        "rows": torch.from_numpy(
            np.concatenate([sample["rows"] + first for sample, first in zip(samples, firsts, strict=True)])
        ),
        "pictures": torch.arange(len(samples)).repeat_interleave(torch.tensor(counts)),
    }


# -------------------------------------------------------------------- network and objectives


def stage_maps(trunk: ConvNextModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """(B, 3, S, S) -> four maps (B, C_k, S / stride_k, S / stride_k), the finest first, without the final norm."""
    return trunk(pixel_values, output_hidden_states=True).hidden_states[-len(STRIDES) :]


def pool_boxes(maps: Sequence[Tensor], boxes: Tensor, pictures: Tensor) -> Tensor:
    """The mean of every map over each box, of (R,) pictures: (R, sum of C_k), with gradient.

    What MG-LLaVA pools (spec 2.4: RoIAlign without half-pixel shift, on maps upsampled to the finest) moves a box by
    half a cell of the finest map; so it is moved here, and each map is pooled as it is, with 8 x 8 samples.
    """
    shifted = boxes + STRIDES[0] / 2
    pooled = [
        roi_align(one, shifted, 1, 1 / stride, sampling_ratio=8, aligned=True, batch_index=pictures).flatten(1)
        for one, stride in zip(maps, STRIDES, strict=True)
    ]
    return torch.cat(pooled, dim=1)


class NamingHead(nn.Module):
    """From features (N, C) to what is there: category (0: nothing), attributes, letters."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.counts = [len(category_names()) + 1, len(attribute_vocabulary())]
        self.names = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.counts)))
        self.letters = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, MOST_LETTERS * (len(LETTERS) + 1)),
        )

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Features (N, C) and rows (N, L) -> the three losses."""
        category, attributes = self.names(features).float().split(self.counts, dim=1)
        letters = labels[:, -MOST_LETTERS:]
        written = letters[:, 0] >= 0
        read = self.letters(features[written]).float().unflatten(1, (MOST_LETTERS, -1))
        return {
            "category": F.cross_entropy(category, labels[:, 0]) if len(labels) else category.sum(),
            "attributes": 6 * attribute_loss(attributes, labels[:, 1 : 1 + self.counts[1]]),
            "letters": asked_cross_entropy(read.flatten(0, 1), letters[written].flatten()),
        }


class ConvNextPretraining(nn.Module):
    """The trunk and the heads of its objectives."""

    def __init__(self, trunk: ConvNextModel, sizes: ConvNextSizes) -> None:
        super().__init__()
        self.trunk = trunk
        self.sizes = sizes
        trunk.layernorm.requires_grad_(False)  # of the pooled output, which nobody reads
        # The finest map sees too little around a cell to name anything, and its many cells would cost the most.
        widths = sizes.widths[1:] if sizes.cell_weight else []
        self.cell_heads = nn.ModuleList(NamingHead(width, width) for width in widths)
        if sizes.cell_weight:
            self.contents_head = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], len(category_names())))
        if sizes.object_weight:
            self.object_head = NamingHead(sum(sizes.widths), 256)

    def forward(
        self, pixel_values: Tensor, labels: Tensor, cells: Tensor, boxes: Tensor, rows: Tensor, pictures: Tensor
    ) -> dict[str, Any]:
        """
        Args:
            labels: (R, L) rows of all objects of the batch.
            cells: (B, all cells of the four maps) rows.
            boxes, rows, pictures: (M, 4), (M,), (M,) of the objects that are pooled.
        """
        maps = stage_maps(self.trunk, pixel_values)
        losses: dict[str, Tensor] = {}
        if self.sizes.cell_weight:
            losses |= {name: self.sizes.cell_weight * loss for name, loss in self._cells(maps, labels, cells).items()}
        if self.sizes.object_weight:
            found = self.object_head(pool_boxes(maps, boxes, pictures), labels[rows])
            losses |= {f"object_{name}": self.sizes.object_weight * loss for name, loss in found.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}

    def _cells(self, maps: Sequence[Tensor], labels: Tensor, cells: Tensor) -> dict[str, Tensor]:
        per_stage = []
        shown = cells.split([one.shape[-1] ** 2 for one in maps], dim=1)
        for head, one, own in zip(self.cell_heads, maps[1:], shown[1:], strict=True):
            per_stage.append(head(one.flatten(2).transpose(1, 2).flatten(0, 1), labels[own.flatten()]))
        losses = {name: torch.stack([found[name] for found in per_stage]).mean() for name in per_stage[0]}
        finest, last = maps[0].shape[-1], maps[-1]
        side, batch = last.shape[-1], len(last)
        block = torch.arange(finest) * side // finest
        cell = (block[:, None] * side + block).flatten().expand(batch, -1)
        contents = torch.zeros(batch, side * side, len(category_names()) + 1)
        contents[torch.arange(batch)[:, None], cell, labels[shown[0], 0]] = 1
        logits = self.contents_head(last.flatten(2).transpose(1, 2)).float()
        losses["contents"] = 10 * F.binary_cross_entropy_with_logits(logits, contents[..., 1:])
        return losses


# -------------------------------------------------------------------- the recipe's parts


def build(recipe: ConvNextRecipe) -> TrainingTask:
    """Render the scenes and set the model up."""
    sizes = recipe.model
    config = ConvNextConfig(
        hidden_sizes=sizes.widths,
        depths=sizes.depths,
        image_size=sizes.image_size,
        layer_scale_init_value=sizes.layer_scale,
    )
    trunk = ConvNextModel(config)
    model = ConvNextPretraining(trunk, sizes).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    dataset = PictureDataset(RenderedScenes.render(recipe.data), sizes)

    def save(folder: Path) -> None:
        trunk.half().save_pretrained(folder)
        save_image_processor(folder, sizes.image_size)

    return TrainingTask(model=model, train_dataset=dataset, collate=collate, save=save)


class _Objects(NamedTuple):
    """Pooled features (N, C), rows (N, L) and longer sides (N,) in sides of the scene."""

    features: np.ndarray
    labels: np.ndarray
    shares: np.ndarray


@torch.inference_mode()
def _pooled_objects(trunk: ConvNextModel, data: RenderedData, sizes: ConvNextSizes) -> _Objects:
    """Of the objects of whole scenes with signs drawn in, which say words of the world only."""
    shown = sizes.model_copy(update={"whole": 1.0, "new_words": 0.0})
    dataset = PictureDataset(RenderedScenes.render(data), shown)
    parts = []
    for start in range(0, len(dataset), 16):
        samples = [dataset[SampleKey(0, 0, k)] for k in range(start, min(start + 16, len(dataset)))]
        batch = collate(samples)
        features = pool_boxes(stage_maps(trunk, batch["pixel_values"]), batch["boxes"], batch["pictures"])
        shares = np.concatenate([sample["shares"] for sample in samples])
        parts.append(_Objects(features.numpy(), batch["labels"][batch["rows"]].numpy(), shares))
    return _Objects(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def evaluate(recipe: ConvNextRecipe, model_path: Path) -> dict[str, Any]:
    """What a linear probe reads off the features of objects of scenes that it was not fitted on: category, colour,
    pattern, and the word of a sign; of all objects and of small ones.

    The input size is the recipe's, so that a tower can be measured at another resolution than it was trained at.

    Raises:
        InputError: the model is none of this kind.
        CheckpointError: it is damaged.
        RecipeError: there are not enough objects, or no signs, to fit or to measure a probe.
    """
    trunk = load_stand_in_model(ConvNextModel, model_path)
    fitted, measured = (_pooled_objects(trunk, data, recipe.model) for data in (recipe.probe, recipe.evaluation))
    mean, deviation = fitted.features.mean(0), fitted.features.std(0) + 1e-6
    targets = _probe_targets(fitted.labels), _probe_targets(measured.labels)
    small = measured.shares < _SMALL
    metrics: dict[str, Any] = {"objects": len(small), "small_objects": int(small.sum())}
    for name, wanted in targets[0].items():
        asked, answered = wanted >= 0, targets[1][name] >= 0
        if len(np.unique(wanted[asked])) < 2 or not answered.any():
            raise RecipeError(
                f"the scenes of probe and evaluation do not have enough objects to measure the {name}; raise "
                "probe.count, evaluation.count or model.signs"
            )
        right = _fit_and_compare(
            (fitted.features[asked] - mean) / deviation,
            wanted[asked],
            (measured.features[answered] - mean) / deviation,
            targets[1][name][answered],
        )
        metrics[f"{name}_accuracy"] = float(right.mean())
        little = small[answered]
        metrics[f"{name}_accuracy_small"] = float(right[little].mean()) if little.any() else float("nan")
    return metrics


def _probe_targets(labels: np.ndarray) -> dict[str, np.ndarray]:
    """What each object is, in numbers; -1 where it is not known."""
    attributes = labels[:, 1 : 1 + len(attribute_vocabulary())]

    def value_of(family: str) -> np.ndarray:
        columns = attributes[
            :, [attribute_vocabulary().index(v) for v in raw_vocabulary()["families"][family]["values"]]
        ]
        return np.where((columns == 1).any(1), (columns == 1).argmax(1), -1)

    words = {tuple(letters_of(word)): k for k, word in enumerate(raw_vocabulary()["sign_words"])}
    return {
        "category": labels[:, 0],
        "colour": value_of("colour"),
        "pattern": value_of("pattern"),
        "text": np.array([words.get(tuple(row), -1) for row in labels[:, -MOST_LETTERS:]]),
    }


def _fit_and_compare(features: np.ndarray, wanted: np.ndarray, others: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Whether a logistic regression that is fitted on the first pair is right about each of the second."""
    classes, target = np.unique(wanted, return_inverse=True)
    inputs, goal = torch.from_numpy(features).float(), torch.from_numpy(target)
    weight = torch.zeros(inputs.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, goal) + 0.5 / len(goal) * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] - it returns the loss as a tensor, as LBFGS wants it
    chosen = (torch.from_numpy(others).float() @ weight + bias).argmax(1).numpy()
    return classes[chosen] == truth
