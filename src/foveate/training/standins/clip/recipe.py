"""Pre-training of `clip-world`: a `CLIPModel` trained on crops of rendered scenes and their captions.

The contrast of crops and captions (Radford et al. 2021) alone would need more pictures than a laptop can look at, so
objectives on the tokens of `dense_layer` help, all free in a rendered world; their heads are thrown away: each patch
names the object under it (category, attributes), what that object's caption relates it to, and what is next on each of
its four sides, it points to the boxes of its object and of the related one, and the class token says which categories
are where. What is kept is a plain CLIP checkpoint.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from foveate.errors import RecipeError
from foveate.training.recipes import Recipe, RecipeSection
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.standins.labels import asked_cross_entropy, attribute_loss, label_table
from foveate.training.standins.loading import load_stand_in
from foveate.training.standins.pixels import save_image_processor, to_pixel_values
from foveate.training.standins.rendered import RenderedData, RenderedScenes
from foveate.training.trainer import TrainingTask
from foveate.world.scenes import Instance, render_scene
from foveate.world.vocabulary import attribute_vocabulary, category_names, colour_names, relation_predicates

log = logging.getLogger(__name__)


class ClipSizes(RecipeSection):
    """Sizes of the two towers."""

    init_from: str | None = Field(None, description="go on from this CLIP of the same sizes, with its tokenizer")
    image_size: int = Field(60, gt=0, le=4096, description="pixels, side of the input; a multiple of the patch size")
    patch_size: int = Field(10, gt=0, le=1024, description="pixels")
    vision_width: int = Field(128, gt=0, le=8192, multiple_of=4)
    vision_layers: int = Field(7, gt=0, le=128)
    vision_heads: int = Field(4, gt=0, le=256)
    text_width: int = Field(128, gt=0, le=8192)
    text_layers: int = Field(3, gt=0, le=128)
    text_heads: int = Field(4, gt=0, le=256)
    projection: int = Field(128, gt=0, le=8192)
    vocabulary: int = Field(800, ge=560, le=1_000_000, description="entries of the byte-pair tokenizer")
    dense_layer: int = Field(-2, description="hidden states that the dense objectives read, and that users should take")
    dense_weight: float = Field(1.0, ge=0, description="factor of the dense objectives")

    @model_validator(mode="after")
    def _fit_together(self) -> ClipSizes:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for part in ("vision", "text"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise ValueError(f"{part}_width {width} is not a multiple of {part}_heads {heads}")
        states = self.vision_layers + 1
        if not -states <= self.dense_layer < states:
            raise ValueError(
                f"dense_layer is {self.dense_layer}, but {self.vision_layers} layers have hidden states from {-states} "
                f"to {states - 1}"
            )
        return self


class ClipRecipe(Recipe):
    data: RenderedData
    model: ClipSizes = Field(default_factory=lambda: ClipSizes.model_validate({}))
    evaluation: RenderedData


RECIPE = ClipRecipe


def train_tokenizer(captions: list[str], size: int) -> CLIPTokenizer:
    """A byte-pair tokenizer of CLIP's kind, trained on captions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    # CLIP's order: bytes, bytes that end a word, merges, then start and end; the end token has the highest id.
    merges = [tuple(pair) for pair in trained["merges"]]
    pieces = dict.fromkeys([*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)])
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=40)


