"""The method's claim in miniature: a detail that only a close view shows, and a context that only a wide view shows.

Each picture has a striped square, the region. Its *detail* is the direction of the stripes, which are too fine for the
whole image at the encoder's resolution. Its *context* is the colour of the marker beside it, which the tight crop does
not contain, among markers farther away that mislead whoever looks too wide. A region encoder made of this method's own
parts is trained on frozen features for one choice of views after the other (paper section 4, two-view study; spec 10).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from foveate.ops.roi_align import roi_align
from foveate.training.recipes import Recipe, RecipeSection, TrainingSettings
from foveate.training.schedules import learning_rate_factor
from foveate.training.trainer import parameter_groups

from .configuration import CANDIDATE_VIEWS
from .modeling import AlignModule, RecognitionHead
from .views import build_views, sample_coefficients

CANVAS, VIEW, CELL = 128, 32, 4
"""Side of the picture, of a resized view and of an encoder cell, in pixels."""
GRID = VIEW // CELL
STRIPE_PERIOD, MARKER, DISTRACTORS = 4, 9, 14
COLOURS = np.array([[230, 50, 50], [50, 200, 70], [60, 90, 230], [235, 210, 50]], dtype=np.uint8)
"""Red, green, blue, yellow: the four context labels."""
DIRECTIONS = 4
TAGS = DIRECTIONS + len(COLOURS)
VIEWS = (0.0, *CANDIDATE_VIEWS)
"""Every t that a view can have; features are computed once for each."""
CHANCE_LOSS = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
"""Binary cross-entropy per tag of who knows no more than that one of four tags holds: the plateau of the training."""

Views = tuple[float, ...]


# -------------------------------------------------------------------------------------------------------------- recipe


class MiniatureData(RecipeSection):
    train: int = Field(default=3000, gt=0, description="pictures to train on")
    test: int = Field(default=600, gt=0, description="pictures to measure on, of other seeds")


class MiniatureModelSettings(RecipeSection):
    channels: int = Field(default=32, gt=0, multiple_of=8, description="of the frozen encoder's features")
    width: int = Field(default=64, gt=0, multiple_of=4, description="of fused features, region tokens and tags")
    num_query_tokens: int = Field(default=4, gt=0)


class Variant(RecipeSection):
    """One model of the comparison: the views that it is trained on."""

    name: str
    views: Views | Literal["random"] = Field(
        description="t of each view, or `num_views` - 1 drawn for each region anew"
    )
    num_views: int = Field(default=2, ge=2, description="n of random views")
    align: bool = True

    @model_validator(mode="after")
    def _known_views(self) -> Variant:
        if self.views != "random" and (not self.views or not set(self.views) <= set(VIEWS)):
            raise ValueError(f"{self.name!r} has the views {list(self.views)}; each t must be one of {list(VIEWS)}")
        return self

    @property
    def count(self) -> int:
        """n, the number of views."""
        return self.num_views if self.views == "random" else len(self.views)

    def sample(self, regions: int, generator: np.random.Generator) -> np.ndarray:
        """(R, n) coefficients for one training batch; random ones are drawn for each region by itself."""
        if self.views == "random":
            return np.stack([sample_coefficients(self.num_views - 1, generator) for _ in range(regions)])
        return np.tile(self.views, (regions, 1))


class MiniatureRecipe(Recipe):
    """`recipes/dynrefer/miniature.yaml`, which `benchmarks/dynrefer_miniature.py` reads."""

    method: Literal["dynrefer-miniature"]
    data: MiniatureData = MiniatureData()
    model: MiniatureModelSettings = MiniatureModelSettings()
    variants: tuple[Variant, ...] = Field(min_length=1)
    triples: tuple[tuple[float, float, float], ...] = Field(description="views at which n = 3 models are measured")
    long_steps: int = Field(default=1500, gt=0, description="steps of the second comparison")

    @model_validator(mode="after")
    def _settings_of_this_loop(self) -> MiniatureRecipe:
        used = {"max_steps", "batch_size", "learning_rate", "weight_decay", "betas"}
        used |= {"warmup_steps", "schedule", "min_lr_ratio"}
        unused = sorted(self.training.model_fields_set - used)
        if unused:
            raise ValueError(f"training.{unused[0]} has no effect in this experiment; remove it")
        if self.training.max_steps is None:
            raise ValueError("training.max_steps is not set; this experiment counts in steps, not in epochs")
        return self


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Picture:
    """One sample.

    Attributes:
        image: RGB, CANVAS x CANVAS.
        box: (4,) xyxy of the region.
        detail: direction in which the stripes alternate, in steps of 45 degrees from the x axis, y down.
        context: row of `COLOURS` of the marker beside the region.
    """

    image: Image.Image
    box: np.ndarray
    detail: int
    context: int


def render_picture(seed: int, index: int) -> Picture:
    """Picture `index` of the set `seed`: deterministic, and independent of all others (spec 10, "Data")."""
    rng = np.random.default_rng([seed, index])
    side = int(rng.integers(20, 29))
    # Far enough from the border that a moderate t shows the marker on every side: b(t) grows towards the border.
    x, y = rng.integers(36, CANVAS - 36 - side, size=2, endpoint=True)
    detail, context = int(rng.integers(DIRECTIONS)), int(rng.integers(len(COLOURS)))

    grey = 128 + rng.normal(0, 20, (CANVAS, CANVAS))
    rows, columns = np.mgrid[y : y + side, x : x + side]
    angle = detail * math.pi / DIRECTIONS
    along = columns * math.cos(angle) + rows * math.sin(angle)
    # Stripes that end abruptly would betray their direction at any resolution, by the edge that they leave.
    depth = np.minimum.reduce([columns - x, x + side - 1 - columns, rows - y, y + side - 1 - rows]) + 1
    stripes = np.sin(2 * math.pi * (along / STRIPE_PERIOD + rng.random()))
    grey[rows, columns] += 50 * np.minimum(depth / 6, 1) * stripes
    canvas = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)

    # Distractors first, so that the marker is whole; their centres are farther than half the side + 24 px.
    centre = np.array([x, y]) + side / 2
    for colour in rng.integers(len(COLOURS), size=DISTRACTORS):
        while True:
            corner = rng.integers(0, CANVAS - MARKER, size=2, endpoint=True)
            if np.abs(corner + MARKER / 2 - centre).max() > side / 2 + 24:
                break
        _fill(canvas, corner, COLOURS[colour])
    gap = int(rng.integers(3, 9))
    across = int(rng.integers(side)) - MARKER // 2  # the marker's middle is beside the region, not off its corner
    along_side = [-gap - MARKER, side + gap]
    offset = (along_side[rng.integers(2)], across)
    corner = np.array([x, y]) + (offset if rng.integers(2) else offset[::-1])
    _fill(canvas, corner, COLOURS[context])
    return Picture(Image.fromarray(canvas), np.array([x, y, x + side, y + side], dtype=np.float32), detail, context)


def _fill(canvas: np.ndarray, corner: np.ndarray, colour: np.ndarray) -> None:
    x, y = corner
    canvas[y : y + MARKER, x : x + MARKER] = colour


# ------------------------------------------------------------------------------------------------------------- encoder


class StandInEncoder(nn.Module):
    """A frozen encoder without learnt parameters: hand-made measurements of each cell, then a fixed random projection.

    A cell of 4 x 4 pixels is measured by its mean colour (3), the strength of its brightness gradient in four
    directions (4) and the share of it that is coloured, by the nearest of the four marker colours (4). The CLS token
    is the maximum over the cells. So one global token knows what is somewhere in the view, as a ViT's does, and a cell
    knows itself and, by a fixed code, where it is (spec 10, "Encoder").
    """

    measurements = 11
    projection: Tensor
    positions: Tensor
    chroma: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(self.measurements, channels, generator=generator) / math.sqrt(self.measurements)
        self.register_buffer("projection", projection)
        self.register_buffer("positions", 0.5 * _position_code(channels))
        colours = torch.from_numpy(COLOURS).float()
        self.register_buffer("chroma", F.normalize(colours - colours.mean(dim=1, keepdim=True), dim=1))

    def measure(self, crops: Tensor) -> Tensor:
        """(B, 32, 32, 3) uint8 -> (B, 64, 11): colour, gradients at 0, 45, 90 and 135 degrees, colour saliencies."""
        pixels = crops.float() / 255
        brightness = F.pad(pixels.mean(dim=-1)[:, None], (0, 1, 0, 1), mode="replicate")[:, 0]
        here, right = brightness[:, :-1, :-1], brightness[:, :-1, 1:]
        below, diagonal = brightness[:, 1:, :-1], brightness[:, 1:, 1:]
        gradients = torch.stack(
            [right - here, (diagonal - here) / math.sqrt(2), below - here, (below - right) / math.sqrt(2)], dim=-1
        )
        tint = (pixels - pixels.mean(dim=-1, keepdim=True)) @ self.chroma.T
        saliency = tint.clamp(min=0) * (tint == tint.amax(dim=-1, keepdim=True))
        measured = [4 * (_cell_mean(pixels) - 0.5), 8 * _cell_mean(gradients**2).sqrt(), 4 * _cell_mean(saliency)]
        return torch.cat(measured, dim=-1)

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tensor:
        """(B, 32, 32, 3) uint8 views -> (B, 1 + 64, C) tokens, CLS first."""
        cells = self.measure(crops)
        patches = cells @ self.projection + self.positions
        return torch.cat([cells.amax(dim=1, keepdim=True) @ self.projection, patches], dim=1)


def _cell_mean(values: Tensor) -> Tensor:
    """(B, 32, 32, K) -> (B, 64, K)."""
    return rearrange(values, "b (h p) (w q) k -> b (h w) (p q) k", p=CELL, q=CELL).mean(dim=2)


def _position_code(channels: int) -> Tensor:
    """(64, C) sines and cosines of row and column, as in the Transformer, in four equal parts."""
    frequencies = math.pi / 2 ** torch.arange(channels // 4) / 2
    angles = torch.arange(GRID)[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = code[:, None].expand(GRID, GRID, -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class Regions:
    """Frozen features of N regions for every t of `VIEWS`.

    Attributes:
        features: (N, 11, C, g, g) RoI-aligned cells.
        cls: (N, 11, C).
        detail, context: (N,) labels.
        targets: (N, 8) tags, four directions then four colours, two of them 1.
    """

    features: Tensor
    cls: Tensor
    detail: Tensor
    context: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.detail)


def encode_pictures(count: int, seed: int, channels: int) -> Regions:
    """Render `count` pictures and encode each region in all of its eleven views, once for all models."""
    encoder = StandInEncoder(channels)
    features = torch.empty(count, len(VIEWS), channels, GRID, GRID)
    cls = torch.empty(count, len(VIEWS), channels)
    labels = torch.empty(count, 2, dtype=torch.long)
    for start in range(0, count, 100):
        pictures = [render_picture(seed, index) for index in range(start, min(start + 100, count))]
        stop = start + len(pictures)
        crops, boxes = [], []
        for picture in pictures:
            views = build_views(picture.image, picture.box, np.array(VIEWS), VIEW)
            crops.append(views.crops[views.view_index[0]])
            boxes.append(views.region_boxes[0])
        tokens = encoder(torch.from_numpy(np.concatenate(crops)))
        maps = rearrange(tokens[:, 1:], "b (h w) c -> b c h w", h=GRID)
        region_boxes = torch.from_numpy(np.concatenate(boxes))
        aligned = roi_align(maps, region_boxes, output_size=GRID, spatial_scale=1 / CELL, sampling_ratio=2)
        features[start:stop] = aligned.unflatten(0, (-1, len(VIEWS)))
        cls[start:stop] = tokens[:, 0].unflatten(0, (-1, len(VIEWS)))
        labels[start:stop] = torch.tensor([(picture.detail, picture.context) for picture in pictures])
    detail, context = labels.unbind(dim=1)
    targets = torch.cat([F.one_hot(detail, DIRECTIONS), F.one_hot(context, len(COLOURS))], dim=1).float()
    return Regions(features, cls, detail, context, targets)


# --------------------------------------------------------------------------------------------------------------- model


class MiniatureModel(nn.Module):
    """Align, fuse, Q-Former, tag head: the region encoder of `modeling.DynReferModel` without its frozen neighbours.

    The queries and the tag embeddings are learnt, as there is no checkpoint that they could come from.
    """

    def __init__(self, settings: MiniatureModelSettings, num_views: int, *, align: bool = True) -> None:
        super().__init__()
        channels, width = settings.channels, settings.width
        self.cvem_align = AlignModule(channels) if align and num_views > 1 else None
        if self.cvem_align is not None:
            self.cvem_align.reset_parameters()
        self.cvem_mlp = nn.Sequential(nn.Linear(num_views * channels, width), nn.ReLU(), nn.Linear(width, width))
        self.query_tokens = nn.Parameter(torch.randn(1, settings.num_query_tokens, width))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=4 * width,
                cross_attention_frequency=1,
                encoder_hidden_size=width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.tag_embeds = nn.Parameter(torch.randn(TAGS, width))
        self.tag_head = RecognitionHead(width, layers=1, heads=4)
        self.tag_fc = nn.Linear(width, 1)
        # The usual small weights stand on a checkpoint's shoulders. From scratch, one CLS token among 65 would be
        # damped ten-thousandfold on its way to the logits, and hundreds of steps pass before anything is learnt.
        for part in (self.cvem_mlp, self.qformer, self.tag_head):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, features: Tensor, cls: Tensor) -> Tensor:
        """(R, n, C, g, g) features and (R, n, C) CLS tokens of the views, the reference first -> (R, 8) tag logits."""
        if self.cvem_align is not None:
            reference, context = features[:, :1].expand_as(features[:, 1:]), features[:, 1:]
            aligned = self.cvem_align(reference.flatten(0, 1), context.flatten(0, 1))
            features = torch.cat([features[:, :1], aligned.unflatten(0, context.shape[:2])], dim=1)
        tokens = torch.cat([cls[:, :, None], rearrange(features, "r n c h w -> r n (h w) c")], dim=2)
        fused = self.cvem_mlp(rearrange(tokens, "r n l c -> r l (n c)"))
        queries = self.query_tokens.expand(len(fused), -1, -1)
        region_tokens = self.qformer(query_embeds=queries, encoder_hidden_states=fused).last_hidden_state
        return self.tag_fc(self.tag_head(self.tag_embeds, region_tokens)).squeeze(-1)


@dataclass(frozen=True)
class TrainedVariant:
    """A model and how its training went.

    Attributes:
        losses: (steps,) binary cross-entropy per tag, mean over the batch.
        context_losses: (steps,) the same of the four context tags alone.
        seconds: wall-clock time of the training.
    """

    model: MiniatureModel
    losses: np.ndarray
    context_losses: np.ndarray
    seconds: float

    @property
    def context_loss(self) -> float:
        """Mean over the last 50 steps; about `CHANCE_LOSS` if the training has not left the plateau."""
        return float(self.context_losses[-50:].mean())


def train_variant(
    variant: Variant, regions: Regions, model_settings: MiniatureModelSettings, training: TrainingSettings, seed: int
) -> TrainedVariant:
    """Train one model from scratch; equal seeds give equal numbers."""
    assert training.max_steps is not None, "MiniatureRecipe makes sure of it"
    started = time.perf_counter()
    generator = np.random.default_rng(seed)
    steps_per_epoch = max(1, len(regions) // training.batch_size)
    order = np.empty(0, dtype=np.int64)
    losses = np.empty((training.max_steps, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MiniatureModel(model_settings, variant.count, align=variant.align)
        groups = parameter_groups(model, training.weight_decay)
        optimiser = torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas)
        factor = learning_rate_factor(training, training.max_steps, steps_per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        model.train()
        for step in range(training.max_steps):
            if len(order) < training.batch_size:
                order = generator.permutation(len(regions))
            rows, order = np.split(order, [training.batch_size])
            targets = regions.targets[rows]
            logits = model(*_views(regions, rows, variant.sample(len(rows), generator)))
            loss = F.binary_cross_entropy_with_logits(logits, targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            context = F.binary_cross_entropy_with_logits(logits.detach()[:, DIRECTIONS:], targets[:, DIRECTIONS:])
            losses[step] = loss.item(), context.item()
    return TrainedVariant(model.eval(), losses[:, 0], losses[:, 1], time.perf_counter() - started)


def _views(regions: Regions, rows: np.ndarray, coefficients: np.ndarray) -> tuple[Tensor, Tensor]:
    """Features and CLS tokens of some regions at their (R, n) coefficients."""
    columns = torch.from_numpy(np.rint(coefficients * 10).astype(np.int64))
    picked = torch.from_numpy(rows)[:, None]
    return regions.features[picked, columns], regions.cls[picked, columns]


@torch.inference_mode()
def accuracy(model: MiniatureModel, regions: Regions, views: Sequence[float]) -> tuple[float, float]:
    """Shares of regions whose detail, and whose context, is right when seen in these views; chance is 0.25 each."""
    right = torch.zeros(2)
    for rows in np.array_split(np.arange(len(regions)), max(1, len(regions) // 200)):
        logits = model(*_views(regions, rows, np.tile(views, (len(rows), 1))))
        detail, context = logits[:, :DIRECTIONS].argmax(dim=1), logits[:, DIRECTIONS:].argmax(dim=1)
        right += torch.stack([(detail == regions.detail[rows]).sum(), (context == regions.context[rows]).sum()])
    return (right[0] / len(regions)).item(), (right[1] / len(regions)).item()


# -------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Measurement:
    """Accuracies of one model at one choice of views."""

    views: Views
    detail: float
    context: float

    @property
    def mean(self) -> float:
        """(detail + context) / 2, which the experiment compares."""
        return (self.detail + self.context) / 2


@dataclass(frozen=True)
class VariantResult:
    """What one model reached.

    Attributes:
        measurements: one per choice of views: its single view; (0, t) for every t; or the recipe's triples.
        context_loss: of the last 50 training steps, see `CHANCE_LOSS`.
        seconds: of the training.
    """

    variant: Variant
    measurements: tuple[Measurement, ...]
    context_loss: float
    seconds: float

    @property
    def best(self) -> Measurement:
        """The views with the highest (detail + context) / 2."""
        return max(self.measurements, key=lambda measurement: measurement.mean)

    @property
    def mean_context(self) -> float:
        """Context accuracy, mean over all measured views."""
        return sum(measurement.context for measurement in self.measurements) / len(self.measurements)

    @property
    def on_plateau(self) -> bool:
        """Whether the training of the context has not begun to work: its loss is within 3% of chance."""
        return self.context_loss > 0.97 * CHANCE_LOSS


def measured_views(variant: Variant, triples: Sequence[Views]) -> list[Views]:
    """The choices of views at which a variant is measured."""
    if variant.count == 1:
        assert variant.views != "random"
        return [variant.views]
    return [(0.0, t) for t in CANDIDATE_VIEWS] if variant.count == 2 else list(triples)


def run_variant(variant: Variant, train: Regions, test: Regions, recipe: MiniatureRecipe) -> VariantResult:
    """Train one variant of the recipe and measure it at all of its views."""
    trained = train_variant(variant, train, recipe.model, recipe.training, recipe.seed)
    measurements = tuple(
        Measurement(views, *accuracy(trained.model, test, views)) for views in measured_views(variant, recipe.triples)
    )
    return VariantResult(variant, measurements, trained.context_loss, trained.seconds)


def summarise(results: Sequence[VariantResult]) -> dict[str, Any]:
    """The figures that the experiment is about (spec 10, "Report"), in percentage points.

    Every model counts at the views that suit it best, the fixed pair (0, 1) too: `margin` is what stochastic views
    gain over the best of whole image, crop and that pair. `best_fixed_pair` is the strongest of *all* fixed pairs; of
    equals, the one with the higher mean over t.

    Returns:
        None for a figure whose models are not among the results. `on_plateau` leaves out the crop, whose context loss
        cannot fall: the marker is not in it.
    """
    single = [r for r in results if r.variant.count == 1]
    fixed = [r for r in results if r.variant.count == 2 and r.variant.views != "random"]
    stochastic = next(
        (r for r in results if r.variant.views == "random" and r.variant.count == 2 and r.variant.align), None
    )
    baselines = [*single, *(r for r in fixed if r.variant.views == (0.0, 1.0))]
    strongest = max(baselines, key=lambda r: r.best.mean, default=None)
    best_fixed = max(fixed, key=lambda r: (r.best.mean, r.mean_context), default=None)

    def entry(result: VariantResult | None) -> dict[str, Any] | None:
        if result is None:
            return None
        return {
            "name": result.variant.name,
            "views": list(result.best.views),
            "score": 100 * result.best.mean,
            "mean_context": 100 * result.mean_context,
        }

    margin = None if stochastic is None or strongest is None else 100 * (stochastic.best.mean - strongest.best.mean)
    return {
        "stochastic": entry(stochastic),
        "strongest_baseline": entry(strongest),
        "margin": margin,
        "best_fixed_pair": entry(best_fixed),
        "mean_context": {r.variant.name: 100 * r.mean_context for r in results if r.variant.count == 2},
        "on_plateau": [r.variant.name for r in results if r.on_plateau and r.variant.views != (0.0,)],
    }
