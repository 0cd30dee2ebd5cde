"""The scan's claim in miniature (spec 10): does the state over the raster reach where convolutions cannot?

A picture of noise holds a coloured square, the glyph, and a grey rectangle. The pixels of both are to be named by the
glyph's colour. Nothing near the rectangle tells its name, so what names it has come from the glyph; if the two are
farther apart than the convolutions see, it has come through the scan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.training.recipes import TrainingSettings
from foveate.training.schedules import learning_rate_factor

from .configuration import VisionGRUConfig
from .modeling import STEM_EPS, Block, Stem, as_map, as_tokens, halved

CANVAS, GLYPH, RECTANGLE = 64, 8, 20
"""Sides in pixels."""
COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=np.float32)
"""Red, green, blue, yellow: the classes 1 to 4; the background is 0."""
CLASSES = 1 + len(COLOURS)
CLASS_WEIGHTS = (0.1, 1.0, 1.0, 1.0, 1.0)
FAR, NEAR = 33, 4
"""Gaps in pixels: `far` is no smaller, `near` no larger."""


VARIANTS = {
    "both": "both runs",
    "forward": "forward run only, twice the state",
    "local": "no scan",
    "attention": "self-attention in its place",
}


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Echoes:
    """Pictures and what is to be said of them.

    Attributes:
        pixel_values: (N, 3, 64, 64), (x - 0.5) / 0.25: the grey of the rectangle is exactly 0.
        labels: (N, 64, 64), classes of the pixels.
        rectangle: (N, 64, 64), true inside the rectangle.
        below: (N,), 1 where the glyph lies wholly below the rectangle, -1 wholly above, 0 beside.
        gap: (N,), the larger of the distances of the two boxes along x and along y, in pixels.
    """

    pixel_values: Tensor
    labels: Tensor
    rectangle: Tensor
    below: Tensor
    gap: Tensor


def draw_corners(draw: np.random.Generator, count: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) corners (x, y) of glyph and rectangle, uniform among all whose gap is from `low` to `high` pixels.

    Raises:
        InputError: no two corners have such a gap.
    """
    largest = CANVAS - GLYPH - RECTANGLE
    if not max(low, 0) <= min(high, largest):
        raise InputError(f"no glyph and rectangle are {low} to {high} pixels apart; gaps are from 0 to {largest}.")
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        corners = np.stack(
            [draw.integers(CANVAS - side, size=(4 * count, 2), endpoint=True) for side in (GLYPH, RECTANGLE)],
            axis=1,
        )
        gap = gaps(corners[:, 0], corners[:, 1])
        found.append(corners[(gap >= low) & (gap <= high)])
    corners = np.concatenate(found)[:count]
    return corners[:, 0], corners[:, 1]


def gaps(glyphs: np.ndarray, rectangles: np.ndarray) -> np.ndarray:
    """(N,): the larger of the distances along x and along y of boxes with these corners, 0 where they touch."""
    return np.maximum(rectangles - (glyphs + GLYPH), glyphs - (rectangles + RECTANGLE)).max(1).clip(0)


def draw_echoes(draw: np.random.Generator, count: int, low: int = 1, high: int = CANVAS) -> Echoes:
    """`count` pictures whose gap is from `low` to `high` pixels."""
    glyphs, rectangles = draw_corners(draw, count, low, high)
    colours = draw.integers(len(COLOURS), size=count)
    pixels = draw.uniform(0.4, 0.6, (count, CANVAS, CANVAS, 3)).astype(np.float32)
    labels = np.zeros((count, CANVAS, CANVAS), dtype=np.int64)
    inside = np.zeros((count, CANVAS, CANVAS), dtype=bool)
    for k, ((gx, gy), (x, y), colour) in enumerate(zip(glyphs, rectangles, colours, strict=True)):
        pixels[k, gy : gy + GLYPH, gx : gx + GLYPH] = COLOURS[colour]
        labels[k, gy : gy + GLYPH, gx : gx + GLYPH] = 1 + colour
        pixels[k, y : y + RECTANGLE, x : x + RECTANGLE] = 0.5
        labels[k, y : y + RECTANGLE, x : x + RECTANGLE] = 1 + colour
        inside[k, y : y + RECTANGLE, x : x + RECTANGLE] = True
    below = (glyphs[:, 1] >= rectangles[:, 1] + RECTANGLE).astype(int)
    below -= glyphs[:, 1] + GLYPH <= rectangles[:, 1]
    return Echoes(
        pixel_values=torch.from_numpy((pixels - 0.5) / 0.25).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels),
        rectangle=torch.from_numpy(inside),
        below=torch.from_numpy(below),
        gap=torch.from_numpy(gaps(glyphs, rectangles)),
    )


# --------------------------------------------------------------------------------------------------------------- model


class AttentionBlock(Block):
    """A block with softmax attention of four heads between all tokens in place of the runs; the rest is the same."""

    def __init__(self, dim: int, config: VisionGRUConfig) -> None:
        super().__init__(dim, config)
        del self.min_gru_1, self.min_gru_2
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)

    def _far(self, u: Tensor) -> Tensor:
        return self.attention(u, u, u, need_weights=False)[0]