class CropDataset(SeededDataset):
    """Crops around each describable object, from the object itself to the whole scene, with a caption and labels.

    A sample: pixels (s, s, 3) uint8, caption, and for each of g x g patches: the row of `labels` of the object under
    its centre (0: background), whether what its caption relates it to is in the crop, and where that and the object
    itself are: two boxes, xyxy from the centre of the patch in sides of the crop (NaN: none).
    """

    def __init__(self, scenes: RenderedScenes, sizes: ClipSizes) -> None:
        self.scenes = scenes
        self.sizes = sizes
        self.index = scenes.describable()
        self.labels, self.offsets = label_table(scenes)

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        scene, number = self.index[index]
        draw = random.numpy
        image, instance = self.scenes.images[scene], self.scenes.instances[scene][number]
        # Most crops show the object and what is beside it; in wider ones most things are smaller than a patch.
        t = 0.0 if draw.random() < 0.15 else float(draw.integers(1, 11 if draw.random() < 0.25 else 6)) / 10
        side = image.shape[0]
        box = np.array(instance.box) + t * (np.array([0, 0, side, side]) - np.array(instance.box))
        x0, y0, x1, y1 = (int(value) for value in box)
        x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
        size = self.sizes.image_size
        crop = Image.fromarray(image[y0:y1, x0:x1]).resize((size, size), Image.Resampling.BICUBIC)
        grid = size // self.sizes.patch_size
        centres = (np.arange(grid) + 0.5) / grid
        rows, columns = (y0 + centres * (y1 - y0)).astype(int), (x0 + centres * (x1 - x0)).astype(int)
        ids = self.scenes.instance_maps[scene][np.ix_(rows, columns)].astype(np.int64)
        captions = self.scenes.captions[scene] if t == 1.0 else instance.captions
        boxes, related = self._surroundings(self.scenes.instances[scene], (x0, y0, x1, y1), wide=t >= 0.3)
        middles = np.stack(np.meshgrid(centres, centres), axis=2)
        return {
            "pixels": np.asarray(crop),
            "caption": captions[int(draw.integers(len(captions)))],
            "labels": np.where(ids > 0, self.offsets[scene] + ids, 0),
            "related": related[ids],
            "boxes": (boxes[ids] - np.tile(middles, 4)).astype(np.float32),
        }

    @staticmethod
    def _surroundings(
        instances: list[Instance], crop: tuple[int, int, int, int], wide: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """For the background and each object: its box and that of what it relates to, and if its relation can be seen.

        Boxes are in sides of the crop. A relation can be seen where half of the other's box is in the crop; that there
        is none, in a wide crop.
        """
        corner = np.array([crop[0], crop[1]] * 2)
        sides = np.array([crop[2] - crop[0], crop[3] - crop[1]] * 2)
        boxes = np.full((len(instances) + 1, 8), np.nan)
        related = np.zeros(len(instances) + 1, bool)
        own = (np.array([item.box for item in instances]).reshape(-1, 4) - corner) / sides
        boxes[1:, :4] = own
        inside = own.clip(0, 1)
        area = (own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])
        shown = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1]) >= 0.5 * area
        for number, item in enumerate(instances, 1):
            if item.relations:
                other = item.relations[0].object_index
                related[number] = shown[other]
                if shown[other]:
                    boxes[number, 4:] = own[other]
            else:
                related[number] = item.describable and wide
        return boxes, related