class EchoModel(nn.Module):
    """VisionGRU's stem and its first two stages, one block each, and a head that names pixels.

    Example:
        >>> EchoModel("both")(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 5, 64, 64])
    """

    def __init__(self, variant: str = "both", dim: int = 24, head: int = 32) -> None:
        super().__init__()
        config = VisionGRUConfig(dim=dim, depths=[1, 1, 1, 1], mixer="both" if variant == "attention" else variant)
        block = AttentionBlock if variant == "attention" else Block
        self.tokenizer = Stem(config)
        self.block1, self.block2 = block(dim, config), block(2 * dim, config)
        self.conv1 = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(2 * dim, eps=STEM_EPS)
        self.head1, self.head2 = nn.Conv2d(dim, head, 1), nn.Conv2d(2 * dim, head, 1)
        self.classifier = nn.Conv2d(head, CLASSES, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, 5, H, W)."""
        x, size = self.tokenizer(pixel_values)
        x = self.block1(x, size)
        features = self.head1(as_map(x, size))
        x, half = self.norm1(as_tokens(self.conv1(as_map(x, size)))), halved(size)
        deep = self.head2(as_map(self.block2(x, half), half))
        features = F.relu(features + F.interpolate(deep, size=size, mode="bilinear", align_corners=False))
        logits = self.classifier(features)
        return F.interpolate(logits, size=pixel_values.shape[2:], mode="bilinear", align_corners=False)


def reach(model: nn.Module, at: tuple[int, int], side: int = CANVAS) -> Tensor:
    """(side, side) booleans: the input pixels (y, x) on which the logits of the pixel `at` depend, by gradients.

    The input is noise, so that no gradient is zero by chance.
    """
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels)[0, :, at[0], at[1]].square().sum(), pixels)
    return gradient[0].abs().amax(0) > 0


def farthest(variant: str, side: int = 160) -> int:
    """The largest distance along x or y, in pixels, of an input that the logits of a pixel depend on.

    Of eight pixels in the middle of a picture of `side` pixels, because it is not the same for all pixels of a token.
    A variant that sees the whole picture has half of `side`, or a little more.
    """
    torch.manual_seed(0)
    model, middle = EchoModel(variant), side // 2
    distances = (reach(model, (middle + k, middle + k), side).nonzero() - (middle + k) for k in range(8))
    return max(int(distance.abs().max()) for distance in distances)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Accuracy:
    """Share of the rectangles' pixels that get the colour of the glyph; chance is 0.25.

    Attributes:
        far, near: by the gap, see `FAR` and `NEAR`.
        far_above, far_below: of `far`, where the glyph lies wholly above or below the rectangle.
    """

    far: float
    far_above: float
    far_below: float
    near: float


@dataclass(frozen=True)
class EchoResult:
    variant: str
    seed: int
    parameters: int
    accuracy: Accuracy
    losses: tuple[float, ...]
    processor_seconds: float


def train(
    variant: str,
    seed: int = 0,
    steps: int = 800,
    *,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[EchoModel, list[float]]:
    """A model trained on pictures that are drawn for each step anew (spec 10: AdamW, warm-up of 50 steps, cosine).

    Returns:
        The model and the loss of each step.
    """
    torch.manual_seed(seed)
    draw = np.random.default_rng([seed, 0])
    model = EchoModel(variant)
    settings = TrainingSettings.model_validate({"max_steps": steps, "warmup_steps": min(50, steps // 2)})
    factor = learning_rate_factor(settings, steps, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    weights = torch.tensor(CLASS_WEIGHTS)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor(step)
        batch = draw_echoes(draw, batch_size)
        loss = F.cross_entropy(model(batch.pixel_values), batch.labels, weight=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        report(step + 1, losses[-1])
    return model.eval(), losses


@torch.inference_mode()
def measure(model: nn.Module, seed: int = 0, count: int = 512) -> Accuracy:
    """On `count` far and `count` near pictures, the same for every model of a seed and none of the training's."""
    far = draw_echoes(np.random.default_rng([seed, 1]), count, low=FAR)
    near = draw_echoes(np.random.default_rng([seed, 2]), count, high=NEAR)
    right = _right(model, far)
    above, below = right[far.below < 0], right[far.below > 0]
    return Accuracy(
        far=right.mean().item(),
        far_above=above.mean().item() if len(above) else math.nan,
        far_below=below.mean().item() if len(below) else math.nan,
        near=_right(model, near).mean().item(),
    )


def _right(model: nn.Module, echoes: Echoes) -> Tensor:
    """(N,): of each picture, the share of the rectangle that is named rightly."""
    shares = []
    for start in range(0, len(echoes.labels), 128):
        part = slice(start, start + 128)
        same = model(echoes.pixel_values[part]).argmax(1) == echoes.labels[part]
        shares.append((same & echoes.rectangle[part]).sum((1, 2)) / RECTANGLE**2)
    return torch.cat(shares)


def run(variant: str, seed: int, steps: int, report: Callable[[int, float], None]) -> EchoResult:
    """Trains and measures one model."""
    started = time.process_time()
    model, losses = train(variant, seed, steps, report=report)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    accuracy = measure(model, seed)
    return EchoResult(variant, seed, parameters, accuracy, tuple(losses), time.process_time() - started)