class ClipPretraining(nn.Module):
    """The CLIP model and the heads of the dense objectives."""

    labels: Tensor

    def __init__(self, clip: CLIPModel, sizes: ClipSizes, labels: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.sizes = sizes
        self.register_buffer("labels", labels, persistent=False)
        width = sizes.vision_width
        self.counts = [len(category_names()) + 1, len(attribute_vocabulary()), len(relation_predicates()) + 1]
        self.counts += [len(category_names()), len(colour_names())]
        self.patch_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.counts)))
        self.side_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * self.counts[0]))
        self.box_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8))
        self.layout_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16 * len(category_names())))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        related: Tensor,
        boxes: Tensor,
    ) -> dict[str, Any]:
        vision = self.clip.vision_model(pixel_values=pixel_values, output_hidden_states=True)
        image = F.normalize(self.clip.visual_projection(vision.pooler_output).float(), dim=-1)
        text_output = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask)
        text = F.normalize(self.clip.text_projection(text_output.pooler_output).float(), dim=-1)
        scores = self.clip.logit_scale.exp().clamp(max=100) * image @ text.T
        target = torch.arange(len(scores))
        losses = {"contrast": (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2}
        if self.sizes.dense_weight:
            hidden = vision.hidden_states[self.sizes.dense_layer]
            dense = self._dense(hidden, labels, related, boxes)
            losses |= {name: self.sizes.dense_weight * loss for name, loss in dense.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}

    def _dense(self, hidden: Tensor, labels: Tensor, related: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        truth = self.labels[labels.flatten()]
        category, attributes, predicate, other, colour = truth.split([1, self.counts[1], 1, 1, 1], dim=1)
        predicted = self.patch_head(hidden[:, 1:]).float().flatten(0, 1).split(self.counts, dim=1)
        losses = {
            "category": F.cross_entropy(predicted[0], category[:, 0]),
            "attributes": 6 * attribute_loss(predicted[1], attributes),
        }
        for name, logits, wanted in zip(
            ("predicate", "other", "colour"), predicted[2:], (predicate, other, colour), strict=True
        ):
            losses[name] = asked_cross_entropy(logits, wanted[:, 0].masked_fill(~related.flatten(), -1))
        grid = self.sizes.image_size // self.sizes.patch_size
        beside = self.labels[_next_on_each_side(labels.view(-1, grid, grid)).flatten(2)][..., 0]  # (B, 4, g*g)
        sides = self.side_head(hidden[:, 1:]).float().unflatten(2, (4, -1)).transpose(1, 2)
        losses["sides"] = 2 * F.cross_entropy(sides.flatten(0, 2), beside.flatten())
        pointed = self.box_head(hidden[:, 1:]).float()
        there = ~boxes.isnan()
        distance = (pointed - boxes.nan_to_num().clamp(-1.5, 1.5)).abs()
        losses["boxes"] = 4 * (distance * there).sum() / there.sum().clamp(min=1)
        # The class token tells where things are: which categories stand in each cell of a 4 x 4 grid.
        cells = torch.arange(grid) * 4 // grid
        cell = (cells[:, None] * 4 + cells).flatten().expand(len(labels), -1)
        names = category.view(len(labels), -1)
        layout = torch.zeros(len(labels), 16, self.counts[0])
        layout[torch.arange(len(labels))[:, None], cell, names] = 1
        logits = self.layout_head(hidden[:, 0]).float().view(len(labels), 16, -1)
        losses["layout"] = 10 * F.binary_cross_entropy_with_logits(logits, layout[..., 1:])
        return losses


def _next_on_each_side(rows: Tensor) -> Tensor:
    """(B, g, g) objects, 0: none -> (B, 4, g, g) the next other object to the left, above, to the right, below."""
    found = []
    for turns in range(4):
        turned = torch.rot90(rows, turns, (1, 2))  # what was above is now to the left
        out = torch.zeros_like(turned)
        for column in range(1, turned.shape[2]):
            for other in range(column - 1, -1, -1):
                seen = turned[..., other]
                take = (out[..., column] == 0) & (seen != 0) & (seen != turned[..., column])
                out[..., column] = torch.where(take, seen, out[..., column])
        found.append(torch.rot90(out, -turns, (1, 2)))
    return torch.stack(found, dim=1)


@torch.no_grad()
def start_like_a_trained_transformer(vision: nn.Module, grid: int) -> None:
    """Initial weights from which a small vision transformer learns several times faster than from noise.

    Positions start as two-dimensional sines, attention as "look at what is like me, at my place", and values as a weak
    negative copy: what trained transformers look like (mimetic initialisation, Trockman and Kolter 2023).
    """
    embeddings: Any = vision.embeddings
    width = embeddings.position_embedding.weight.shape[1]
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    positions = torch.cat([waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)], dim=2).flatten(0, 1)
    embeddings.position_embedding.weight.copy_(torch.cat([torch.zeros(1, width), positions]) * 0.5)
    for block in cast(Any, vision).encoder.layers:
        attention = block.self_attn
        size = attention.head_dim
        for head in range(attention.num_heads):
            rows = slice(head * size, (head + 1) * size)
            left, values, right = torch.linalg.svd(
                0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width)
            )
            root = values[:size].sqrt()
            attention.q_proj.weight[rows] = (left[:, :size] * root).T
            attention.k_proj.weight[rows] = right[:size] * root[:, None]
        left, values, right = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * torch.eye(width))
        attention.v_proj.weight.copy_((left * values.sqrt()).T)
        attention.out_proj.weight.copy_((values.sqrt()[:, None] * right).T)


def _collate(tokenizer: CLIPTokenizer) -> Any:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        text = tokenizer([sample["caption"] for sample in samples], padding=True, truncation=True, return_tensors="pt")
        return {
            "pixel_values": to_pixel_values([sample["pixels"] for sample in samples]),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "labels": torch.from_numpy(np.stack([sample["labels"] for sample in samples])).flatten(1),
            "related": torch.from_numpy(np.stack([sample["related"] for sample in samples])).flatten(1),
            "boxes": torch.from_numpy(np.stack([sample["boxes"] for sample in samples])).flatten(1, 2),
        }

    return collate


def _config(sizes: ClipSizes, tokenizer: CLIPTokenizer) -> CLIPConfig:
    return CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.text_width,
            "intermediate_size": 4 * sizes.text_width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "max_position_embeddings": 40,
            "hidden_act": "gelu",
            "projection_dim": sizes.projection,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": sizes.vision_width,
            "intermediate_size": 4 * sizes.vision_width,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "hidden_act": "gelu",
            "projection_dim": sizes.projection,
        },
        projection_dim=sizes.projection,
    )


def _check_sizes(found: CLIPConfig, wanted: CLIPConfig, name: str) -> None:
    for part in ("vision_config", "text_config"):
        have, want = getattr(found, part).to_dict(), getattr(wanted, part).to_dict()
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
            if have.get(key) != want.get(key):
                raise RecipeError(
                    f"model.init_from: the {part} of {name} has {key} {have.get(key)}, "
                    f"the recipe asks for {want.get(key)}"
                )


def build(recipe: ClipRecipe) -> TrainingTask:
    """Render the scenes, train the tokenizer on their captions, and set the model up.

    Raises:
        InputError, CheckpointError: `model.init_from` is no CLIP, or a damaged one.
        RecipeError: it has other sizes than the recipe.
    """
    sizes = recipe.model
    scenes = RenderedScenes.render(recipe.data)
    dataset = CropDataset(scenes, sizes)
    if sizes.init_from is None:
        texts = [caption for scene in scenes.instances for item in scene for caption in item.captions]
        texts += [caption for captions in scenes.captions for caption in captions]
        tokenizer = train_tokenizer(texts, sizes.vocabulary)
        clip = CLIPModel(_config(sizes, tokenizer))
        start_like_a_trained_transformer(clip.vision_model, sizes.image_size // sizes.patch_size)
    else:
        clip, tokenizer = load_stand_in(CLIPModel, sizes.init_from)
        _check_sizes(clip.config, _config(sizes, tokenizer), sizes.init_from)
    model = ClipPretraining(clip, sizes, dataset.labels)

    def save(folder: Path) -> None:
        model.clip.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_image_processor(folder, sizes.image_size)

    return TrainingTask(model=model, train_dataset=dataset, collate=_collate(tokenizer), save=save)


def evaluate(recipe: ClipRecipe, model_path: Path) -> dict[str, Any]:
    """Zero-shot: the crop of an object against "a {category}" for all categories, and crop-caption retrieval.

    Raises:
        InputError: the model is none of this kind.
        CheckpointError: it is damaged.
        RecipeError: the scenes have nothing to describe.
    """
    model, tokenizer = load_stand_in(CLIPModel, model_path)
    crops, captions, wanted = [], [], []
    size = model.config.vision_config.image_size
    for seed in range(recipe.evaluation.first_seed, recipe.evaluation.first_seed + recipe.evaluation.count):
        scene = render_scene(seed, size=recipe.evaluation.size)
        for item in scene.instances:
            if item.describable:
                x0, y0, x1, y1 = (int(value) for value in item.box)
                crops.append(
                    np.asarray(
                        Image.fromarray(scene.image)
                        .crop((x0, y0, x1, y1))
                        .resize((size, size), Image.Resampling.BICUBIC)
                    )
                )
                captions.append(item.captions[0])
                wanted.append(category_names().index(item.category))
    if not crops:
        raise RecipeError("the scenes of evaluation have no object with a caption; raise evaluation.count")
    spoken = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    prompts = tokenizer([f"a {name}" for name in category_names()], padding=True, return_tensors="pt")
    with torch.inference_mode():
        image = F.normalize(model.get_image_features(pixel_values=to_pixel_values(crops)).pooler_output, dim=-1)
        names = F.normalize(model.get_text_features(**prompts).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(**spoken).pooler_output, dim=-1)
    groups = min(64, len(image))
    hits = [
        (image[start : start + groups] @ text[start : start + groups].T).argmax(1)
        == torch.arange(min(groups, len(image) - start))
        for start in range(0, len(image), groups)
    ]
    return {
        "regions": len(wanted),
        "zero_shot_category_accuracy": float(((image @ names.T).argmax(1) == torch.tensor(wanted)).float().mean()),
        "caption_retrieval_in_64": float(torch.cat(hits).float().mean()),
    }
